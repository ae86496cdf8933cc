"""Builds, verifies and opens a dataset of iNaturalist 2018's real size, from small JPEGs in its official layout.

    .venv/bin/python scripts/bench_inat.py train_counts.json --json FILE

`train_counts.json` is a JSON list of training images per class (the real one has 8,142 numbers that sum to 437,513);
three validation images per class are added, as the real collection has. The pictures are windows of scikit-learn's two
photographs, a few hundred of them under many names.
"""

import json
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from bench.common import header, read_counts, write_results
from bench.measuring import timed
from shards.cli import run_commands
from shards.index import open_dataset
from shards.progress import say

PICTURES = 500
VAL_PER_CLASS = 3


def bench(counts: Path, json: Path = Path("bench_inat.json"), workers: int = 2) -> None:
    """Measure and write the results.

    Args:
        counts: a JSON list of training images per class.
        json: the file to write.
        workers: processes of build and verify.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = _measure(Path(folder), counts, workers)
    write_results(json, results)


def _measure(folder: Path, counts: Path, workers: int) -> dict[str, Any]:
    train_counts = read_counts(counts)
    say(f"making {sum(train_counts):,} training images of {len(train_counts):,} classes")
    make_source(folder / "source", train_counts)
    shards = [sys.executable, "-m", "shards"]
    build = [*shards, "build", "inat2018", "--source", "source", "--out", "out", "--workers", str(workers)]
    say("building")
    built = timed(build, cwd=folder)
    say("verifying")
    verified = timed([*shards, "verify", "out", "--workers", str(workers)], cwd=folder)
    opening = []
    for _ in range(5):
        start = time.perf_counter()
        dataset = open_dataset(folder / "out")
        opening.append(time.perf_counter() - start)
    train = dataset.splits["train"]
    assert len(train) == sum(train_counts)
    assert train.class_counts.tolist() == train_counts
    names = [path for path in (folder / "out").iterdir() if path.suffix in (".npy", ".idx", ".txt")]
    size = {kind: sum(p.stat().st_size for p in names if p.name.endswith(kind)) for kind in (".npy", ".idx", ".txt")}
    return header(workers=workers) | {
        "train_images": len(train),
        "test_images": len(dataset.splits["test"]),
        "classes": len(dataset.classes),
        "build": built,
        "verify": verified,
        "open_seconds": min(opening),
        "bytes": {
            "shards": sum(p.stat().st_size for p in (folder / "out").glob("*.tar")),
            "manifest": (folder / "out" / "dataset.json").stat().st_size,
            "arrays": size[".npy"],
            "text_indexes": size[".idx"],
            "names": size[".txt"],
        },
    }


def make_source(source: Path, train_counts: list[int]) -> None:
    """Write the official layout: train2018.json, val2018.json and the images at their file names."""
    generator = np.random.default_rng(0)
    pictures = []
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    for i in range(PICTURES):
        left, top = int(generator.integers(0, 560)), int(generator.integers(0, 360))
        buffer = BytesIO()
        photographs[i % 2].crop((left, top, left + 64, top + 48)).save(buffer, "JPEG", quality=85)
        pictures.append(buffer.getvalue())
    categories = [{"id": j, "name": f"Species number {j}"} for j in range(len(train_counts))]
    number = 0
    for split, per_class in {"train": train_counts, "val": [VAL_PER_CLASS] * len(train_counts)}.items():
        images, annotations = [], []
        for j, count in enumerate(per_class):
            folder = source / "train_val2018" / f"Group{j % 14}" / str(j)
            folder.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                path = folder / f"{number:08d}.jpg"
                path.write_bytes(pictures[number % PICTURES])
                images.append({"id": number, "file_name": path.relative_to(source).as_posix()})
                annotations.append({"id": number, "image_id": number, "category_id": j})
                number += 1
        content = {"images": images, "annotations": annotations, "categories": categories}
        (source / f"{split}2018.json").write_text(json.dumps(content))


if __name__ == "__main__":
    run_commands("scripts/bench_inat.py", bench)
