"""How fast a trained model says what a folder of photographs shows, beside its bare network.

    .venv/bin/python scripts/bench_predict.py --json FILE [--images 10000]

Measured by turns, each on a share of the images in every round:

    predict     what `python -m train.predict --format jsonl` does once its model is open: read, decode, crop, resize,
                network, calibration, rows written
    network     the network alone, on batches of as many images that lie ready in memory
    pictures    reading, decoding, cropping and resizing alone, in one thread

Ratios are taken within each round; their median counts. CPU time is that of all threads.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import header, write_photographs, write_results
from shards.cli import run_commands
from shards.errors import UserError
from shards.progress import say
from train.engine.inference import Item, Model, find_images, open_model
from train.networks.model_files import Description, describe_model, save_model
from train.networks.networks import build_network
from train.predict import open_writer, predict

CLASSES = 100
COUNTS = [CLASSES - j for j in range(CLASSES)]
SIZE = (300, 200)
WAYS = ("predict", "network", "pictures")
LEAST = 0.9  # of the bare network's rate


def bench(
    json: Path = Path("bench_predict.json"),
    images: int = 10_000,
    rounds: int = 5,
    batch: int = 32,
    backbone: str = "resnet50",
    size: int = 224,
) -> None:
    """Measure and write the results.

    Args:
        json: the file to write.
        images: how many there are, 300x200 pixels each; every round takes its share of them.
        rounds: how often everything is measured, by turns.
        batch: images at a time.
        backbone: of the network, which has 100 classes and is not trained.
        size: what it sees, in pixels.
    """
    if not 0 < rounds * batch <= images:
        raise UserError(f"images={images} must give a batch of {batch} to each of rounds={rounds}; give more images")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        say(f"making {images:,} images and a {backbone}")
        mean_bytes = write_photographs(folder / "photos", (i % CLASSES for i in range(images)), lambda _: SIZE)
        model = open_model(make_run(folder / "run", backbone, size, COUNTS))
        results = measure(model, find_images([str(folder / "photos")]), folder, rounds, batch)
    setting = {"images": images, "rounds": rounds, "batch": batch, "backbone": backbone, "size": size}
    machine = header(torch=torch.__version__, threads=torch.get_num_threads())
    write_results(json, machine | setting | {"mean_file_bytes": mean_bytes} | results)
    for way, figures in results["results"].items():
        say(f"{way}: {figures['images_per_second']:.1f} images/s, {figures['cpu_ms']:.2f} CPU ms per image")
    for bar in results["bars"]:
        say(f"{bar['what']}: {bar['measured']:.3f} ({bar['bar']}): {'reached' if bar['reached'] else 'MISSED'}")


def make_run(folder: Path, backbone: str, size: int, train_counts: list[int]) -> Path:
    """Save an untrained network as a run would; return the folder."""
    torch.manual_seed(0)
    network = build_network("plain", backbone, len(train_counts), image_size=size)
    save_model(network, folder)
    described = Description(
        classes=[f"class {j}" for j in range(len(train_counts))],
        train_counts=train_counts,
        image_size=size,
        eval_augment="eval",
        crop_share=0.875,
        mean=network.normalize.mean.flatten().tolist(),
        std=network.normalize.std.flatten().tolist(),
        shorter_side=None,
        quality=90,
        dataset={"name": "photographs", "fingerprint": None},
        method="untrained",
        commit=None,
        evaluated_on="test",
        weights={"last": {"file": "model.safetensors", "epoch": 0, "figures": {}}},
    )
    describe_model(folder, described)
    return folder


def measure(model: Model, items: list[Item], folder: Path, rounds: int, batch: int) -> dict[str, Any]:
    """Measure all ways by turns; return figures by way, ratios and bars."""
    size = model.view.image_size
    ready_BHWC = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    shares = [items[k::rounds] for k in range(rounds)]
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}

    def whole(share: list[Item], number: int) -> None:
        with open_writer("jsonl", folder / f"{number}.jsonl", 5) as writer:
            for row in predict([model], share, topk=5, batch_size=batch):
                assert row is not None
                writer.write(row)

    def network(share: list[Item], number: int) -> None:
        for first in range(0, len(share), batch):
            model.logits(ready_BHWC[: len(share) - first])

    def pictures(share: list[Item], number: int) -> None:
        for item in share:
            model.view.picture(item.read())

    work: dict[str, Callable[[list[Item], int], None]] = {"predict": whole, "network": network, "pictures": pictures}
    for way in WAYS:  # libraries choose their kernels, threads start
        work[way](items[: 2 * batch], -1)
    for number, share in enumerate(shares):
        turn = number % len(WAYS)  # nobody always comes after the same one
        for way in [*WAYS[turn:], *WAYS[:turn]]:
            wall, cpu = time.perf_counter(), time.process_time()
            work[way](share, number)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            runs[way].append({"images_per_second": len(share) / wall, "cpu_ms": 1000 * cpu / len(share)})
        say(f"round {number + 1} of {rounds}")
    results = {
        way: {key: statistics.median(run[key] for run in of) for key in of[0]} | {"runs": of}
        for way, of in runs.items()
    }
    ratios = [
        ours["images_per_second"] / bare["images_per_second"]
        for ours, bare in zip(runs["predict"], runs["network"], strict=True)
    ]
    found = statistics.median(ratios)
    bar = {"what": "predict over its bare network", "bar": f"at least {LEAST}", "measured": found}
    return {
        "results": results,
        "ratios": {"predict over network": {"median": found, "range": [min(ratios), max(ratios)]}},
        "bars": [bar | {"reached": found >= LEAST}],
    }


if __name__ == "__main__":
    run_commands("scripts/bench_predict.py", bench)
