"""How fast BBN's step is: beside two separate passes, as the papers' code has it, and beside a plain network.

    .venv/bin/python scripts/bench_train.py --json FILE [--device cuda] [--backbones '["resnet50"]']

Measured by turns, a trial of each in every round, all on 2B images a step:

    bbn              the bilateral step as `train/bbn.py` runs it
    bbn, one pass    the trunk once over both streams; on a GPU that is what `bbn` does
    two passes       the trunk once per stream
    plain            one branch, one stream of 2B images
    timm             of timm's models, which are bilateral by a cut of ours: the model itself on 2B images
    bbn, loader      `bbn` on JPEGs or PNGs that a loader decodes meanwhile; the others find their batches in memory

A step is forward, loss, backward and SGD. Ratios are taken within each round; their median counts. Peak memory on a
CPU is that of a process of its own, which takes two steps.
"""

import multiprocessing
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.common import header, write_photographs, write_results
from pipeline.batch import Loader
from pipeline.kinds import LoaderKind
from pipeline.loader import open_loader
from pipeline.plan import Stream, TrainPlan
from shards.build import build
from shards.cli import run_commands
from shards.errors import UserError
from shards.index import open_dataset
from shards.progress import say
from train.bbn import bbn_loss
from train.engine.config import Loop
from train.engine.loop import prepare_network
from train.networks.backbones import IMAGENET_MEAN_STD, Normalize
from train.networks.batch_norm import split_statistics
from train.networks.networks import BilateralNetwork, build_network
from train.networks.timm_models import PREFIX

CLASSES = 100
ALPHA = 0.5
WARM_STEPS = 3  # before each trial; they also empty a loader's queue, which filled while others were measured
WAYS = ("bbn", "bbn, one pass", "two passes", "plain", "bbn, loader")
TIMM_WAYS = ("bbn", "plain", "timm")
# How the processes begin whose peak memory is measured: one that is forked would hold what this one does.
START = "spawn"
NOISE = 0.02  # where the bilateral step chooses two passes, the clock alone decides which of the two is slower


@dataclass(frozen=True)
class Case:
    """What is trained: `batch` images of `size` pixels per stream."""

    backbone: str
    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.backbone}, {self.size}x{self.size}, {self.batch}+{self.batch}"

    @property
    def ways(self) -> tuple[str, ...]:
        """What is measured of it."""
        return TIMM_WAYS if self.backbone.startswith(PREFIX) else WAYS


@dataclass(frozen=True)
class Mode:
    """How it is computed; `threads` are the CPU's."""

    precision: Literal["float32", "tf32", "bf16", "fp16"] = "float32"
    channels_last: bool = True
    compile: bool = False
    threads: int = 1

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "channels first"
        return (
            f"{self.precision}, {layout}{', compiled' * self.compile}, {self.threads} thread{'s' * (self.threads > 1)}"
        )

    def compiles(self, way: str) -> bool:
        """Return whether this way is measured where it is compiled, too; the papers' is not."""
        return way not in ("bbn, one pass", "two passes")


CASES = {
    "cpu": [
        Case("resnet32", 32, 64),
        Case("resnet50", 96, 4),
        Case("timm/convnext_tiny", 224, 8),
        Case("timm/vit_small_patch16_224", 224, 8),
    ],
    "cuda": [Case("resnet32", 32, 128), Case("resnet50", 224, 128)],
}
PAPERS_MODE = Mode(channels_last=False)
MODES = {
    "cpu": [Mode(threads=1), Mode(threads=2)],
    "cuda": [
        PAPERS_MODE,
        Mode("tf32", channels_last=False),
        Mode("tf32"),
        Mode("bf16"),
        Mode("fp16"),
        Mode("bf16", compile=True),
    ],
}


def bench(
    json: Path = Path("bench_train.json"),
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 7,
    seconds: float = 2.0,
    loader: LoaderKind = "auto",
    loader_threads: int = 2,
    images: int = 4000,
    backbones: list[str] | None = None,
) -> None:
    """Measure and write the results.

    Args:
        json: the file to write.
        device: cpu or cuda.
        rounds: how often everything is measured, by turns.
        seconds: how long each trial lasts at least.
        loader: the loader of `bbn, loader`.
        loader_threads: its threads per stream.
        images: how many it chooses from.
        backbones: whose cases are measured; all of the device's where none is named.
    """
    cases = [case for case in CASES[device] if backbones is None or case.backbone in backbones]
    if not cases:
        known = ", ".join(case.backbone for case in CASES[device])
        raise UserError(f"backbones={backbones} names no case of {device}; there are: {known}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda needs an NVIDIA GPU and there is none; use --device cpu")
    loading = Loading(loader, loader_threads, images)
    results = measure(cases, MODES[device], device, rounds, seconds, loading)
    write_results(json, results)
    for bar in results["bars"]:
        say(f"{bar['what']}: {bar['measured']:.3f} ({bar['bar']}): {'reached' if bar['reached'] else 'MISSED'}")


@dataclass(frozen=True)
class Loading:
    """Where `bbn, loader` has its batches from."""

    kind: LoaderKind
    threads: int
    images: int


def measure(
    cases: list[Case], modes: list[Mode], device: str, rounds: int, seconds: float, loading: Loading
) -> dict[str, Any]:
    """Measure every case in every mode; return what the JSON file holds."""
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            say(f"{case}: making {loading.images} images")
            plan = make_plan(Path(folder), case, loading.images)
            with open_loader(plan, loading.kind, device, loading.threads) as loader:
                measured[str(case)] = measure_case(case, modes, device, rounds, seconds, loader, skipped)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return header(gpu=gpu, torch=torch.__version__) | {
        "rounds": rounds,
        "seconds": seconds,
        "loading": asdict(loading),
        "results": measured,
        "ratios": {case: compare(modes) for case, modes in measured.items()},
        "skipped": skipped,
        "bars": list(judge(measured, device)),
        "process_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure_case(
    case: Case, modes: list[Mode], device: str, rounds: int, seconds: float, loader: Loader, skipped: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Measure one case by turns; return figures by mode and way, and note in `skipped` what could not run."""
    contenders = {}
    for mode in modes:
        for way in case.ways:
            if (way == "bbn, one pass" and device == "cuda") or (mode.compile and not mode.compiles(way)):
                continue
            try:
                contenders[mode, way] = Contender(case, mode, way, device, loader)
                contenders[mode, way].trial(0.0)  # compiles, and lets libraries choose their kernels
            except RuntimeError as error:  # too little memory, or no compiler
                skipped[f"{case}: {mode}: {way}"] = str(error).strip().splitlines()[0]
                contenders.pop((mode, way), None)
    peaks = {}
    if device == "cpu":
        with multiprocessing.get_context(START).Pool(1, maxtasksperchild=1) as pool:  # a process for each
            peaks = {key: pool.apply(peak_mb, (case, *key)) for key in contenders if key[1] != "bbn, loader"}
    runs: dict[tuple[Mode, str], list[dict[str, float]]] = {key: [] for key in contenders}
    for number in range(rounds):
        turn = number % len(contenders)  # nobody always comes after the same one
        for key in [*contenders][turn:] + [*contenders][:turn]:
            runs[key].append(contenders[key].trial(seconds))
        say(f"{case}: round {number + 1} of {rounds}")
    results: dict[str, dict[str, Any]] = {}
    for (mode, way), trials in runs.items():
        rates = [trial["images_per_second"] for trial in trials]
        figures = {"images_per_second": statistics.median(rates), "runs": rates}
        if device == "cuda":
            figures["peak_mb"] = max(trial["peak_mb"] for trial in trials)
        elif (mode, way) in peaks:
            figures["peak_mb"] = peaks[mode, way]
        results.setdefault(str(mode), {})[way] = figures
    return results


def peak_mb(case: Case, mode: Mode, way: str) -> float:
    """Return the peak memory of this process, in MB, once it has taken two steps; on a CPU, from memory."""
    torch.set_num_threads(mode.threads)
    Contender(case, mode, way, "cpu", None).step()
    # Not getrusage's maximum, which a process takes over from the one that started it.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


class Contender:
    """One way to train, with a network and an optimiser of its own."""

    def __init__(self, case: Case, mode: Mode, way: str, device: str, loader: Loader | None) -> None:
        torch.manual_seed(0)
        self.images_per_step, self.mode, self.device = 2 * case.batch, mode, device
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        self.network = _network(case, way).to(device)
        prepare_network(self.network, Loop(channels_last=mode.channels_last, compile=mode.compile))
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        self.scaler = torch.amp.GradScaler(device, enabled=mode.precision == "fp16")
        self.batches = _from_loader(loader) if way == "bbn, loader" and loader else _from_memory(case, device)
        self.loss = _LOSSES[way]
        self.step()  # makes the momentum
        self.own_bytes = torch.cuda.memory_allocated() - before if device == "cuda" else 0

    def step(self) -> None:
        """Do one step of training."""
        batch = next(self.batches)
        with self._autocast():
            loss = self.loss(self.network, *batch)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def trial(self, seconds: float) -> dict[str, float]:
        """Do steps for at least so many seconds; return images per second, and on a GPU the peak memory in MB."""
        torch.set_num_threads(self.mode.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.mode.precision == "tf32"
        for _ in range(WARM_STEPS):
            self.step()
        steps, took = 0, 0.0
        if self.device == "cuda":
            others_bytes = torch.cuda.memory_allocated() - self.own_bytes
            torch.cuda.reset_peak_memory_stats()
        start = self._now()
        while took < seconds or not steps:
            for _ in range(max(1, steps)):  # twice as many each time: looking at the clock waits for the GPU
                self.step()
            steps += max(1, steps)
            took = self._now() - start
        result = {"images_per_second": steps * self.images_per_step / took}
        if self.device == "cuda":
            result["peak_mb"] = (torch.cuda.max_memory_allocated() - others_bytes) / 2**20
        return result

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mode.precision)
        return torch.autocast(self.device, dtype) if dtype else nullcontext()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _network(case: Case, way: str) -> nn.Module:
    if way != "timm":
        kind: Literal["plain", "bilateral"] = "plain" if way == "plain" else "bilateral"
        return build_network(kind, case.backbone, CLASSES, image_size=case.size)
    import timm

    model = timm.create_model(case.backbone.removeprefix(PREFIX), num_classes=CLASSES)
    return nn.Sequential(Normalize(IMAGENET_MEAN_STD), model)


def bbn(network: BilateralNetwork, images_c: Tensor, images_r: Tensor, labels_c: Tensor, labels_r: Tensor) -> Tensor:
    """BBN's loss, as `train/bbn.py` has it."""
    logits_c_BC, logits_r_BC = network(images_c, images_r)
    return bbn_loss(ALPHA * logits_c_BC + (1 - ALPHA) * logits_r_BC, labels_c, labels_r, ALPHA)


def one_pass(
    network: BilateralNetwork, images_c: Tensor, images_r: Tensor, labels_c: Tensor, labels_r: Tensor
) -> Tensor:
    """The same with the trunk run once over both streams, whatever `forward` would choose."""
    with split_statistics(network.trunk, 2):
        maps_c, maps_r = network.trunk(network.normalize(torch.cat([images_c, images_r]))).chunk(2)
    return _branches_loss(network, maps_c, maps_r, labels_c, labels_r)


def two_passes(
    network: BilateralNetwork, images_c: Tensor, images_r: Tensor, labels_c: Tensor, labels_r: Tensor
) -> Tensor:
    """The same with the trunk run once per stream, as the papers' code does."""
    maps_c, maps_r = (network.trunk(network.normalize(images)) for images in (images_c, images_r))
    return _branches_loss(network, maps_c, maps_r, labels_c, labels_r)


def plain(network: nn.Module, images_c: Tensor, images_r: Tensor, labels_c: Tensor, labels_r: Tensor) -> Tensor:
    """Cross-entropy of a plain network on as many images."""
    return F.cross_entropy(network(torch.cat([images_c, images_r])), torch.cat([labels_c, labels_r]))


def _branches_loss(
    network: BilateralNetwork, maps_c: Tensor, maps_r: Tensor, labels_c: Tensor, labels_r: Tensor
) -> Tensor:
    features_c = network.conventional(maps_c).mean((2, 3), dtype=torch.float32)
    features_r = network.rebalancing(maps_r).mean((2, 3), dtype=torch.float32)
    logits = network.classifier(torch.cat([2 * ALPHA * features_c, 2 * (1 - ALPHA) * features_r], dim=1))
    return bbn_loss(logits, labels_c, labels_r, ALPHA)


_LOSSES: dict[str, Callable[..., Tensor]] = {
    "bbn": bbn,
    "bbn, one pass": one_pass,
    "two passes": two_passes,
    "plain": plain,
    "timm": plain,
    "bbn, loader": bbn,
}


def _from_memory(case: Case, device: str) -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, case.batch, case.size, case.size, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (2, case.batch), generator=generator)
    return repeat((*images.to(device), *labels.to(device)))


def _from_loader(loader: Loader) -> Iterator[tuple[Tensor, ...]]:
    for step in loader:
        uniform, reversed_ = step["uniform"], step["reversed"]
        yield uniform.images_BHWC, reversed_.images_BHWC, uniform.labels_B, reversed_.labels_B


def make_plan(folder: Path, case: Case, images: int) -> TrainPlan:
    """Make a dataset of photographs' windows and BBN's plan for it: 32x32 as PNG, larger ones 340x256 as JPEG."""
    small = case.size <= 64
    labels = (i % CLASSES for i in range(images))
    size = (32, 32) if small else (340, 256)
    write_photographs(folder / "source", labels, lambda _: size, "png" if small else "jpg")
    out = build("folder", source=folder / "source", out=folder / "data", test_fraction=0.0, val_fraction=0.0, workers=1)
    augment = "cifar" if small else "imagenet"
    streams = (Stream("uniform", q=1.0, augment=augment), Stream("reversed", q=-1.0, augment=augment))
    return TrainPlan(open_dataset(out).splits["train"], streams, case.batch, case.size, seed=0, epochs=1)


def compare(modes: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return how `bbn` compares with the other ways, in each mode of a case."""
    return {
        mode: {f"bbn over {way}": ratio(ways["bbn"], ways[way]) for way in ways if way != "bbn"}
        for mode, ways in modes.items()
        if "bbn" in ways
    }


def judge(measured: dict[str, dict[str, dict[str, Any]]], device: str) -> Iterator[dict[str, Any]]:
    """Yield each bar with what was measured."""
    for case, modes in measured.items():
        for mode, ratios in compare(modes).items():
            if "bbn over two passes" in ratios:
                found = ratios["bbn over two passes"]["median"]
                yield _bar(f"{case}: {mode}: bbn over two passes", f"at least {1 - NOISE}", found, found >= 1 - NOISE)
            if device == "cuda" and "bbn over bbn, loader" in ratios:
                found = 1 - 1 / ratios["bbn over bbn, loader"]["median"]
                yield _bar(f"{case}: {mode}: data loading's share of the step", "below 0.05", found, found < 0.05)
        papers_way = modes.get(str(PAPERS_MODE), {}).get("two passes")
        ours = {mode: ways["bbn"] for mode, ways in modes.items() if "bbn" in ways}
        if device == "cuda" and papers_way:
            best = max(ours, key=lambda mode: ours[mode]["images_per_second"])
            found = ratio(ours[best], papers_way)["median"]
            yield _bar(
                f"{case}: bbn ({best}) over two eager passes ({PAPERS_MODE})", "at least 1.5", found, found >= 1.5
            )


def ratio(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How many times the other's images per second, round by round."""
    ratios = [mine / theirs for mine, theirs in zip(one["runs"], other["runs"], strict=True)]
    return {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}


def _bar(what: str, bar: str, measured: float, reached: bool) -> dict[str, Any]:
    return {"what": what, "bar": bar, "measured": measured, "reached": reached}


if __name__ == "__main__":
    run_commands("scripts/bench_train.py", bench)
