"""The DALI loader: one pipeline per stream, running ahead in parallel, handed over by DLPack.

    plan.draws(step) ─> bytes from memory-mapped shards ─> external_source ─> decode window ─> resize ─> flip
                                                                    uniform pipeline  ──┐
                                                                    reversed pipeline ──┴─> step

Both definitions are the same for "cpu" and "mixed" (GPU) decoding. All randomness was drawn by the plan, so the
pipelines hold none.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types

from pipeline.augment import Recipe
from pipeline.batch import Batch
from pipeline.plan import Draw, Plan
from pipeline.reader import ShardReader, undecodable

# Two batches wait while the third is being used; more costs memory and gains nothing.
STEPS_AHEAD = 3

Feed = tuple[list[NDArray[np.uint8]], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


def build_pipeline(
    feed: Callable[[], Feed], recipe: Recipe, batch_size: int, image_size: int, threads: int, gpu: int | None
) -> Pipeline:
    """Define one stream's pipeline.

    Args:
        feed: returns the encoded files, window starts (B, 2), window shapes (B, 2) as (height, width), and
            flips (B,) of the next batch.
        recipe: decides whether the decoder may read the window alone or the window may need padding.
        batch_size: the largest batch.
        image_size: S, in pixels.
        threads: CPU threads of this pipeline.
        gpu: the device to decode on, or None for the CPU.

    Returns:
        A built pipeline with one output: uint8 images of shape (B, S, S, 3), on the GPU where one is given.
    """
    decoder = "cpu" if gpu is None else "mixed"
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=STEPS_AHEAD,
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
        if recipe.pads:
            images = fn.slice(
                fn.decoders.image(files, device=decoder, output_type=types.RGB),
                starts,
                shapes,
                axis_names="HW",
                out_of_bounds_policy="pad",
                fill_values=0,
            )
        else:
            images = fn.decoders.image_slice(
                files, device=decoder, output_type=types.RGB, start=starts, shape=shapes, axis_names="HW"
            )
        images = fn.resize(images, size=[image_size, image_size], interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.flip(images, horizontal=flips)
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


class _StreamFeed:
    """The callback of one pipeline: turns its stream's next draw into DALI's inputs."""

    def __init__(self, reader: ShardReader, draw_step: Callable[[], None]) -> None:
        self._reader, self._draw_step = reader, draw_step
        self.coming: deque[Draw] = deque()  # drawn, not yet asked for by DALI
        self.loading: deque[Draw] = deque()  # in the pipeline, for the hand-over

    def __call__(self) -> Feed:
        if not self.coming:
            self._draw_step()
        draw = self.coming.popleft()
        self.loading.append(draw)
        windows_B4 = draw.windows_B4
        return (
            self._reader.encoded(draw.ids_B),
            np.ascontiguousarray(windows_B4[:, :2]),
            np.ascontiguousarray(windows_B4[:, 2:]),
            draw.flips_B.astype(np.int32),
        )


class DaliLoader:
    """See `pipeline.loader.Loader`."""

    def __init__(self, plan: Plan, device: torch.device, threads: int, start_step: int) -> None:
        self._plan, self._device = plan, device
        self._reader = ShardReader(plan.split)
        self._step_to_draw = self._step_to_deliver = start_step
        gpu = None if device.type == "cpu" else (device.index or 0)
        self._feeds = [_StreamFeed(self._reader, self._draw_step) for _ in plan.streams]
        self._pipelines: list[Any] = [
            build_pipeline(feed, recipe, plan.rank_batch, plan.image_size, threads, gpu)
            for feed, recipe in zip(self._feeds, plan.recipes, strict=True)
        ]
        self._schedule()  # DALI's first run fills the queue

    def _draw_step(self) -> None:
        """Draw one more step for all streams: whichever pipeline is first to need it."""
        if self._step_to_draw == self._plan.steps:
            raise StopIteration
        for feed, draw in zip(self._feeds, self._plan.draws(self._step_to_draw), strict=True):
            feed.coming.append(draw)
        self._step_to_draw += 1

    def _schedule(self) -> None:
        if self._step_to_deliver != self._plan.steps:
            for pipeline in self._pipelines:
                pipeline.schedule_run()

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        return self

    def __next__(self) -> dict[str, Batch]:
        if self._step_to_deliver == self._plan.steps or not self._pipelines:
            raise StopIteration
        batches = {}
        for name, feed, pipeline in zip(self._plan.streams, self._feeds, self._pipelines, strict=True):
            draw = feed.loading.popleft()
            labels_B = torch.from_numpy(self._plan.split.samples["label"][draw.ids_B].astype(np.int64))
            batches[name] = Batch(self._hand_over(pipeline, draw), labels_B.to(self._device), draw.ids_B)
        self._step_to_deliver += 1
        self._schedule()
        return batches

    def _hand_over(self, pipeline: Any, draw: Draw) -> torch.Tensor:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (images,) = pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError as error:
            raise undecodable(self._plan.split, self._reader, draw.ids_B) from error
        # The dynamic executor counts references: the tensor keeps its buffer after the release.
        tensor = torch.from_dlpack(images.as_tensor())
        pipeline.release_outputs()
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the pipelines with their threads and buffers."""
        self._pipelines.clear()
