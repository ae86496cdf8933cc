"""How many cores this process may use: those it is bound to, as far as its control groups let it run on them.

A container that was started with --cpus 2 sees all cores of the machine, and is stopped for most of each tenth of a
second when it computes on more than two.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cores() -> int:
    """Return the number, at least 1; a part of a core counts as one."""
    bound = len(os.sched_getaffinity(0))
    try:
        return max(1, min([bound, *map(math.ceil, quotas(GROUPS.read_text(), MOUNTED))]))
    except OSError:  # no control groups here
        return bound


def quotas(groups: str, root: Path) -> list[float]:
    """Return the cores that a process's control groups, and those above them, let it use; see `group_folders`."""
    found = []
    for folder, unified in group_folders(groups, root, "cpu"):
        names = ["cpu.max"] if unified else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        if all((folder / name).is_file() for name in names):
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                found.append(int(quota) / int(period))
    return found


def group_folders(groups: str, root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of a process's control groups that a controller belongs to, each before those above it.

    Args:
        groups: what /proc/self/cgroup says: lines of "number:controllers:/path", of version 1 or 2.
        root: where the control groups are mounted.
        controller: such as "cpu".

    Yields:
        A folder, which need not be there, and whether it is of version 2.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers != "" and controller not in controllers.split(","):
            continue
        top = root if controllers == "" else root / controller
        group = top / path.lstrip("/")
        # A container may see its own group at the top, whatever the path says.
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield folder, controllers == ""
