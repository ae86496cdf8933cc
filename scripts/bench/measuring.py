"""A command's time, and the memory of processes."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.common import ROOT


def timed(command: list[str], cwd: Path) -> dict[str, float]:
    """Run a command; return its seconds, CPU seconds, and how much more memory it took after its first tenth, in MB."""
    start, before = time.monotonic(), os.times()
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=cwd, env=here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with watched_memory(process.pid, every=0.1) as memory:
        _, errors = process.communicate()
        seconds, after = time.monotonic() - start, os.times()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {errors.strip()}")
    early = [mb for when, mb in memory if when <= max(seconds / 10, 1)]
    late = [mb for when, mb in memory if when > max(seconds / 10, 1)]
    return {
        "seconds": seconds,
        "cpu_seconds": after.children_user + after.children_system - before.children_user - before.children_system,
        "rss_mb": max(early + late),
        "rss_growth_mb": max(late) - max(early) if late else 0.0,
    }


@contextmanager
def watched_memory(pid: int, every: float) -> Iterator[list[tuple[float, float]]]:
    """While inside, note every so many seconds the seconds since the beginning and `resident_mb` of a process."""
    start, memory = time.monotonic(), [(0.0, resident_mb(pid))]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            memory.append((time.monotonic() - start, resident_mb(pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        ended.set()
        watcher.join()


def resident_mb(pid: int) -> float:
    """Memory of a process and its descendants that is its own: without pages of mapped files, which are the cache's."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = sum(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
    return own + sum(resident_mb(int(child)) for child in children)
