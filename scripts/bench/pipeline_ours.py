"""The contestants of bench_pipeline.py that run in this project's environment: its loaders, and DALI by itself.

    python scripts/bench/pipeline_ours.py NAME FOLDER photos|small DEVICE

FOLDER holds `source`, a folder of images per class, and `dataset`, the shards that were built from it.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
from PIL import Image

from bench.loader_process import Steps, serve
from bench.pipeline_peers import BATCH, MEAN, SIZE, STD
from pipeline.kinds import LoaderKind
from pipeline.loader import open_loader
from pipeline.plan import Stream, TrainPlan
from pipeline.reader import ShardReader
from pipeline.sampling import class_probabilities
from shards.errors import UserError
from shards.index import Split, open_dataset

OURS: tuple[LoaderKind, ...] = ("dali", "resident", "torch")
RECIPE = {"photos": "imagenet", "small": "cifar"}
THREADS = 1  # per stream: like the peers, two workers in all decode
PREPARED = 32  # steps that are drawn beforehand where drawing shall not count


def make_plan(folder: Path, data: str, batch: int | None = None) -> TrainPlan:
    """The plan that BBN would train with."""
    streams = (Stream("uniform", 1.0, RECIPE[data]), Stream("reversed", -1.0, RECIPE[data]))
    split = open_dataset(folder / "dataset").splits["train"]
    return TrainPlan(split, streams, batch or BATCH[data], SIZE[data], seed=0, epochs=90)


def ours(kind: LoaderKind, folder: Path, data: str, device: str, batch: int | None = None) -> Steps:
    """One of this project's loaders."""
    threads = 2 * THREADS if kind == "torch" else THREADS  # torch's workers load both streams
    with open_loader(make_plan(folder, data, batch), kind, device, threads) as loader:
        for step in loader:
            yield [(batch.images_BHWC, batch.labels_B) for batch in step.values()]


def prepared_feeds(plan: TrainPlan) -> list[Callable[[], Any]]:
    """Return per stream what DALI calls for files, window starts, window shapes and flips: nothing is drawn or read."""
    reader = ShardReader(plan.split)
    steps = [plan.draws(step) for step in range(PREPARED)]
    feeds = []
    for stream in range(len(plan.streams)):
        batches = []
        for draw in (step[stream] for step in steps):
            starts, shapes = np.ascontiguousarray(draw.windows_B4[:, :2]), np.ascontiguousarray(draw.windows_B4[:, 2:])
            batches.append((reader.encoded(draw.ids_B), starts, shapes, draw.flips_B.astype(np.int32)))
        feeds.append(_feed(batches))
    return feeds


def _feed(batches: list[Any]) -> Callable[[], Any]:
    endless = cycle(batches)
    return lambda: next(endless)


def _without_flips(feed: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: feed()[:3]


def decode_only(folder: Path, data: str, device: str) -> Steps:
    """The ceiling: DALI's libjpeg-turbo decodes the windows that ours would show, and nothing else is done."""
    if device != "cpu" or data != "photos":
        raise UserError("only windows of photographs, and on a CPU")
    pipelines = []
    for feed in prepared_feeds(make_plan(folder, data)):
        pipeline = Pipeline(BATCH[data], THREADS, None, prefetch_queue_depth=3, exec_dynamic=True)
        with pipeline:
            files, starts, shapes = fn.external_source(
                source=_without_flips(feed),
                num_outputs=3,
                dtype=[types.UINT8, types.INT32, types.INT32],
                ndim=[1, 1, 1],
            )
            pipeline.set_outputs(fn.decoders.image_slice(files, start=starts, shape=shapes, axis_names="HW"))
        pipeline.build()
        pipelines.append(pipeline)
    while True:
        # All are begun before any is waited for.
        for pipeline in pipelines:
            pipeline.schedule_run()
        yield [(list(pipeline.share_outputs()[0]), None) for pipeline in pipelines]
        for pipeline in pipelines:
            pipeline.release_outputs()


def dali_textbook(folder: Path, data: str, device: str) -> Steps:
    """DALI as its examples have it: readers.webdataset, DALI's own randomness, normalised floats.

    Its reader draws nothing by class. The reversed stream is an index that names each sample as often as a draw of
    that many by reversed probability did.
    """
    split = open_dataset(folder / "dataset").splits["train"]
    iterators = []
    for name, q in (("uniform", 1.0), ("reversed", -1.0)):
        indexes = _repeating_indexes(split, q, folder / f"textbook-{name}")
        pipeline = Pipeline(BATCH[data], THREADS, None if device == "cpu" else 0, seed=0, exec_dynamic=True)
        with pipeline:
            read: Any = fn.readers.webdataset(
                paths=[str(path) for path in split.shard_paths],
                index_paths=indexes,
                ext=["jpg;png", "cls"],
                random_shuffle=True,
                name="reader",
            )
            files, labels = read
            # Labels are text, of one or two bytes here.
            pictures = _textbook_pictures(files, data, "cpu" if device == "cpu" else "mixed")
            pipeline.set_outputs(pictures, fn.pad(labels, shape=[2]))
        iterators.append(
            DALIGenericIterator(
                [pipeline], ["images", "labels"], reader_name="reader", last_batch_policy=LastBatchPolicy.DROP
            )
        )
    for steps in zip(*(_endless(iterator) for iterator in iterators), strict=True):
        yield [(step["images"], step["labels"]) for step in steps]


def _endless(iterator: DALIGenericIterator) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        for (step,) in iterator:
            yield step
        iterator.reset()


def _textbook_pictures(files: Any, data: str, decoder: str) -> Any:
    flip = fn.random.coin_flip()
    normalise = {"mean": [255 * mean for mean in MEAN], "std": [255 * std for std in STD], "mirror": flip}
    if data == "photos":
        images = fn.decoders.image_random_crop(
            files, device=decoder, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, size=[SIZE[data], SIZE[data]])
        return fn.crop_mirror_normalize(images, dtype=types.FLOAT, **normalise)
    images = fn.decoders.image(files, device=decoder)
    images = fn.slice(images, [-4, -4], [40, 40], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
    where = {f"crop_pos_{axis}": fn.random.uniform(range=[0.0, 1.0]) for axis in "xy"}
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, crop=[SIZE[data], SIZE[data]], **where, **normalise)


def _repeating_indexes(split: Split, q: float, folder: Path) -> list[str]:
    """Write each shard's text index again, with each sample as often as sampling with exponent q draws it."""
    folder.mkdir(exist_ok=True)
    times_N = np.ones(len(split), np.int64)
    if q != 1:
        weights_C = class_probabilities(split.class_counts, q) / split.class_counts
        weights_N = weights_C[split.samples["label"]]
        times_N = np.random.default_rng(0).multinomial(len(split), weights_N / weights_N.sum())
    written = []
    for shard, path in enumerate(split.shard_paths):
        lines = path.with_suffix(".idx").read_text().splitlines()[1:]
        repeated = np.repeat(lines, times_N[split.samples["shard"] == shard])
        target = folder / f"{path.stem}.idx"
        target.write_text("\n".join([f"v1.2 {len(repeated)}", *repeated]) + "\n")
        written.append(str(target))
    return written


CONTESTANTS: dict[str, Callable[[Path, str, str], Steps]] = {
    **{kind: partial(ours, kind) for kind in OURS},
    "decode-only": decode_only,
    "dali-textbook": dali_textbook,
}


def versions() -> dict[str, str]:
    """Of what decodes."""
    return {"torch": torch.__version__, "dali": version("nvidia-dali-cuda130"), "pillow": Image.__version__}


if __name__ == "__main__":
    name, folder, data, device = sys.argv[1:5]
    batch = {"batch": int(sys.argv[5])} if len(sys.argv) > 5 else {}
    serve(partial(CONTESTANTS[name], Path(folder), data, device, **batch), device, versions)
