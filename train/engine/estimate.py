"""What a run will take: parameters, memory and time, measured on a few steps before it begins.

    a network of its own ── a few images of each stream ── forward, backward, optimiser, on a clock
                                     │
         bytes kept for the backward pass, per image          seconds, per image
                                     │
    memory = weights, gradients, optimiser + images × bytes      time = steps × images × seconds + evaluations

Nothing of what is measured is used afterwards, so that the run itself gives the same bits with or without it. Large
batches are measured in part: what does not fit the memory is found out before it is tried.
"""

import gc
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from pipeline.batch import Loader, Shown
from pipeline.budget import free_memory
from pipeline.plan import TrainPlan
from shards.errors import UserError
from shards.index import Dataset
from train.engine.config import Config
from train.engine.evaluation import test_split
from train.engine.loop import prepare_method
from train.engine.method import Method, Progress
from train.engine.optimisers import make_optimizer

# Images per stream of the first step, which shows what more of them would need.
FIRST_IMAGES = 4
# A step that takes less is measured again with more images; and how long measuring may take in all, in seconds.
LONG_STEP, LONGEST = 0.5, 6.0
# Buffers that the backward pass fills beside what was kept for it, in sizes of the largest tensor that was kept.
BUFFERS = 3
# Longer than this, in seconds, a run is worth a warning: a day on a CPU, two weeks on GPUs.
SENSIBLE = {"cpu": 86_400.0, "cuda": 14 * 86_400.0}


class NoiseLoader(Loader):
    """Shows noise in the place of a plan's images: no file is opened."""

    def __init__(self, plan: TrainPlan, device: torch.device) -> None:
        super().__init__(plan, device)
        self._plan: TrainPlan = plan
        self._steps = iter(range(1_000_000))

    def _next_step(self) -> list[Shown]:
        size = self._plan.image_size
        return [
            Shown(torch.randint(256, (len(draw.ids_B), size, size, 3), dtype=torch.uint8), draw)
            for draw in self._plan.draws(next(self._steps))
        ]

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Estimate:
    """What a run takes in each process.

    Attributes:
        parameters: of what is trained, frozen ones too.
        fixed_bytes: weights, gradients, the optimiser's state and the average of the weights.
        image_bytes: what the backward pass needs of an image of each stream.
        process_bytes: what the process held before.
        step_seconds: of a whole step, loading included where it was measured.
        predict_seconds: of predicting one image.
        steps: how many were measured.
        images: of each stream in these.
    """

    parameters: int
    fixed_bytes: int
    image_bytes: float
    process_bytes: int
    step_seconds: float
    predict_seconds: float
    steps: int
    images: int

    def memory(self, images: int) -> int:
        """Return the bytes of a step that computes with so many images of each stream at once."""
        return int(self.fixed_bytes + self.image_bytes * images)

    def seconds(self, config: Config, plan: TrainPlan, dataset: Dataset, steps: int) -> float:
        """Return how long so many steps take, with the evaluations between them and those at the end."""
        watched = dataset.splits.get("val") or test_split(dataset)
        evaluations = steps / plan.steps_per_epoch / config.loop.eval_every
        images = evaluations * len(watched) + 2 * sum(len(s) for name, s in dataset.splits.items() if name != "train")
        return steps * self.step_seconds + images * self.predict_seconds

    def lines(self, config: Config, plan: TrainPlan, dataset: Dataset, steps: int, device: torch.device) -> list[str]:
        """Return what is said of a run with so many steps to go."""
        seconds, images = self.seconds(config, plan, dataset, steps), plan.rank_batch // config.optim.accumulate
        measured = f"{self.steps} step{'s' * (self.steps > 1)} of {self.images} of {plan.rank_batch} images per stream"
        lines = [
            f"{self.parameters / 1e6:.3g} M parameters, about {said_bytes(self.peak(images, device))} of memory,"
            f" {said_time(self.step_seconds)} a step: about {said_time(seconds)} for {steps:,} steps and evaluations"
            f" (measured: {measured})"
        ]
        if seconds > SENSIBLE[device.type]:
            lines.append(
                f"warning: that is long for {'a CPU' if device.type == 'cpu' else 'a GPU'}: --loop.budget 8h fits the"
                " epochs into a time; a smaller --input.image_size or --model.backbone takes less for each"
            )
        return lines

    def peak(self, images: int, device: torch.device) -> int:
        """Return the bytes of the whole process, on a CPU, or of those on the GPU."""
        return self.memory(images) + (self.process_bytes if device.type == "cpu" else 0)


def measure(
    method: Method, plan: TrainPlan, config: Config, accelerator: Accelerator, steps: int, load: bool
) -> Estimate:
    """Take a few steps with a method that is not used afterwards.

    Args:
        method: just made.
        plan: the run's.
        config: the run's settings.
        accelerator: gives device and precision; processes measure each on its own.
        steps: how many to measure at most.
        load: whether to measure with the images themselves, and their loading.
    """
    device, part = accelerator.device, plan.rank_batch // config.optim.accumulate
    held = _resident_bytes()
    method.network.to(device)
    # Processes measure each on its own, and compiling takes longer than measuring.
    prepare_method(method, replace(config, loop=replace(config.loop, sync_batch_norm=False, compile=False)))
    optimizer = make_optimizer(method, config.optim)
    method.network.train()

    def step(images: int) -> float:
        began = time.perf_counter()
        cut = {name: of.part(slice(images)) for name, of in batch.items()}
        with accelerator.autocast():
            result = method.step(cut, Progress(1, config.optim.epochs, 0, config.loop.seed))
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait_for(device)
        return time.perf_counter() - began

    with _loader(plan, config, device, load) as loader:
        batch = next(loader)
        images = min(part, FIRST_IMAGES)
        with _kept() as kept:
            step(images)
        fixed = _fixed_bytes(method, optimizer, config)
        image_bytes = (kept.bytes + BUFFERS * kept.largest) / images
        seconds: list[float] = []
        left = LONGEST
        while len(seconds) < steps and left > 0:
            took = step(images)
            left -= took
            larger = min(part, 2 * images * max(1, int(LONG_STEP / took / 2)))
            room = fixed + image_bytes * larger < free_memory(device) / 2
            if took < LONG_STEP and larger > images and room:
                images, seconds = larger, []  # too short for the clock, or not yet the whole
                left -= step(images)  # the first one of a size finds its kernels
            else:
                seconds.append(took)
        loading = _loading_seconds(loader, steps) if load else 0.0
    computing = sorted(seconds)[len(seconds) // 2] * part / images * config.optim.accumulate
    whole = max(computing, loading) if device.type == "cuda" else computing + loading
    shown = next(iter(batch.values())).images_BHWC[:images]
    predicting = _predict_seconds(method, shown, accelerator) / accelerator.num_processes
    parameters = sum(p.numel() for p in method.network.parameters())
    return Estimate(parameters, fixed, image_bytes, held, whole, predicting, len(seconds), images)


def _loader(plan: TrainPlan, config: Config, device: torch.device, load: bool) -> Loader:
    return config.input.open_loader(plan, device) if load else NoiseLoader(plan, device)


def _loading_seconds(loader: Loader, steps: int) -> float:
    """Return how long a batch takes to come where nothing else is done."""
    next(loader)
    began = time.perf_counter()
    for _ in range(steps):
        next(loader)
    return (time.perf_counter() - began) / steps


@torch.no_grad()
def _predict_seconds(method: Method, images_BHWC: Tensor, accelerator: Accelerator) -> float:
    """Return the seconds per image of predicting."""
    method.network.eval()
    began = time.perf_counter()
    with accelerator.autocast():
        method.predict(images_BHWC)
    _wait_for(accelerator.device)
    return (time.perf_counter() - began) / len(images_BHWC)


class _Kept:
    """What autograd keeps: bytes in all, each tensor's memory once, and of the largest."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def add(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    @property
    def largest(self) -> int:
        return max(self._sizes.values(), default=0)


@contextmanager
def _kept() -> Iterator[_Kept]:
    kept = _Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        yield kept


def _fixed_bytes(method: Method, optimizer: torch.optim.Optimizer, config: Config) -> int:
    """Return the bytes of weights, gradients, the optimiser's state and the average."""
    weights = [*method.network.parameters(), *method.network.buffers()]
    gradients = [p for p in method.network.parameters() if p.requires_grad]
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    averages = weights if config.optim.ema is not None else []
    return sum(tensor.nbytes for tensor in (*weights, *gradients, *state, *averages))


def _resident_bytes() -> int:
    """Return the memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        method = method_class(config, dataset.train_counts)
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
    power = 1 << (share.bit_length() - 1)
    if power >= 2 * plan.world_size * parts:
        yield f"--input.batch_size {power}", estimate.memory(power // plan.world_size // parts)
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
    epochs = min(optim.epochs, 1 + int((budget - first) / another))
    warmup = round(optim.warmup_epochs * epochs / optim.epochs)
    return replace(config, optim=replace(optim, epochs=epochs, warmup_epochs=warmup))


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
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
