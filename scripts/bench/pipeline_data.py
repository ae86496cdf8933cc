"""What bench_pipeline.py loads: a long tail of photographs or small pictures, and an index of iNaturalist's size."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import photographs
from bench.pipeline_peers import BATCH
from shards.build import build
from shards.index import MANIFEST
from shards.profiles import profile_counts
from shards.progress import say
from shards.sources.arrays import png

CLASSES, IMBALANCE_FACTOR = 20, 100
QUALITY = 87  # of the photographs
INDEX_CLASSES = 8142


def make_data(folder: Path, data: str, images: int) -> dict[str, Any]:
    """Write `source`, a folder of images per class, and `dataset`, the shards that are built from it."""
    say(f"making {images} pictures: {data}")
    shares = profile_counts("exp", [10**6] * CLASSES, IMBALANCE_FACTOR)
    counts = np.maximum(1, np.rint(images * shares / shares.sum())).astype(int)
    pictures = photographs(_about_300x200 if data == "photos" else lambda _: (32, 32))
    sizes = []
    for j, count in enumerate(counts.tolist()):
        (folder / "source" / f"class-{j:02d}").mkdir(parents=True)
        for i, picture in enumerate(islice(pictures, count)):
            path = folder / "source" / f"class-{j:02d}" / f"{i:06d}.{'jpg' if data == 'photos' else 'png'}"
            if data == "photos":
                picture.save(path, quality=QUALITY)
            else:
                path.write_bytes(png(np.asarray(picture)))  # as CIFAR is stored
            sizes.append(path.stat().st_size)
    build("folder", source=folder / "source", out=folder / "dataset", test_fraction=0, val_fraction=0, workers=1)
    return {"images": int(counts.sum()), "mean_bytes": float(np.mean(sizes)), "batch_per_stream": BATCH[data]}


def _about_300x200(generator: np.random.Generator) -> tuple[int, int]:
    return int(generator.integers(260, 341)), int(generator.integers(170, 231))


def make_index(folder: Path, samples: int) -> None:
    """Make a dataset of many samples and 8,142 classes: the index is of that size, a few pictures stand for all."""
    say(f"making an index of {samples:,} samples")
    pictures = photographs(_about_300x200)
    for j in range(2):
        (folder / "source" / f"{j}").mkdir(parents=True)
        for i, picture in enumerate(islice(pictures, 250)):
            picture.save(folder / "source" / f"{j}" / f"{i}.jpg", quality=QUALITY)
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
