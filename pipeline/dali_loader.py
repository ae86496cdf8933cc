"""The DALI loader: one pipeline per stream, both running ahead in parallel, handed over by DLPack.

    plan.draws(step) ─> bytes from shards ─> external_source ─> decode, cut ─> resize, mirror ─> uniform  ──┐
    (`pipeline.ahead`)                       external_source ─> decode, cut ─> resize, mirror ─> reversed ──┴─> step

Some threads read ahead for both. On a GPU DALI does all the rest. On a CPU DALI decodes, and faster code does the rest
(`pipeline.windows`) in a thread per stream. All randomness was drawn by the plan, so the pipelines hold none.
"""

import shlex
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types

from pipeline.ahead import Files, ReadAhead, RunAhead
from pipeline.augment import Recipe
from pipeline.batch import Loader, Shown
from pipeline.distort import distort
from pipeline.faults import faults_of
from pipeline.plan import Draw, Plan
from pipeline.reader import ShardReader
from pipeline.windows import Buffers, cut_window, cut_windows, mirror, resize_windows
from shards.errors import UserError

# Batches that wait in DALI, and resized ones that wait on a CPU; more cost memory and gain nothing.
DECODED_AHEAD = 2
RESIZED_AHEAD = 2
# To resize takes about a quarter of what it takes to decode.
DECODERS_PER_RESIZER = 4

Decode = Literal["window", "whole"]
Feed = tuple[Files, NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


def build_pipeline(
    feed: Callable[[], Feed],
    recipe: Recipe,
    batch_size: int,
    image_size: int,
    threads: int,
    gpu: int | None,
    *,
    decode: Decode = "window",
    decoded_ahead: int = DECODED_AHEAD,
    **decoder_options: Any,
) -> Pipeline:
    """Define one stream's pipeline.

    Args:
        feed: returns the encoded files (a list, or rows with zeros behind them), window starts (B, 2), window
            shapes (B, 2) as (height, width), and flips (B,) of the next batch.
        recipe: decides whether windows may need padding, which no decoder gives.
        batch_size: the largest batch.
        image_size: S, in pixels.
        threads: CPU threads of this pipeline.
        gpu: the device to decode on, or None for the CPU.
        decode: the window alone, or the whole image, of which the window is cut, by another of DALI's operators.
        decoded_ahead: batches that wait, decoded.
        decoder_options: such as hw_decoder_load, for DALI's decoder.

    Returns:
        A built pipeline with one output, uint8. On a GPU: pictures of shape (B, S, S, 3) there. On a CPU: the windows
        as they lie in the images, (height, width, 3) each, or the whole images where these are decoded or windows may
        need padding.
    """
    whole = recipe.pads or decode == "whole"
    used = 4 if gpu is not None else 1 if whole else 3
    # What is stored lies upright. DALI's own reading of EXIF blocks may differ from PIL's, and would turn it.
    options = {"output_type": types.RGB, "adjust_orientation": False, **decoder_options}
    options["device"] = "cpu" if gpu is None else "mixed"
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=decoded_ahead,
        exec_dynamic=True,
    )
    with pipeline:
        inputs: Sequence[Any] = fn.external_source(
            source=lambda: feed()[:used],
            num_outputs=used,
            batch=True,
            dtype=[types.UINT8, types.INT32, types.INT32, types.INT32][:used],
            ndim=[1, 1, 1, 0][:used],
        )
        files, starts, shapes, flips = [*inputs, None, None, None][:4]
        # What is no picture must fail here: in the decoder it ends the process (in DALI 2.4 an exception leaves it
        # while its threads still work on what it owned). So the decoder is made to wait for this.
        if whole:
            # -1: as many bytes as there are. (A relative shape is float32, which knows no odd numbers above 16 MiB.)
            files = fn.reshape(files, shape=0 * fn.peek_image_shape(files, dtype=types.INT32)[:1] - 1)
            images = fn.decoders.image(files, **options)
            if gpu is not None:
                images = fn.slice(images, starts, shapes, axis_names="HW", out_of_bounds_policy="pad", fill_values=0)
        else:
            starts = starts + 0 * fn.peek_image_shape(files, dtype=types.INT32)[:2]
            images = fn.decoders.image_slice(files, start=starts, shape=shapes, axis_names="HW", **options)
        if gpu is not None:
            filter_ = types.INTERP_CUBIC if recipe.interpolation == "bicubic" else types.INTERP_LINEAR
            images = fn.resize(images, size=[image_size, image_size], interp_type=filter_, antialias=True)
            images = fn.flip(images, horizontal=flips)
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


class _Part(NamedTuple):
    """One stream's part of a step: what the plan drew, and what is shown of it."""

    drawn: Draw
    shown: Shown


class _Stream:
    """One pipeline: feeds it, keeps it busy, and takes the finished pictures out."""

    def __init__(
        self,
        plan: Plan,
        index: int,
        reads: ReadAhead,
        reader: ShardReader,
        device: torch.device,
        threads: int,
        steps: int,
        decode: Decode,
    ) -> None:
        self._plan, self._index, self._reads, self._reader, self._device = plan, index, reads, reader, device
        self._steps = steps  # still to be taken
        self._faults = faults_of(plan.split)
        self._unexplained = 0
        self._loading: deque[tuple[Draw, Draw]] = deque()  # what the plan drew and what is in the pipeline
        gpu = None if device.type == "cpu" else (device.index or 0)
        self._recipe = plan.recipes[index]
        self._whole = self._recipe.pads or decode == "whole"
        self._pipeline: Any = build_pipeline(
            self._feed, self._recipe, plan.rank_batch, plan.image_size, threads, gpu, decode=decode
        )
        self._buffers = Buffers(plan.rank_batch, plan.image_size, plan.image_size, 3)
        self._resizers = max(1, threads // DECODERS_PER_RESIZER)
        self._pool = ThreadPoolExecutor(self._resizers)

    def _feed(self) -> Feed:
        read = self._reads.next(self._index)
        self._loading.append((read.drawn, read.fed))
        return (
            read.files,
            np.ascontiguousarray(read.fed.windows_B4[:, :2]),
            np.ascontiguousarray(read.fed.windows_B4[:, 2:]),
            read.fed.flips_B.astype(np.int32),
        )

    def run(self) -> Iterator[_Part]:
        """Begin; return an iterator over the steps."""
        if self._steps:
            self._pipeline.schedule_run()  # the first one fills DALI's queue
        return self._parts()

    def _parts(self) -> Iterator[_Part]:
        while self._steps:
            drawn, fed = self._loading.popleft()
            images_BHWC, shown = self._take(drawn, fed)
            self._steps -= 1
            if self._steps:
                self._pipeline.schedule_run()
            yield _Part(drawn, Shown(images_BHWC, shown))

    def _take(self, drawn: Draw, fed: Draw) -> tuple[torch.Tensor, Draw]:
        """Return the pictures and which draw they show."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (outputs,) = self._pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError as error:  # DALI does not say which image; its dynamic executor loses this batch alone
            return self._rescue(drawn, fed, error)
        try:
            if self._device.type == "cuda":
                # The dynamic executor counts references: the tensor keeps its buffer after the release.
                images_BHWC = torch.from_dlpack(outputs.as_tensor())
            else:
                images_BHWC = self._show(fed, outputs)
        except RuntimeError as error:  # a picture of another size than the index says
            return self._rescue(drawn, fed, error)
        finally:
            self._pipeline.release_outputs()
        return images_BHWC if fed.distortions_B is None else distort(images_BHWC, fed.distortions_B), fed

    def _rescue(self, drawn: Draw, fed: Draw, error: RuntimeError) -> tuple[torch.Tensor, Draw]:
        # From what was drawn: where one stand-in replaces another, its window would be rounded twice.
        images_BHWC, shown = self._faults.rescue(self._plan, self._reader, drawn)
        if np.array_equal(shown.ids_B, fed.ids_B):  # nothing was wrong with the images
            self._unexplained += 1
            reason = next((line for line in str(error).splitlines() if "rror" in line), str(error))
            if self._unexplained > self._faults.limit:
                folder = shlex.quote(str(self._plan.split.shard_paths[0].parent))
                raise UserError(
                    f"DALI fails on batch after batch that PIL decodes ({reason}); run: tailstream verify {folder},"
                    " or use --input.loader torch"
                ) from error
            print(f"warning: DALI failed on a batch that PIL decodes, and PIL's was taken ({reason})", file=sys.stderr)
        return images_BHWC, shown

    def _show(self, draw: Draw, outputs: Any) -> torch.Tensor:
        """Make pictures of what DALI decoded on the CPU."""
        sizes_B2, windows_B4 = self._plan.split.samples[draw.ids_B][["height", "width"]], draw.windows_B4
        to_size = (windows_B4[:, 2:] == self._plan.image_size).all()
        if self._whole and to_size and (sizes_B2 == sizes_B2[0]).all():
            return mirror(cut_windows(torch.from_dlpack(outputs.as_tensor()), windows_B4), draw.flips_B)
        if to_size and not self._whole and not draw.flips_B.any():
            return torch.from_dlpack(outputs.as_tensor())
        windows = [torch.from_numpy(np.asarray(window)) for window in outputs]  # in a third of from_dlpack's time
        if self._whole:
            windows = [cut_window(image, *where) for image, where in zip(windows, windows_B4.tolist(), strict=True)]
        images_BHWC = self._buffers.take()[: len(windows)]
        share = -(-len(windows) // self._resizers)
        firsts = range(0, len(windows), share)
        parts = [(windows[i : i + share], images_BHWC[i : i + share], draw.flips_B[i : i + share]) for i in firsts]
        resize = partial(resize_windows, interpolation=draw.interpolation)
        list(self._pool.map(resize, *zip(*parts, strict=True)))
        return images_BHWC

    def close(self) -> None:
        """Free DALI's threads and buffers, and ours."""
        self._pool.shutdown()
        vars(self).clear()  # DALI's graph goes round in circles through the callback, which holds this


class DaliLoader(Loader):
    """A pipeline per stream."""

    def __init__(self, plan: Plan, device: torch.device, threads: int, start_step: int, decode: Decode) -> None:
        super().__init__(plan, device)
        self._step = start_step
        reader = ShardReader(plan.split)
        reads = ReadAhead(plan, reader, start_step)
        steps = sys.maxsize if plan.steps is None else plan.steps - start_step
        streams: list[_Stream] = []
        self._parts: list[Iterator[_Part]] = []
        # Also when opening fails, the loader is abandoned or the interpreter ends: no thread of ours may be inside DALI
        # then.
        self._free = weakref.finalize(self, _free, self._parts, reads, streams, reader)
        try:
            # One by one: those before the one that fails are there.
            streams.extend(
                _Stream(plan, i, reads, reader, device, threads, steps, decode) for i in range(len(plan.streams))
            )
            self._parts.extend(
                RunAhead(stream.run, RESIZED_AHEAD) if device.type == "cpu" else stream.run() for stream in streams
            )
        except BaseException:
            self.close()
            raise

    def _next_step(self) -> list[Shown]:
        if self._step == self._plan.steps or not self._parts:
            raise StopIteration
        try:
            step = []
            for name, parts in zip(self._plan.streams, self._parts, strict=True):
                self.waiting_for = name
                step.append(next(parts))
            self._step += 1
        except BaseException:
            self.close()
            raise
        for part in step:
            self.faults.count(part.drawn)
        return [part.shown for part in step]

    def close(self) -> None:
        """Free the pipelines with their threads and buffers."""
        self._free()


def _free(parts: list[Iterator[_Part]], reads: ReadAhead, streams: list[_Stream], reader: ShardReader) -> None:
    threads = [ahead for ahead in parts if isinstance(ahead, RunAhead)]
    for ahead in threads:
        ahead.cancel()
    # Else the threads would wait for what nobody needs.
    reads.cancel()
    reader.close()
    for ahead in threads:
        ahead.close()
    parts.clear()
    for stream in streams:
        stream.close()
    reads.close()
    reader.close()
