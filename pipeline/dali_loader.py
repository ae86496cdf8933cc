"""The DALI loader: one pipeline per stream, both running ahead in parallel, handed over by DLPack.

    plan.draws(step) ─> bytes from shards ─> external_source ─> decode window ─> resize, flip ─> uniform  ──┐
                                             external_source ─> decode window ─> resize, flip ─> reversed ──┴─> step

On a GPU all of it is DALI's. On a CPU DALI decodes the windows and mirrors them, and faster code resizes them
(`pipeline.resize`) in a thread per stream. All randomness was drawn by the plan, so the pipelines hold none.
"""

import queue
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types

from pipeline.augment import Recipe
from pipeline.batch import Batch
from pipeline.distort import distort
from pipeline.faults import faults_of
from pipeline.plan import Draw, Plan
from pipeline.reader import ShardReader
from pipeline.resize import Buffers, resize_windows

# Batches that wait in DALI, and resized ones that wait on a CPU; more cost memory and gain nothing.
DECODED_AHEAD = 2
RESIZED_AHEAD = 2
# To resize takes about a quarter of what it takes to decode.
DECODERS_PER_RESIZER = 4

Feed = tuple[list[NDArray[np.uint8]], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


def build_pipeline(
    feed: Callable[[], Feed],
    recipe: Recipe,
    batch_size: int,
    image_size: int,
    threads: int,
    gpu: int | None,
    *,
    decode: Literal["window", "whole"] = "window",
    decoded_ahead: int = DECODED_AHEAD,
    **decoder_options: Any,
) -> Pipeline:
    """Define one stream's pipeline.

    Args:
        feed: returns the encoded files, window starts (B, 2), window shapes (B, 2) as (height, width), and
            flips (B,) of the next batch.
        recipe: decides whether windows may need padding, which no decoder gives.
        batch_size: the largest batch.
        image_size: S, in pixels.
        threads: CPU threads of this pipeline.
        gpu: the device to decode on, or None for the CPU.
        decode: the window alone, or the whole image, of which the window is cut.
        decoded_ahead: batches that wait, decoded.
        decoder_options: such as hw_decoder_load, for DALI's decoder.

    Returns:
        A built pipeline with one output: on a GPU uint8 images of shape (B, S, S, 3) there, on a CPU the windows,
        uint8, (height, width, 3) each; mirrored where asked.
    """
    options = {"device": "cpu" if gpu is None else "mixed", "output_type": types.RGB, **decoder_options}
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=decoded_ahead,
        exec_dynamic=True,
    )
    with pipeline:
        files, starts, shapes, flips = fn.external_source(
            source=feed,
            num_outputs=4,
            batch=True,
            dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
            ndim=[1, 1, 1, 0],
        )
        if recipe.pads or decode == "whole":
            images = fn.slice(
                fn.decoders.image(files, **options),
                starts,
                shapes,
                axis_names="HW",
                out_of_bounds_policy="pad",
                fill_values=0,
            )
        else:
            images = fn.decoders.image_slice(files, start=starts, shape=shapes, axis_names="HW", **options)
        if gpu is not None:
            images = fn.resize(images, size=[image_size, image_size], interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=flips))
    pipeline.build()
    return pipeline


class _Part(NamedTuple):
    """One stream's part of a step: what the plan drew, and what is shown of it."""

    drawn: Draw
    ids_B: NDArray[np.int64]
    images_BHWC: torch.Tensor


class _Draws:
    """Draws each step once, for whichever stream is first to need it."""

    def __init__(self, plan: Plan, start_step: int) -> None:
        self._plan, self._step = plan, start_step
        self._lock = threading.Lock()
        self._coming: list[deque[Draw]] = [deque() for _ in plan.streams]

    def next(self, stream: int) -> Draw:
        """Return the stream's next draw; StopIteration at the plan's end."""
        with self._lock:
            if not self._coming[stream]:
                if self._step == self._plan.steps:
                    raise StopIteration
                for coming, draw in zip(self._coming, self._plan.draws(self._step), strict=True):
                    coming.append(draw)
                self._step += 1
            return self._coming[stream].popleft()


class _Stream:
    """One pipeline: feeds it, keeps it busy, and takes the finished pictures out."""

    def __init__(
        self, plan: Plan, index: int, draws: _Draws, reader: ShardReader, device: torch.device, threads: int, steps: int
    ) -> None:
        self._plan, self._index, self._draws, self._reader, self._device = plan, index, draws, reader, device
        self._steps = steps  # still to be taken
        self._faults = faults_of(plan.split)
        self._unexplained = 0
        self._loading: deque[tuple[Draw, Draw]] = deque()  # what the plan drew and what is in the pipeline
        gpu = None if device.type == "cpu" else (device.index or 0)
        recipe = plan.recipes[index]
        self._pipeline: Any = build_pipeline(self._feed, recipe, plan.rank_batch, plan.image_size, threads, gpu)
        self._buffers = Buffers(plan.rank_batch, plan.image_size, plan.image_size, 3)
        self._resizers = max(1, threads // DECODERS_PER_RESIZER)
        self._pool = ThreadPoolExecutor(self._resizers)

    def _feed(self) -> Feed:
        drawn = self._draws.next(self._index)
        fed = self._faults.mend(self._plan, drawn)
        if not len(fed.ids_B):  # DALI takes no empty batch; this one fails there once more
            fed = drawn
        self._loading.append((drawn, fed))
        return (
            self._reader.encoded(fed.ids_B),
            np.ascontiguousarray(fed.windows_B4[:, :2]),
            np.ascontiguousarray(fed.windows_B4[:, 2:]),
            fed.flips_B.astype(np.int32),
        )

    def run(self) -> Iterator[_Part]:
        """Begin; return an iterator over the steps."""
        if self._steps:
            self._pipeline.schedule_run()  # the first one fills DALI's queue
        return self._parts()

    def _parts(self) -> Iterator[_Part]:
        while self._steps:
            drawn, fed = self._loading.popleft()
            images_BHWC, shown = self._take(fed)
            self._steps -= 1
            if self._steps:
                self._pipeline.schedule_run()
            yield _Part(drawn, shown.ids_B, images_BHWC.to(self._device))

    def _take(self, draw: Draw) -> tuple[torch.Tensor, Draw]:
        """Return the pictures and which draw they show."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (outputs,) = self._pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError as error:  # DALI does not say which image; its dynamic executor loses this batch alone
            return self._rescue(draw, error)
        if self._device.type == "cuda" or (draw.windows_B4[:, 2:] == self._plan.image_size).all():
            # The dynamic executor counts references: the tensor keeps its buffer after the release.
            images_BHWC = torch.from_dlpack(outputs.as_tensor())
        else:
            images_BHWC = self._resize([torch.from_dlpack(window) for window in outputs])
        self._pipeline.release_outputs()
        return images_BHWC if draw.distortions_B is None else distort(images_BHWC, draw.distortions_B), draw

    def _rescue(self, draw: Draw, error: RuntimeError) -> tuple[torch.Tensor, Draw]:
        images_BHWC, shown = self._faults.rescue(self._plan, self._reader, draw)
        if shown is draw:  # nothing was wrong with the images
            self._unexplained += 1
            if self._unexplained > self._faults.limit:
                raise error
            reason = next((line for line in str(error).splitlines() if "rror" in line), str(error))
            print(f"warning: DALI failed on a batch that PIL decodes, and PIL's was taken ({reason})", file=sys.stderr)
        return images_BHWC, shown

    def _resize(self, windows: list[torch.Tensor]) -> torch.Tensor:
        images_BHWC = self._buffers.take()[: len(windows)]
        share = -(-len(windows) // self._resizers)
        firsts = range(0, len(windows), share)
        shares = [windows[first : first + share] for first in firsts]
        list(self._pool.map(resize_windows, shares, [images_BHWC[first : first + share] for first in firsts]))
        return images_BHWC

    def close(self) -> None:
        """Free DALI's threads and buffers, and ours."""
        self._pool.shutdown()
        vars(self).clear()  # DALI's graph goes round in circles through the callback, which holds this


class _Ahead:
    """Runs an iterator ahead in a thread of its own; what it raises is raised here."""

    def __init__(self, run: Callable[[], Iterator[_Part]]) -> None:
        self._queue: queue.Queue[_Part | BaseException] = queue.Queue(RESIZED_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self._thread.start()

    def _work(self, run: Callable[[], Iterator[_Part]]) -> None:
        try:
            for part in run():
                if not self._put(part):
                    return
        except BaseException as error:
            self._put(error)

    def __iter__(self) -> Self:
        return self

    def _put(self, part: _Part | BaseException) -> bool:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(part, timeout=0.1)
                return True
        return False

    def __next__(self) -> _Part:
        part = self._queue.get()
        if isinstance(part, BaseException):
            raise part
        return part

    def stop(self) -> None:
        """Have the thread end; what waits is dropped."""
        self._stopped.set()
        self._thread.join()


class DaliLoader:
    """See `pipeline.loader.Loader`."""

    def __init__(self, plan: Plan, device: torch.device, threads: int, start_step: int) -> None:
        self._plan, self._device, self._step = plan, device, start_step
        self.faults = faults_of(plan.split)
        reader, draws = ShardReader(plan.split), _Draws(plan, start_step)
        steps = sys.maxsize if plan.steps is None else plan.steps - start_step
        streams = [_Stream(plan, i, draws, reader, device, threads, steps) for i in range(len(plan.streams))]
        self._parts: list[Iterator[_Part]] = [
            _Ahead(stream.run) if device.type == "cpu" else stream.run() for stream in streams
        ]
        # Also when the loader is abandoned or the interpreter ends: no thread of ours may be inside DALI then.
        self._free = weakref.finalize(self, _free, self._parts, streams, reader)

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        return self

    def __next__(self) -> dict[str, Batch]:
        if self._step == self._plan.steps or not self._parts:
            raise StopIteration
        try:
            step = [next(parts) for parts in self._parts]
            self._step += 1
            for part in step:
                self.faults.count(part.drawn)
            self.faults.check()
        except BaseException:
            self.close()
            raise
        if not any(len(part.ids_B) for part in step):  # no image of an evaluation's batch decodes
            return next(self)
        labels = self._plan.split.samples["label"]
        return {
            name: Batch(
                part.images_BHWC, torch.from_numpy(labels[part.ids_B].astype(np.int64)).to(self._device), part.ids_B
            )
            for name, part in zip(self._plan.streams, step, strict=True)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the pipelines with their threads and buffers."""
        self._free()


def _free(parts: list[Iterator[_Part]], streams: list[_Stream], reader: ShardReader) -> None:
    for ahead in parts:
        if isinstance(ahead, _Ahead):
            ahead.stop()
    parts.clear()
    for stream in streams:
        stream.close()
    reader.close()
