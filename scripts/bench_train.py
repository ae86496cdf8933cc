"""How fast BBN's step is, beside two separate passes (the papers' way) and beside single-branch training.

    .venv/bin/python scripts/bench_train.py --json FILE [--backbone resnet50 --image-size 224 --batch-size 128]

Measures by turns, in one run, whole steps of the optimiser on the same number of images: `bbn` (this project's step),
`two passes` (the same network, its trunk run once for each stream, with ordinary batch norm) and `single` (the plain
network on both streams' images as one batch). On a GPU also with bf16, channels last and torch.compile. Data lies in
memory; `loader` is `bbn` in its fastest setting fed by the loader from a dataset (`--data`), so that what it lacks
to the same setting from memory is the loader's cost. All figures are medians over the rounds.
"""

import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from pipeline.loader import open_loader
from pipeline.plan import Stream, TrainPlan
from shards.cli import run_commands
from shards.index import open_dataset
from shards.progress import say
from train.bbn import bbn_loss
from train.config import Loop
from train.loop import device_name, prepare_network
from train.networks import BilateralNetwork, build_network
from train.runs import environment

ALPHA = 0.5

Streams = tuple[Tensor, Tensor, Tensor, Tensor]  # images and labels of the uniform stream, and of the reversed one
Forward = Callable[[nn.Module, Streams], Tensor]


@dataclass(frozen=True)
class Setting:
    """How a step is computed."""

    bf16: bool = False
    channels_last: bool = True
    compile: bool = False

    def __str__(self) -> str:
        said = ["bf16" if self.bf16 else "float32", "channels last" if self.channels_last else "channels first"]
        return ", ".join(said + ["compiled"] * self.compile)


def bench(
    json: Path = Path("bench_train.json"),
    backbone: str = "resnet32",
    image_size: PositiveInt = 32,
    batch_size: PositiveInt = 128,
    classes: PositiveInt = 100,
    steps: PositiveInt = 10,
    rounds: PositiveInt = 5,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    data: Path | None = None,
    threads: PositiveInt = 2,
) -> None:
    """Measure and write the results.

    Args:
        json: the file to write.
        backbone: as --model.backbone.
        image_size: height and width in pixels.
        batch_size: images per stream.
        classes: how many the networks tell apart.
        steps: how many steps a measurement takes.
        rounds: how often everything is measured, by turns.
        device: cpu, cuda, or auto (a GPU where there is one).
        data: a dataset's folder, to feed the step from the loader too; its images are resized to image_size.
        threads: decoding threads per stream.
    """
    on = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    settings = [Setting(channels_last=True), Setting(channels_last=False)]
    if on.type == "cuda":
        settings += [Setting(compile=True), Setting(bf16=True), Setting(bf16=True, compile=True)]
    torch.manual_seed(0)
    bilateral = build_network("bilateral", backbone, classes)
    plain = build_network("plain", backbone, classes)
    kinds: dict[str, tuple[nn.Module, Forward]] = {
        "bbn": (bilateral, bbn_step),
        "two passes": (bilateral, two_passes_step),
        "single": (plain, single_step),
    }
    timers = {
        f"{kind}, {setting}": timer(network, forward, setting, on)
        for setting in settings
        for kind, (network, forward) in kinds.items()
        if not (kind == "two passes" and setting.compile)
    }
    feeds: dict[str, Iterator[Streams]] = dict.fromkeys(
        timers, repeat(made_streams(batch_size, image_size, classes, on))
    )
    if data is not None:
        fastest = f"bbn, {settings[-1] if on.type == 'cuda' else settings[0]}"
        timers[f"loader, {fastest}"] = timers[fastest]
        feeds[f"loader, {fastest}"] = loaded_streams(data, batch_size, image_size, classes, threads, on)

    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for name, measure in timers.items():
        say(f"warming up: {name}")
        measure(feeds[name], 3)
    for i in range(rounds):
        for name, measure in timers.items():
            seconds[name].append(measure(feeds[name], steps) / steps)
            say(f"round {i + 1}, {name}: {2 * batch_size / seconds[name][-1]:,.0f} images/s")
    write(json, seconds, batch_size, on, {"backbone": backbone, "image_size": image_size, "classes": classes})


def bbn_step(network: nn.Module, streams: Streams) -> Tensor:
    """Return the loss of this project's step."""
    images_c, labels_c, images_r, labels_r = streams
    return bbn_loss(network(images_c, images_r, ALPHA), labels_c, labels_r, ALPHA)


def two_passes_step(network: nn.Module, streams: Streams) -> Tensor:
    """Return the same loss, with a pass through the network's trunk for each stream."""
    assert isinstance(network, BilateralNetwork)
    images_c, labels_c, images_r, labels_r = streams
    features = [
        branch(network.trunk(network.normalize(images))).mean((2, 3), dtype=torch.float32)
        for branch, images in ((network.conventional, images_c), (network.rebalancing, images_r))
    ]
    logits = network.classifier(torch.cat([2 * ALPHA * features[0], 2 * (1 - ALPHA) * features[1]], dim=1))
    return bbn_loss(logits, labels_c, labels_r, ALPHA)


def single_step(network: nn.Module, streams: Streams) -> Tensor:
    """Return the loss of single-branch training on both streams' images as one batch."""
    images_c, labels_c, images_r, labels_r = streams
    return nn.functional.cross_entropy(network(torch.cat([images_c, images_r])), torch.cat([labels_c, labels_r]))


def timer(
    network: nn.Module, forward: Forward, setting: Setting, device: torch.device
) -> Callable[[Iterator[Streams], int], float]:
    """Return what takes so many steps, on a copy of the network, and tells their seconds."""
    network = copy.deepcopy(network).to(device).train()
    prepare_network(network, Loop(channels_last=setting.channels_last, compile=setting.compile))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=2e-4)

    def measure(feed: Iterator[Streams], steps: int) -> float:
        wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=setting.bf16):
                loss = forward(network, next(feed))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait()
        return time.perf_counter() - start

    return measure


def made_streams(batch_size: int, image_size: int, classes: int, device: torch.device) -> Streams:
    """Return random images and labels in memory."""
    shape = (batch_size, image_size, image_size, 3)
    images = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(2)]
    labels = [torch.randint(0, classes, (batch_size,), device=device) for _ in range(2)]
    return images[0], labels[0], images[1], labels[1]


def loaded_streams(
    data: Path, batch_size: int, image_size: int, classes: int, threads: int, device: torch.device
) -> Iterator[Streams]:
    """Yield BBN's streams of a dataset, as training gets them."""
    augment = "cifar" if image_size <= 64 else "imagenet"
    specs = (Stream("uniform", 1.0, augment), Stream("reversed", -1.0, augment))
    plan = TrainPlan(open_dataset(data).splits["train"], specs, batch_size, image_size, seed=0, epochs=1)
    with open_loader(plan, "auto", device, threads) as loader:
        for step in loader:
            uniform, reverse = step["uniform"], step["reversed"]
            yield uniform.images_BHWC, uniform.labels_B % classes, reverse.images_BHWC, reverse.labels_B % classes


def write(
    path: Path, seconds: dict[str, list[float]], batch_size: int, device: torch.device, of: dict[str, Any]
) -> None:
    """Write images per second and what they are compared with."""
    rates = {name: 2 * batch_size / statistics.median(of_one) for name, of_one in seconds.items()}
    best = max((name for name in rates if name.startswith("bbn")), key=rates.__getitem__)
    result = {
        "command": " ".join(sys.orig_argv[1:]),
        "environment": environment(device_name(device), 1) | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        **of,
        "batch_size_per_stream": batch_size,
        "images_per_second": rates,
        "bbn_over_two_passes": {
            name.removeprefix("bbn, "): rates[name] / rates[name.replace("bbn", "two passes")]
            for name in rates
            if name.startswith("bbn") and name.replace("bbn", "two passes") in rates
        },
        "bbn_over_single": {
            name.removeprefix("bbn, "): rates[name] / rates[name.replace("bbn", "single")]
            for name in rates
            if name.startswith("bbn")
        },
        "best_over_two_passes_in_float32": {
            "best": best,
            "ratio": rates[best]
            / max(rates[f"two passes, {Setting(channels_last=layout)}"] for layout in (True, False)),
        },
        "loader_share_of_step": {
            name: 1 - rate / rates[name.removeprefix("loader, ")]
            for name, rate in rates.items()
            if name.startswith("loader")
        },
        "seconds_per_step": seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"written: {path}")


if __name__ == "__main__":
    run_commands("scripts/bench_train.py", bench)
