"""What bench_pipeline.py loads: a long tail of photographs or small pictures, and an index of iNaturalist's size."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import write_photographs
from bench.pipeline_peers import BATCH
from shards.build import build
from shards.index import MANIFEST
from shards.profiles import profile_counts
from shards.progress import say

CLASSES, IMBALANCE_FACTOR = 20, 100
QUALITY = 87  # of the photographs
INDEX_CLASSES = 8142


def make_data(folder: Path, data: str, images: int) -> dict[str, Any]:
    """Write `source`, a folder of images per class, and `dataset`, the shards that are built from it."""
    say(f"making {images} pictures: {data}")
    shares = profile_counts("exp", [10**6] * CLASSES, IMBALANCE_FACTOR)
    counts = np.maximum(1, np.rint(images * shares / shares.sum())).astype(int)
    labels = np.repeat(np.arange(CLASSES), counts).tolist()
    if data == "photos":
        mean_bytes = write_photographs(folder / "source", labels, _about_300x200, quality=QUALITY)
    else:
        mean_bytes = write_photographs(folder / "source", labels, lambda _: (32, 32), "png")
    build("folder", source=folder / "source", out=folder / "dataset", test_fraction=0, val_fraction=0, workers=1)
    return {"images": len(labels), "mean_bytes": mean_bytes, "batch_per_stream": BATCH[data]}


def _about_300x200(generator: np.random.Generator) -> tuple[int, int]:
    return int(generator.integers(260, 341)), int(generator.integers(170, 231))


def make_index(folder: Path, samples: int) -> None:
    """Make a dataset of many samples and 8,142 classes: the index is of that size, a few pictures stand for all."""
    say(f"making an index of {samples:,} samples")
    write_photographs(folder / "source", [0] * 250 + [1] * 250, _about_300x200, quality=QUALITY)
    root = folder / "dataset"
    build("folder", source=folder / "source", out=root, test_fraction=0, val_fraction=0, shard_samples=50, workers=1)
    manifest = json.loads((root / MANIFEST).read_text())
    stored = np.load(root / "train.samples.npy")
    rows = stored[np.sort(np.resize(np.arange(len(stored)), samples))]
    # Like iNaturalist 2018's: from about a thousand images down to two.
    classes = min(INDEX_CLASSES, samples // 2)
    shares = np.arange(1, classes + 1) ** -0.4
    counts = 2 + np.floor((samples - 2 * classes) * shares / shares.sum()).astype(np.int64)
    counts[0] += samples - counts.sum()
    rows["label"] = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), counts))
    np.save(root / "train.samples.npy", rows)
    np.save(root / "train.by_class.npy", np.argsort(rows["label"], kind="stable"))
    manifest["splits"]["train"] |= {"samples": samples, "class_counts": counts.tolist()}
    manifest["classes"] = [f"{j:04d}" for j in range(classes)]
    (root / MANIFEST).write_text(json.dumps(manifest))
