"""Show a dataset as text: its splits, its tail, its images."""

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.groups import GROUPS, class_groups
from shards.index import MANIFEST, Dataset
from shards.remote import RemoteStore, is_url
from shards.store import LocalStore

BLOCKS = " ▁▂▃▄▅▆▇█"
WIDTH = 64
BAR = 7  # columns of a bar at most
HEIGHT = 6


def summary(dataset: Dataset) -> str:
    """A few lines for the end of a build."""
    return "\n".join(
        [
            f"{dataset.name}: {_splits(dataset)}; {len(dataset.classes)} classes",
            _tail(dataset),
            f"built in {dataset.place}; next: tailstream train bbn --data {shlex.quote(dataset.place)}",
        ]
    )


def inspect(dataset: Dataset) -> str:
    """All that `python -m shards inspect` prints."""
    manifest = dataset.manifest
    image = manifest["image"]
    rejected = manifest["rejected"]
    counts_C = dataset.train_counts
    order = np.argsort(-counts_C, kind="stable")
    lines = [
        f"{dataset.name} in {dataset.place}, preset {manifest['preset']}",
        f"{_splits(dataset)}; {len(dataset.classes)} classes",
        _tail(dataset),
        "",
        *(f"{dataset.classes[j]:>24}  {counts_C[j]:,}" for j in order[:5]),
        *([f"{'…':>24}"] if len(order) > 10 else []),
        *(f"{dataset.classes[j]:>24}  {counts_C[j]:,}" for j in order[max(5, len(order) - 5) :]),
        "",
        *draw_tail(counts_C),
        "training images per class, largest first (height on a log scale)",
        "",
        f"image height {image['min_height']} to {image['max_height']},"
        f" width {image['min_width']} to {image['max_width']} pixels",
        *(_bytes(name, manifest["splits"][name]["shards"]) for name in dataset.splits),
        f"rejected images: {rejected['total']:,}",
        *(f"{reason:>45}  {count:,}" for reason, count in sorted(rejected["reasons"].items())),
    ]
    return "\n".join(lines)


def lost_shards(dataset: Dataset) -> list[str]:
    """A line for each shard that is missing or not as long as the manifest says; nothing is read or fetched."""
    place = dataset.place
    try:
        sizes = RemoteStore(place).sizes("") if is_url(place) else LocalStore(dataset.root).sizes("")
    except OSError:
        sizes = {}
    if MANIFEST not in sizes:  # it was read: this is a place that does not list its files, as most web servers
        return []
    lost = []
    for split in dataset.splits:
        for shard in dataset.manifest["splits"][split]["shards"]:
            size = sizes.get(shard["file"])
            if size != shard["bytes"]:
                problem = "missing" if size is None else f"{size:,} bytes long, not {shard['bytes']:,}"
                lost.append(f"{shard['file']}: {problem}; run: tailstream verify {shlex.quote(place)}")
    return lost


def draw_tail(counts_C: NDArray[np.int64], width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Draw class counts as bars, sorted from the largest, and name the groups below; `height` + 1 lines.

    With more classes than columns, a column stands for several classes and shows their mean. Heights are
    logarithmic, so an exponential tail falls in a straight line; the numbers are counts at the top of their row.
    """
    means = np.array([column.mean() for column in np.array_split(np.sort(counts_C)[::-1], min(width, len(counts_C)))])
    top = np.log1p(means.max())
    eighths = np.rint(np.log1p(means) / max(top, 1e-9) * 8 * height).astype(int)
    ticks = [f"{np.expm1(top * (row + 1) / height):,.0f}" for row in range(height)]
    margin = max(map(len, ticks))
    wide = min(width // len(means), BAR)
    lines = [
        f"{ticks[row]:>{margin}} │" + "".join(BLOCKS[filled] * wide for filled in np.clip(eighths - 8 * row, 0, 8))
        for row in reversed(range(height))
    ]
    groups = class_groups(means)
    columns = {group: wide * int(np.count_nonzero(groups == group)) for group in GROUPS}
    names = "".join(group[: max(n - 1, 0)].ljust(n) for group, n in columns.items())
    return [line.rstrip() for line in [*lines, f"{'':>{margin}}  {names}"]]


def _bytes(name: str, shards: Sequence[dict[str, Any]]) -> str:
    plural = "s" if len(shards) > 1 else ""
    return f"{name}: {sum(shard['bytes'] for shard in shards):,} bytes in {len(shards):,} shard{plural}"


def _splits(dataset: Dataset) -> str:
    return ", ".join(f"{name} {len(split):,}" for name, split in dataset.splits.items())


def _tail(dataset: Dataset) -> str:
    counts_C = dataset.train_counts
    groups_C = class_groups(counts_C)
    sizes = ", ".join(f"{np.count_nonzero(groups_C == group)} {group}" for group in GROUPS)
    return (
        f"training images per class: {counts_C.max():,} to {counts_C.min():,},"
        f" imbalance factor {dataset.manifest['imbalance_factor']:.4g}; {sizes}"
    )
