"""Show a dataset as text: its splits, its tail, its images."""

import numpy as np
from numpy.typing import NDArray

from shards.groups import GROUPS, class_groups
from shards.index import Dataset

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 72


def summary(dataset: Dataset) -> str:
    """A few lines for the end of a build."""
    return "\n".join(
        [
            f"{dataset.name}: {_splits(dataset)}; {len(dataset.classes)} classes",
            _tail(dataset),
            f"built in {dataset.root}; next: accelerate launch train/bbn.py --data {dataset.root}",
        ]
    )


def inspect(dataset: Dataset) -> str:
    """All that `python -m shards inspect` prints, at most 72 columns wide but for the class names."""
    manifest = dataset.manifest
    image = manifest["image"]
    n_bytes = sum(shard["bytes"] for split in manifest["splits"].values() for shard in split["shards"])
    n_shards = sum(len(split["shards"]) for split in manifest["splits"].values())
    rejected = manifest["rejected"]
    counts_C = dataset.train_counts
    order = np.argsort(-counts_C, kind="stable")
    lines = [
        f"{dataset.name} in {dataset.root}, preset {manifest['preset']}",
        f"{_splits(dataset)}; {len(dataset.classes)} classes",
        _tail(dataset),
        "",
        *(f"{dataset.classes[j]:>24}  {counts_C[j]:,}" for j in order[:5]),
        *([f"{'…':>24}"] if len(order) > 10 else []),
        *(f"{dataset.classes[j]:>24}  {counts_C[j]:,}" for j in order[max(5, len(order) - 5) :]),
        "",
        sparkline(counts_C),
        "training images per class, largest first (height on a log scale)",
        "",
        f"image height {image['min_height']} to {image['max_height']},"
        f" width {image['min_width']} to {image['max_width']} pixels",
        f"{n_bytes:,} bytes in {n_shards} shards",
        f"rejected images: {rejected['total']}",
        *(f"{reason:>40}  {count}" for reason, count in sorted(rejected["reasons"].items())),
    ]
    return "\n".join(lines)


def sparkline(counts_C: NDArray[np.int64], width: int = WIDTH) -> str:
    """Draw class counts, sorted from the largest, as one line of blocks.

    With more classes than columns, a column stands for several classes and shows their mean. Heights are
    logarithmic, so an exponential tail falls in a straight line.
    """
    columns = np.array_split(np.sort(counts_C)[::-1], min(width, len(counts_C)))
    heights = np.log1p([column.mean() for column in columns])
    levels = np.rint(heights / max(heights.max(), 1e-9) * (len(BLOCKS) - 1)).astype(int)
    return "".join(BLOCKS[level] for level in levels)


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
