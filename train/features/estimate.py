"""What a second stage will take: the features that it has to take, and the classifiers that it trains on them."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from shards.index import Dataset
from train.engine.config import Input
from train.engine.estimate import resident_bytes
from train.engine.limits import said_bytes, said_parameters, said_time
from train.features.bank import rows_to_take
from train.features.commands import Work
from train.networks.networks import BilateralNetwork, PlainNetwork

STEPS = 10
LONGEST = 20.0  # seconds of measuring


def estimate_lines(
    run: Path | None,
    network: PlainNetwork | BilateralNetwork,
    dataset: Dataset,
    input: Input,
    accelerator: Accelerator,
    work: Work,
    *,
    views: int,
    weights: str,
) -> list[str]:
    """Return what is said of a second stage, from ten steps of both kinds of work.

    Args:
        run: the run of stage one, which may keep features already; None where there is none yet.
        network: its network, on the accelerator's device.
        dataset: what the features are of.
        input: what the network sees.
        accelerator: gives device, precision and processes.
        work: what is trained on the features.
        views: how often each training image is taken; 0: once.
        weights: of the run: "last" or "selected".
    """
    device, linear = accelerator.device, network.classifier
    images = {name: len(split) * (max(1, views) if name == "train" else 1) for name, split in dataset.splits.items()}
    left = sum(images.values())
    if run is not None:
        of = (input, accelerator)
        left = sum(rows_to_take(run, network, dataset, s, *of, views * (s == "train"), weights) for s in images)
    counts = dataset.train_counts
    shown_once = int(counts.sum()) if work.each_once else len(counts) * int(counts.max())
    steps = math.ceil(shown_once * max(1, views) / work.batch_size)

    shown = min(input.batch_size, 32)
    images_BHWC = torch.zeros(shown, input.image_size, input.image_size, 3, dtype=torch.uint8, device=device)
    network.eval()

    @torch.no_grad()
    def extract() -> None:
        with accelerator.autocast():
            network.features(images_BHWC)

    weight = linear.weight.detach().clone().requires_grad_()
    features_BD = torch.rand(work.batch_size, linear.in_features, device=device)
    labels_B = torch.randint(linear.out_features, (work.batch_size,), device=device)

    def learn() -> None:
        F.cross_entropy(F.linear(features_BD, weight), labels_B).backward()
        weight.grad = None

    extracting = _seconds(extract, device) / shown * left / accelerator.num_processes
    learning = _seconds(learn, device) * work.epochs * steps * work.classifiers / accelerator.num_processes
    bank = sum(images.values()) * linear.in_features * 2
    # On a CPU the bank is mapped, and the system may have its memory back.
    held = bank if device.type == "cuda" else resident_bytes()
    held += 4 * images["train"] * linear.in_features * work.generates
    parameters = sum(p.numel() for p in network.parameters())
    lines = [
        f"{sum(images.values()):,} images, of which {left:,} have no features yet;"
        f" {said_parameters(parameters)} parameters,"
        f" of which {linear.weight.numel() + linear.out_features:,} are the classifier's",
        f"{said_bytes(bank)} of features, about {said_bytes(held)} of memory;"
        f" about {said_time(extracting)} for the features",
    ]
    if work.classifiers:
        lines.append(
            f"about {said_time(learning)} for"
            f" {'1 classifier,' if work.classifiers == 1 else f'{work.classifiers} classifiers, each'}"
            f" {work.epochs} epochs of {steps:,} step{'s' * (steps > 1)} of {work.batch_size} features"
            f" (measured: {STEPS} steps)"
        )
    return lines


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of a call: the median of at most ten, after a first one."""
    seconds: list[float] = []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > LONGEST:
            break
    return sorted(seconds[1:] or seconds)[len(seconds[1:]) // 2]
