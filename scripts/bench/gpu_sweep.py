"""DALI's settings on an NVIDIA GPU, swept by `bench_pipeline.py --sweep-gpu`: both streams of photographs.

First how images are decoded: the window alone (region of interest) or the whole image, the share of the hardware JPEG
decoder, the batch. Then, with the best of those, CPU threads and batches decoded ahead. Nothing is drawn or read while
the clock runs.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from bench.pipeline_ours import make_plan, prepared_feeds
from pipeline.dali_loader import build_pipeline
from shards.errors import UserError
from shards.progress import say

SECONDS = 2.0
UNCOUNTED_STEPS = 10


@dataclass(frozen=True)
class Setting:
    """One point of the sweep."""

    decode: Literal["window", "whole"] = "window"
    hw_decoder_load: float = 0.65  # DALI's default
    batch: int = 64
    threads: int = 4
    decoded_ahead: int = 2


HOW: tuple[Literal["window", "whole"], ...] = ("window", "whole")
DECODING = [
    Setting(decode, load, batch) for decode, load, batch in product(HOW, (0.65, 0.7, 0.75, 0.8, 0.85, 0.9), (64, 256))
]


def running_ahead(best: Setting) -> list[Setting]:
    """Return what is swept in the second place."""
    return [
        replace(best, threads=threads, decoded_ahead=ahead) for threads, ahead in product((1, 2, 3, 4, 6, 8), (2, 3))
    ]


def require_gpu() -> None:
    """Raise UserError where there is no GPU."""
    if not torch.cuda.is_available():
        raise UserError("torch sees no NVIDIA GPU, which --sweep-gpu and --device cuda need; leave them out")


def sweep(measure: Callable[[Setting], float]) -> list[dict[str, Any]]:
    """Measure both sets of settings; return a row per setting with its `images_per_second`, None where it failed."""
    rows: list[dict[str, Any]] = []

    def take(settings: list[Setting]) -> Setting:
        rates: list[tuple[float, int, Setting]] = []
        for setting in settings:
            try:
                rate, row = measure(setting), asdict(setting)
            except RuntimeError as error:  # a setting that this GPU does not know
                rows.append(asdict(setting) | {"images_per_second": None, "error": str(error).splitlines()[0]})
                say(f"{setting}: {rows[-1]['error']}")
                continue
            rates.append((rate, len(rates), setting))
            rows.append(row | {"images_per_second": rate})
            say(f"{setting}: {rate:,.0f} images/s")
        if not rates:
            raise UserError(f"none of {len(settings)} settings ran on this GPU: {rows[-1]['error']}")
        return max(rates)[2]

    take(running_ahead(take(DECODING)))
    return rows


def measured(folder: Path) -> Callable[[Setting], float]:
    """Return a function from a setting to images per second, both streams counted, of the dataset in a folder."""

    def measure(setting: Setting) -> float:
        plan = make_plan(folder, "photos", setting.batch)
        pipelines = [
            build_pipeline(
                feed,
                recipe,
                setting.batch,
                plan.image_size,
                setting.threads,
                torch.cuda.current_device(),
                decode=setting.decode,
                decoded_ahead=setting.decoded_ahead,
                hw_decoder_load=setting.hw_decoder_load,
            )
            for feed, recipe in zip(prepared_feeds(plan), plan.recipes, strict=True)
        ]
        steps = _steps(pipelines)
        for _ in range(UNCOUNTED_STEPS):
            next(steps)
        torch.cuda.synchronize()
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            images += next(steps)
        torch.cuda.synchronize()
        return images / (time.perf_counter() - start)

    return measure


def _steps(pipelines: list[Any]) -> Iterator[int]:
    for pipeline in pipelines:
        pipeline.schedule_run()  # the first run fills the queue
    while True:
        images = 0
        for pipeline in pipelines:
            (pictures,) = pipeline.share_outputs(cuda_stream=torch.cuda.current_stream())
            images += len(torch.from_dlpack(pictures.as_tensor()))
            pipeline.release_outputs()
            pipeline.schedule_run()
        yield images


def markdown(rows: list[dict[str, Any]], machine: str) -> str:
    """Return rows as a table, the fastest first."""
    keys = ("decode", "hw_decoder_load", "batch", "threads", "decoded_ahead", "images_per_second")
    lines = [
        f"# DALI's settings on {machine}",
        "",
        "| " + " | ".join(key.replace("_", " ") for key in keys) + " |",
        "| " + " | ".join("---" for _ in keys) + " |",
    ]
    for row in sorted(rows, key=lambda row: -(row["images_per_second"] or 0)):
        rate = row["images_per_second"]
        shown = f"{rate:,.0f}" if rate else row["error"]
        lines.append("| " + " | ".join([*(str(row[key]) for key in keys[:-1]), shown]) + " |")
    return "\n".join(lines) + "\n"
