"""How fast both streams are loaded, beside what else one could use: photographs of about 300x200, and 32x32 pictures.

    .venv/bin/python scripts/bench_pipeline.py --json FILE
    .venv/bin/python scripts/bench_pipeline.py --json FILE --sweep-gpu      DALI's settings on an NVIDIA GPU

Per step every contestant delivers a uniform and a reversed batch of the same images: 64 photographs per stream, random
resized crops to 224, mirrored or not; or 128 small pictures, padded by 4, cropped, mirrored or not. Ours are uint8 (the
network normalises), the peers' are what their standard recipe gives: normalised floats, FFCV's uint8 too. Each has two
workers, and runs in a process of its own; peers in environments that are made
for them with uv and thrown away. The bars are meant for two cores: begin the command with `taskset -c 0,1` where there
are more. FFCV is compiled for it, which takes pkg-config and the headers of OpenCV and libturbojpeg (on Debian
libopencv-dev and libturbojpeg0-dev); what does not install is skipped, with the reason.

The rule: a contestant first takes an epoch's steps, for warmth. Then all take turns for some rounds. While one has its
turn the others are stopped by a signal, so that nobody prefetches in another's time; a turn begins with some steps that
are not counted, so that neither full queues nor an empty pipeline are. Ratios are medians over rounds of the ratio
within a round.
"""

import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from inspect import getdoc
from pathlib import Path
from typing import Any, Literal

import torch

from bench import gpu_sweep
from bench.common import ROOT, header, peer_environments, write_results
from bench.loader_process import Load, LoaderError, LoaderProcess
from bench.pipeline_data import make_data, make_index
from bench.pipeline_ours import CONTESTANTS, OURS, make_plan
from bench.pipeline_peers import BATCH, PEERS
from shards.cli import run_commands
from shards.errors import UserError
from shards.progress import say

UNCOUNTED_STEPS = 8  # at the start of a turn; more than any contestant prefetches
LONG_BATCH = {"photos": 16, "small": 128}
INDEX_STEP = 512  # images per stream of a step whose ids are timed


@dataclass(frozen=True)
class Bar:
    """How many times a peer's images per second one of ours must reach."""

    data: str
    ours: str
    peer: str
    times: float


BARS = (
    Bar("photos", "dali", "papers", 4),
    Bar("photos", "dali", "two-samplers", 3),
    Bar("photos", "dali", "webdataset", 3),
    Bar("photos", "dali", "mosaicml", 3),
    Bar("photos", "dali", "ffcv", 1.2),
    Bar("photos", "dali", "decode-only", 0.5),
    Bar("photos", "dali", "decode-only-simplejpeg", 0.5),
    Bar("small", "resident", "papers", 20),
    Bar("small", "dali", "papers", 4),
)
MOST_GROWTH_MB = 16.0  # memory between a tenth of the steps and all of them
MOST_FIRST_BATCH_SECONDS = 3.0
MOST_IDS_MS = 0.2
HERE = {"PYTHONPATH": f"{ROOT}:{ROOT}/scripts"}  # this checkout is imported, whichever one is installed
OUTCOME = {True: "met", False: "missed", None: "not measured"}


def bench(
    json: Path = Path("bench_pipeline.json"),
    data: Literal["photos", "small", "both"] = "both",
    rounds: int = 5,
    steps: int | None = None,
    seconds: float = 3.0,
    device: Literal["cpu", "cuda"] = "cpu",
    only: str = "",
    images: int = 2000,
    long_steps: int = 2000,
    index_samples: int = 437_513,
    sweep_gpu: bool = False,
) -> None:
    """Measure and write the results.

    Args:
        json: the file to write.
        data: which pictures.
        rounds: how often everything is measured, by turns.
        steps: steps of a turn; if not given, as many as take `seconds`.
        seconds: how long a turn is to take.
        device: where batches shall lie.
        only: contestants, separated by commas; all if not given.
        images: photographs to make; of small pictures there are five times as many.
        long_steps: steps over which memory is watched; 0 for none.
        index_samples: samples of the large index; 0 for none.
        sweep_gpu: sweep the settings of DALI's GPU decoding instead.
    """
    known = [*CONTESTANTS, *PEERS]
    names = only.split(",") if only else known
    for name in names:
        if name not in known:
            raise UserError(f"--only {name!r} is no contestant; choose from: {', '.join(known)}")
    for option, value, least in (("--rounds", rounds, 1), ("--steps", steps, 1), ("--images", images, 60)):
        if value is not None and value < least:
            raise UserError(f"{option} {value} is too small; give at least {least}")
    if sweep_gpu or device == "cuda":
        gpu_sweep.require_gpu()
    versions = {package: version(package) for package in ("torch", "torchvision", "nvidia-dali-cuda130")}
    results = header(**versions, vector_width=torch.backends.cpu.get_cpu_capability())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if sweep_gpu:
            write_results(json, results | gpu_results(folder, images, json.with_suffix(".md")))
            return
        chosen: list[Literal["photos", "small"]] = ["photos", "small"] if data == "both" else [data]
        results |= {"device": device, "skipped": {}}
        peers = {name: PEERS[name][1] for name in names if name in PEERS}
        pythons = peer_environments(folder, peers, results["skipped"])
        for kind in chosen:
            made = make_data(folder / kind, kind, images if kind == "photos" else 5 * images)
            commands = {
                name: command(name, folder / kind, kind, device, python=pythons.get(name))
                for name in names
                if name in CONTESTANTS or name in pythons
            }
            epoch = made["images"] // BATCH[kind] + 1
            raced = race(kind, commands, epoch, rounds, steps, seconds, results["skipped"])
            results[kind] = made | raced
            if long_steps:
                kinds = [name for name in OURS if name in raced["contestants"]]
                results[kind]["memory"] = watch_memory(folder / kind, kind, device, long_steps, kinds)
        if index_samples:
            make_index(folder / "index", index_samples)
            results["index"] = measure_index(folder / "index", device, [name for name in OURS if name in names])
        results["bars"] = judge(results)
        write_results(json, results)
        for bar in results["bars"]:
            shown = "" if bar["measured"] is None else f" ({bar['measured']:.3g})"
            say(f"{bar['bar']}: {OUTCOME[bar['met']]}{shown}")


def gpu_results(folder: Path, images: int, table: Path) -> dict[str, Any]:
    """Sweep the settings of DALI's GPU decoding; write the table beside the results that are returned."""
    made = make_data(folder, "photos", images)
    rows = gpu_sweep.sweep(gpu_sweep.measured(folder))
    gpu = torch.cuda.get_device_name()
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(gpu_sweep.markdown(rows, gpu))
    return {"gpu": gpu, **made, "settings": rows}


def command(
    name: str, folder: Path, data: str, device: str, batch: int | None = None, python: Path | None = None
) -> list[str]:
    """The command that runs a contestant: a peer with its own Python, ours and DALI with this one."""
    script = "pipeline_peers.py" if name in PEERS else "pipeline_ours.py"
    words = [str(python or sys.executable), str(ROOT / "scripts/bench" / script), name, str(folder), data, device]
    return words if batch is None else [*words, str(batch)]


def what(name: str) -> str:
    """Return what a contestant does, as its docstring tells it."""
    function = PEERS[name][0] if name in PEERS else CONTESTANTS[name]
    return " ".join((getdoc(getattr(function, "func", function)) or "").split())


def race(
    data: str,
    commands: dict[str, list[str]],
    warm_steps: int,
    rounds: int,
    steps: int | None,
    seconds: float,
    skipped: dict[str, str],
) -> dict[str, Any]:
    """Let all take turns; return what each delivers, its rounds and their medians, and ratios of ours to each."""
    with ExitStack() as running:
        contestants: dict[str, LoaderProcess] = {}
        turns: dict[str, int] = {}
        loads: dict[str, list[dict[str, float]]] = {}

        def leave(name: str, error: LoaderError) -> None:
            say(f"{data}, {name}: skipped, {error}")
            skipped[f"{data}, {name}"] = str(error)
            if left := contestants.pop(name, None):
                left.close()  # or it would run on in the others' turns

        for name, words in commands.items():
            try:
                contestant = contestants[name] = running.enter_context(LoaderProcess(words, HERE))
                contestant.load(warm_steps)
                rate = contestant.load(UNCOUNTED_STEPS)
            except LoaderError as error:
                leave(name, error)
                continue
            contestant.stop()
            loads[name] = []
            turns[name] = steps or max(UNCOUNTED_STEPS, round(seconds * UNCOUNTED_STEPS / rate.seconds))
            say(f"{data}, {name}: {turns[name]} steps a turn, delivers {contestant.about['delivers'][0]}")
        for i in range(rounds):
            for name, contestant in list(contestants.items()):
                contestant.go_on()
                try:
                    contestant.load(UNCOUNTED_STEPS)
                    load = contestant.load(turns[name])
                except LoaderError as error:
                    leave(name, error)
                    continue
                memory_mb = contestant.memory_mb()
                contestant.stop()
                loads[name].append(turn := described(load) | {"memory_mb": memory_mb})
                say(
                    f"{data}, round {i + 1}, {name}: {turn['images_per_second']:,.0f} images/s,"
                    f" {turn['cpu_us_per_image']:,.1f} CPU µs per image, {memory_mb:,.0f} MB"
                )
        results = {
            name: {"what": what(name)} | contestant.about | medians(loads[name])
            for name, contestant in contestants.items()
        }
    ratios = {
        one: {
            other: {
                "wall": ratio(results, one, other, "images_per_second"),
                "cpu": ratio(results, other, one, "cpu_us_per_image"),
            }
            for other in results
            if other != one
        }
        for one in OURS
        if one in results
    }
    return {"contestants": results, "ratios": ratios}


def described(load: Load) -> dict[str, float]:
    """What was measured, and the two rates that count."""
    return {
        "images_per_second": load.images / load.seconds,
        "cpu_us_per_image": load.cpu_seconds / load.images * 1e6,
        **asdict(load),
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Return medians of the rates over rounds, and the rounds."""
    keys = ("images_per_second", "cpu_us_per_image")
    return {key: statistics.median(turn[key] for turn in rounds) for key in keys} | {"rounds": rounds}


def ratio(results: dict[str, dict[str, Any]], one: str, other: str, key: str) -> float | None:
    """Return the median over rounds of one's figure over the other's in the same round.

    None where a turn was too short for the clock of CPU time, which ticks a hundred times a second.
    """
    pairs = list(zip(results[one]["rounds"], results[other]["rounds"], strict=True))
    if not all(b[key] for _, b in pairs):
        return None
    return statistics.median(a[key] / b[key] for a, b in pairs)


def watch_memory(folder: Path, data: str, device: str, steps: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Return each of our loaders' memory after a tenth of the steps and after all of them, in MB."""
    found = {}
    for kind in kinds:
        with LoaderProcess(command(kind, folder, data, device, LONG_BATCH[data]), HERE) as loader:
            loader.load(steps // 10)
            early = loader.memory_mb()
            loader.load(steps - steps // 10)
            late = loader.memory_mb()
        found[kind] = {"steps": steps, "early_mb": early, "late_mb": late, "growth_mb": late - early}
        say(f"{data}, {kind}: {early:,.1f} MB after {steps // 10} steps, {late:,.1f} MB after {steps}")
    return found


def measure_index(folder: Path, device: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Return how long the first batch takes in a fresh process, and how long a step's ids take."""
    first = {}
    for kind in kinds:
        begun = time.perf_counter()
        try:
            with LoaderProcess(command(kind, folder, "photos", device), HERE) as loader:
                first[kind] = {
                    "seconds": loader.about["first_step_seconds"],
                    "with_imports": time.perf_counter() - begun,
                }
        except LoaderError as error:
            first[kind] = {"skipped": str(error)}
        say(f"large index, {kind}: first batch {first[kind]}")
    plan = make_plan(folder, "photos", INDEX_STEP)
    steps = plan.steps_per_epoch

    def ms_per_step(take: Any) -> float:
        take(0)  # an epoch's permutation is made once
        begun = time.process_time()
        for step in range(steps):
            take(step)
        return (time.process_time() - begun) / steps * 1e3

    begun = time.process_time()
    plan.global_ids(plan.specs[0], 1, 0)
    permutation_ms = (time.process_time() - begun) * 1e3
    ids_ms = ms_per_step(lambda step: [plan.global_ids(spec, 0, step) for spec in plan.specs])
    draws_ms = ms_per_step(plan.draws)
    say(f"ids {ids_ms:.3f} ms per step, with windows {draws_ms:.3f} ms, an epoch's permutation {permutation_ms:.1f} ms")
    return {
        "samples": len(plan.split),
        "classes": len(plan.split.class_counts),
        "step": plan.batch_size,
        "first_batch": first,
        "ids_ms": ids_ms,
        "draws_ms": draws_ms,
        "permutation_ms": permutation_ms,
    }


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Hold results against the bars; what was not measured is neither met nor missed."""
    judged: list[dict[str, Any]] = []

    def add(bar: str, measured: float | None, met: bool | None) -> None:
        judged.append({"bar": bar, "measured": measured, "met": met})

    for bar in BARS:
        found = results.get(bar.data, {}).get("ratios", {}).get(bar.ours, {}).get(bar.peer)
        wall = found and found["wall"]
        met = None if wall is None else wall >= bar.times
        add(f"{bar.data}: {bar.ours} at least {bar.times:g} times {bar.peer}", wall, met)
        judged[-1]["by_cpu_time"] = found and found["cpu"]
    for data in ("photos", "small"):
        for kind, memory in results.get(data, {}).get("memory", {}).items():
            growth = memory["growth_mb"]
            add(f"{data}: {kind} grows by at most {MOST_GROWTH_MB:g} MB", growth, growth <= MOST_GROWTH_MB)
    index = results.get("index", {})
    for kind, first in index.get("first_batch", {}).items():
        taken = first.get("seconds")
        met = None if taken is None else taken <= MOST_FIRST_BATCH_SECONDS
        add(f"large index: {kind}'s first batch within {MOST_FIRST_BATCH_SECONDS:g} s", taken, met)
    ids_ms = index.get("ids_ms")
    met = None if ids_ms is None else ids_ms <= MOST_IDS_MS
    add(f"large index: a step's ids within {MOST_IDS_MS:g} ms", ids_ms, met)
    return judged


if __name__ == "__main__":
    # A plain SIGTERM would leave contestants behind, stopped for ever; leaving by an exception ends them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_commands("scripts/bench_pipeline.py", bench)
