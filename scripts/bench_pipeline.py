"""How fast both streams are loaded, beside what else one could use: photographs of about 300x200, and 32x32 pictures.

    .venv/bin/python scripts/bench_pipeline.py --json FILE
    .venv/bin/python scripts/bench_pipeline.py --json FILE --sweep-gpu      DALI's settings on an NVIDIA GPU

Per step every contestant delivers a uniform and a reversed batch of the same images: 64 photographs per stream, random
resized crops to 224, mirrored or not; or 128 small pictures, padded by 4, cropped, mirrored or not. Ours are uint8 (the
network normalises), the peers' are what their standard recipe gives: normalised floats. Each has two workers, and runs
in a process of its own; peers in environments that are made for them with uv and thrown away.

The rule: a contestant first takes an epoch's steps, for warmth. Then all take turns for some rounds. While one has its
turn the others are stopped by a signal, so that nobody prefetches in another's time; a turn begins with some steps that
are not counted, so that neither full queues nor an empty pipeline are. Ratios are medians over rounds of the ratio
within a round.
"""

import json as jsons
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from bench_common import ROOT, commit, environment, make_environment, photographs, write_results
from loader_process import Load, LoaderError, LoaderProcess
from pipeline_ours import CONTESTANTS, make_plan
from pipeline_peers import BATCH, PEERS

from shards.build import build
from shards.cli import run_commands
from shards.errors import UserError
from shards.index import MANIFEST
from shards.profiles import profile_counts
from shards.progress import say

OURS = ("dali", "resident", "torch")
CLASSES, IMBALANCE_FACTOR = 20, 100
QUALITY = 87  # of the photographs
UNCOUNTED_STEPS = 8  # at the start of a turn; more than any contestant prefetches
LONG_BATCH = {"photos": 16, "small": 128}
INDEX_CLASSES, INDEX_STEP = 8142, 512


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
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if sweep_gpu:
            from gpu_sweep import sweep

            write_results(json, sweep(folder, make_data(folder, "photos", images)))
            return
        chosen: list[Literal["photos", "small"]] = ["photos", "small"] if data == "both" else [data]
        results: dict[str, Any] = {
            "command": " ".join(sys.orig_argv[1:]),
            "commit": commit(),
            "environment": environment() | {name: version(name) for name in ("torch", "torchvision")},
            "device": device,
            "skipped": {},
        }
        pythons = peer_environments(folder, [name for name in names if name in PEERS], results["skipped"])
        for kind in chosen:
            made = make_data(folder / kind, kind, images if kind == "photos" else 5 * images)
            commands = {
                name: [
                    str(pythons[name]),
                    str(ROOT / "scripts/pipeline_peers.py"),
                    name,
                    str(folder / kind),
                    kind,
                    device,
                ]
                if name in PEERS
                else own_command(name, folder / kind, kind, device)
                for name in names
                if name in CONTESTANTS or name in pythons
            }
            epoch = made["images"] // BATCH[kind] + 1
            raced = race(kind, commands, epoch, rounds, steps, seconds, results["skipped"])
            results[kind] = made | raced
            if long_steps:
                results[kind]["memory"] = watch_memory(
                    folder / kind, kind, device, long_steps, [n for n in OURS if n in raced["contestants"]]
                )
        if index_samples:
            make_index(folder / "index", index_samples)
            results["index"] = measure_index(folder / "index", device, [name for name in OURS if name in names])
        results["bars"] = judge(results)
        write_results(json, results)
        for bar in results["bars"]:
            say(f"{bar['bar']}: {bar['measured']}, {OUTCOME[bar['met']]}")


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
            picture.save(path, quality=QUALITY)
            sizes.append(path.stat().st_size)
    build("folder", source=folder / "source", out=folder / "dataset", test_fraction=0, val_fraction=0, workers=1)
    return {"images": int(counts.sum()), "mean_bytes": float(np.mean(sizes)), "batch_per_stream": BATCH[data]}


def _about_300x200(generator: np.random.Generator) -> tuple[int, int]:
    return int(generator.integers(260, 341)), int(generator.integers(170, 231))


def peer_environments(folder: Path, peers: Sequence[str], skipped: dict[str, str]) -> dict[str, Path]:
    """Make an environment per set of packages; return each peer's Python. What does not install is skipped."""
    pythons: dict[str, Path] = {}
    made: dict[tuple[str, ...], Path | str] = {}
    for peer in peers:
        packages = tuple(PEERS[peer][1])
        if packages not in made:
            say(f"making an environment with {', '.join(packages)}")
            try:
                made[packages] = make_environment(folder / f"env-{peer}", list(packages))
            except subprocess.CalledProcessError as error:
                made[packages] = f"does not install: {error.stderr.strip().splitlines()[-1].strip()}"
        python = made[packages]
        if isinstance(python, Path):
            pythons[peer] = python
        else:
            skipped[peer] = python
    return pythons


def own_command(name: str, folder: Path, data: str, device: str, batch: int | None = None) -> list[str]:
    """The command of a contestant of pipeline_ours.py."""
    command = [sys.executable, str(ROOT / "scripts/pipeline_ours.py"), name, str(folder), data, device]
    return command if batch is None else [*command, str(batch)]


def start(command: list[str]) -> LoaderProcess:
    """Start a contestant; this checkout is imported, whichever one is installed."""
    return LoaderProcess(command, {"PYTHONPATH": str(ROOT)} if "pipeline_ours.py" in command[1] else None)


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
            contestants.pop(name, None)

        for name, command in commands.items():
            try:
                contestant = running.enter_context(start(command))
                contestant.load(warm_steps)
                rate = contestant.load(UNCOUNTED_STEPS)
            except LoaderError as error:
                leave(name, error)
                continue
            contestant.stop()
            contestants[name], loads[name] = contestant, []
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
        results = {name: contestant.about | medians(loads[name]) for name, contestant in contestants.items()}
    ratios = {
        one: {
            other: {"wall": ratio(results, one, other, "images_per_second"),
                    "cpu": ratio(results, other, one, "cpu_us_per_image")}
            for other in results if other != one
        }
        for one in OURS if one in results
    }  # fmt: skip
    return {"contestants": results, "ratios": ratios}


def described(load: Load) -> dict[str, float]:
    """What was measured, and the two rates that count."""
    return {
        "images_per_second": load.images / load.seconds,
        "cpu_us_per_image": load.cpu_seconds / load.images * 1e6,
        **load.as_dict(),
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
        with start(own_command(kind, folder, data, device, LONG_BATCH[data])) as loader:
            loader.load(steps // 10)
            early = loader.memory_mb()
            loader.load(steps - steps // 10)
            late = loader.memory_mb()
        found[kind] = {"steps": steps, "early_mb": early, "late_mb": late, "growth_mb": late - early}
        say(f"{data}, {kind}: {early:,.1f} MB after {steps // 10} steps, {late:,.1f} MB after {steps}")
    return found


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
    manifest = jsons.loads((root / MANIFEST).read_text())
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
    (root / MANIFEST).write_text(jsons.dumps(manifest))


def measure_index(folder: Path, device: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Return how long the first batch takes in a fresh process, and how long a step's ids take."""
    first = {}
    for kind in kinds:
        begun = time.perf_counter()
        try:
            with start(own_command(kind, folder, "photos", device)) as loader:
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
    judged = []

    def add(bar: str, measured: float | None, met: bool | None) -> None:
        judged.append({"bar": bar, "measured": measured, "met": met})

    for bar in BARS:
        found = results.get(bar.data, {}).get("ratios", {}).get(bar.ours, {}).get(bar.peer)
        wall = found and found["wall"]
        add(f"{bar.data}: {bar.ours} at least {bar.times:g} times {bar.peer}", wall, wall and wall >= bar.times)
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
    add(
        f"large index: a step's ids within {MOST_IDS_MS:g} ms",
        ids_ms,
        None if ids_ms is None else ids_ms <= MOST_IDS_MS,
    )
    return judged


if __name__ == "__main__":
    run_commands("scripts/bench_pipeline.py", bench)
