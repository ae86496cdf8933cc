"""What a run will take: parameters, memory and time, measured on a few steps before it begins.

    a network of its own ── a few images of each stream ── forward, backward, optimiser, on a clock
                                     │
         bytes kept for the backward pass, per image          seconds, per image
                                     │
    memory = weights, gradients, optimiser + images × bytes      time = steps × images × seconds + evaluations

Nothing of what is measured is used afterwards, so that the run itself gives the same bits with or without it. Large
batches are measured in part: what does not fit the memory is found out before it is tried.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.batch import Loader, Shown
from pipeline.budget import free_memory
from pipeline.plan import TrainPlan
from shards.index import Dataset
from train.engine.config import Config
from train.engine.evaluation import test_split
from train.engine.loop import prepare_network
from train.engine.method import Method, Progress
from train.engine.optimisers import make_optimizer

# Images per stream of the first step, which shows what more of them would need.
FIRST_IMAGES = 4
# A step that takes less is measured again with more images; and how long measuring may take in all, in seconds.
LONG_STEP, LONGEST = 0.5, 6.0
# A run that takes less, in seconds, is not worth measuring more than two steps of a few images.
SHORT = 30.0
# Buffers that the backward pass fills beside what was kept for it, in sizes of the largest tensor that was kept.
BUFFERS = 3
# What allocators leave unused between tensors: read off processes (three ResNets, float32, CPU), as a factor.
GAPS = 1.2


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
        process_bytes: what the process holds beside these, libraries for the most part.
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
    held = resident_bytes()
    method.network.to(device)
    # Processes measure each on its own, and compiling takes longer than measuring.
    prepare_network(method.network, replace(config.loop, sync_batch_norm=False, compile=False))
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
        image_bytes = (kept.bytes + BUFFERS * kept.largest) * GAPS / images
        held = max(held, resident_bytes() - fixed)  # libraries that the first step loads
        seconds: list[float] = []
        left = LONGEST if not load else 10 * LONGEST
        of_run = config.optim.epochs * plan.steps_per_epoch * config.optim.accumulate
        while not seconds or (len(seconds) < steps and left > 0):
            took = step(images)
            left -= took
            if not load and took * part / images * of_run < SHORT:
                seconds = [took]
                break
            larger = min(part, 2 * images * max(1, int(LONG_STEP / took / 2)))
            room = fixed + image_bytes * larger < free_memory(device) / 2
            if took < LONG_STEP and larger > images and room and left > 0:
                images, seconds = larger, []  # too short for the clock, or not yet the whole
                left -= step(images)  # the first one of a size finds its kernels
            else:
                seconds.append(took)
        loading = _loading_seconds(loader, steps) if load else 0.0
    loader.faults.take()  # what was drawn here will be drawn again
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


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
