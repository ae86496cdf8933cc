"""What a run takes, held against what there is: the machine's memory, the user's time, the images' size."""

import gc
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from pipeline.budget import free_memory
from pipeline.plan import TrainPlan
from pipeline.resident_loader import bytes_to_come
from shards.errors import UserError
from shards.index import Dataset
from train.engine.config import Config
from train.engine.estimate import Estimate, measure
from train.engine.method import Method, make_method

# Settings of the optimiser that a budget shortens; what else its schedule says are shares of the epochs.
SCHEDULE = ("epochs", "warmup_epochs", "warmup_steps")
# Longer than this, in seconds, a run is worth a warning: a day on a CPU, two weeks on GPUs.
SENSIBLE = {"cpu": 86_400.0, "cuda": 14 * 86_400.0}


def estimate_run(
    method_class: type[Method],
    plan: TrainPlan,
    config: Config,
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    thorough: bool,
) -> Estimate:
    """Measure what a run takes, the same on every process; torch's generators stay as they are.

    Args:
        method_class: makes the method that is measured, and not used afterwards.
        plan: the run's.
        config: its settings.
        dataset: what it is trained on.
        accelerator: gives device and precision.
        thorough: ten steps with the images themselves, else a few on noise.

    Raises:
        UserError: it does not fit the memory.
    """
    device = accelerator.device
    free = free_memory(device) // (int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1)
    free -= bytes_to_come(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        method = make_method(method_class, config, dataset.train_counts)
        estimate = measure(
            method, plan, config, accelerator, 10 if thorough else 3, thorough or bool(config.loop.budget)
        )
    del method
    gc.collect()
    every = gather_object([(estimate, free)])
    free = min(room for _, room in every)
    slowest = max((one for one, _ in every), key=lambda one: one.step_seconds)
    if config.loop.estimate:
        check_memory(slowest, config, plan, free)
    return slowest


def said(
    estimate: Estimate,
    config: Config,
    plan: TrainPlan,
    dataset: Dataset,
    steps: int,
    device: torch.device,
    *,
    begins: bool = True,
) -> list[str]:
    """Return what is said of a run with so many steps to go, and of one that begins what else it might be."""
    seconds, images = estimate.seconds(config, plan, dataset, steps), plan.rank_batch // config.optim.accumulate
    measured = (
        f"{estimate.steps} step{'s' * (estimate.steps > 1)} of {estimate.images} of {plan.rank_batch} images per stream"
    )
    lines = [
        f"{said_parameters(estimate.parameters)} parameters,"
        f" about {said_bytes(estimate.peak(images, device))} of memory,"
        f" {said_time(estimate.step_seconds)} a step: about {said_time(seconds)} for {steps:,} steps and evaluations"
        f" (measured: {measured})"
    ]
    if seconds > SENSIBLE[device.type] and begins:
        lines.append(
            f"warning: that is long for {'a CPU' if device.type == 'cpu' else 'a GPU'}: --loop.budget 8h fits the"
            " epochs into a time; a smaller --input.image_size or --model.backbone takes less for each"
        )
    return lines


def enlarged(dataset: Dataset, image_size: int) -> str | None:
    """Say that most images are smaller than the network sees them, or return None."""
    samples = dataset.splits["train"].samples
    shorter = float(np.median(np.minimum(samples["height"], samples["width"])))
    if shorter >= image_size:
        return None
    return (
        f"note: half of the images have at most {shorter:.0f} pixels on their shorter side and are enlarged to"
        f" {image_size}; a smaller --input.image_size takes less time"
    )


def check_memory(estimate: Estimate, config: Config, plan: TrainPlan, free: int) -> None:
    """Refuse a run that does not fit the memory.

    Args:
        estimate: of the run.
        config: its settings.
        plan: its plan.
        free: bytes, when nothing of the run was there.

    Raises:
        UserError: names settings that would fit.
    """
    images = plan.rank_batch // config.optim.accumulate
    if (need := estimate.memory(images)) <= free:
        return
    fitting = [f"{setting} ({said_bytes(size)})" for setting, size in _smaller(estimate, config, plan, free)]
    what = f"; settings that fit: {', '.join(fitting)}" if fitting else "; choose a smaller --model.backbone"
    raise UserError(
        f"a step needs about {said_bytes(need)} of memory, and {said_bytes(free)} are free{what};"
        " --loop.estimate false tries it all the same"
    )


def _smaller(estimate: Estimate, config: Config, plan: TrainPlan, free: int) -> Iterator[tuple[str, int]]:
    """Yield settings, each for itself, under which a step fits, and the bytes that it needs then."""
    batch, parts = plan.rank_batch, config.optim.accumulate
    most = int((free - estimate.fixed_bytes) / estimate.image_bytes)  # images of each stream
    if most < 1:
        return
    for more in range(parts + 1, batch + 1):
        if batch % more == 0 and batch // more <= most and (batch // more) % 2 == 0:
            yield f"--optim.accumulate {more}", estimate.memory(batch // more)
            break
    share = min(most, batch // parts) * parts * plan.world_size
    unit = 2 * plan.world_size * parts
    if share >= unit:
        size = unit << ((share // unit).bit_length() - 1)  # a power of two, where processes and parts are
        yield f"--input.batch_size {size}", estimate.memory(size // plan.world_size // parts)
    size = int(config.input.image_size * math.sqrt(most / (batch // parts))) // 32 * 32
    if size >= 64:
        smaller = replace(estimate, image_bytes=estimate.image_bytes * (size / config.input.image_size) ** 2)
        yield f"--input.image_size {size}", smaller.memory(batch // parts)


def within_budget(config: Config, plan: TrainPlan, dataset: Dataset, estimate: Estimate) -> Config:
    """Return the settings with as many epochs as loop.budget allows, at most those that they have.

    Raises:
        UserError: it allows not one.
    """
    assert config.loop.budget is not None
    budget, optim = seconds_in(config.loop.budget), config.optim
    first = estimate.seconds(config, plan, dataset, plan.steps_per_epoch)
    another = estimate.seconds(config, plan, dataset, 2 * plan.steps_per_epoch) - first
    if first > budget:
        raise UserError(
            f"loop.budget={config.loop.budget} is too short for one epoch, which takes about {said_time(first)};"
            " a smaller --input.image_size or --model.backbone takes less"
        )
    # Plain numbers: the run's config.yaml holds them, and YAML does not know the command line's own types.
    epochs = int(min(optim.epochs, 1 + int((budget - first) / another)))
    share = epochs / optim.epochs
    # One epoch of warm-up is none; see `train.engine.optimisers.warnings_about`.
    least = min(2, optim.warmup_epochs) if epochs >= 4 else 0
    shorter = replace(
        optim,
        epochs=epochs,
        warmup_epochs=int(max(least, round(optim.warmup_epochs * share))),
        warmup_steps=None if optim.warmup_steps is None else round(optim.warmup_steps * share),
    )
    return replace(config, optim=shorter)


def seconds_in(duration: str) -> float:
    """Return the seconds of a duration such as 1h30m."""
    units = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
    return float(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms])", duration)))


def said_time(seconds: float) -> str:
    """Return a time to two digits, such as 45 s, 12 minutes, 3.5 hours, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    for unit, length, most in (("minutes", 60, 90), ("hours", 3600, 48)):
        if seconds / length < most:
            amount = seconds / length
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def said_bytes(size: float) -> str:
    """Return bytes as GB, or MB where there are few."""
    return f"{size / 1e9:.1f} GB" if size >= 999.5e6 else f"{size / 1e6:.3g} MB"


def said_parameters(count: int) -> str:
    """Return a network's parameters in millions, such as 0.464 M, 25.6 M, 1,136 M."""
    return f"{count / 1e6:.3g} M" if count < 999.5e6 else f"{count / 1e6:,.0f} M"
