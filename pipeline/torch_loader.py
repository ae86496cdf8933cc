"""The portable loader: PIL in a PyTorch DataLoader. The reference that tests hold the other loaders against."""

import io
import itertools
import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipeline.batch import Batch
from pipeline.plan import Draw, Plan
from pipeline.reader import ShardReader, undecodable


def show_windows(files: list[NDArray[np.uint8]], draw: Draw, image_size: int) -> NDArray[np.uint8]:
    """Decode files, cut each draw's window, resize it with antialiasing (triangle filter) and mirror it.

    Args:
        files: encoded images as uint8 arrays, one per id of the draw.
        draw: windows and flips, B of each.
        image_size: S, in pixels.

    Returns:
        Shape (B, S, S, 3), uint8, RGB.

    Raises:
        OSError, SyntaxError: a file that does not decode.
    """
    images_BHWC = np.empty((len(files), image_size, image_size, 3), dtype=np.uint8)
    for image_HWC, file, (top, left, height, width), flip in zip(
        images_BHWC, files, draw.windows_B4.tolist(), draw.flips_B.tolist(), strict=True
    ):
        with Image.open(io.BytesIO(file.data)) as picture:
            window = picture.convert("RGB").crop((left, top, left + width, top + height))
        shown = np.asarray(window.resize((image_size, image_size), Image.Resampling.BILINEAR))
        image_HWC[:] = shown[:, ::-1] if flip else shown
    return images_BHWC


class _Steps(Dataset[list[tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]]]):
    """Maps a step number to the loaded streams of that step; lives in the DataLoader's workers."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._reader = plan, ShardReader(plan.split)

    def __getitem__(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]]:
        streams = []
        for draw in self._plan.draws(step):
            files = self._reader.encoded(draw.ids_B)
            try:
                images_BHWC = show_windows(files, draw, self._plan.image_size)
            except (OSError, SyntaxError) as error:
                raise undecodable(self._plan.split, self._reader, draw.ids_B) from error
            labels_B = self._plan.split.samples["label"][draw.ids_B].astype(np.int64)
            streams.append((torch.from_numpy(images_BHWC), torch.from_numpy(labels_B), draw.ids_B))
        return streams


def _worker_context() -> BaseContext:
    # Forking a process that runs threads (or CUDA) is unsafe; a server that has imported torch once forks fast.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _as_it_is(step: Any) -> Any:
    return step


class TorchLoader:
    """See `pipeline.loader.Loader`. Worker processes prepare whole steps, two ahead each."""

    def __init__(self, plan: Plan, device: torch.device, workers: int, start_step: int) -> None:
        self._plan, self._device = plan, device
        steps = itertools.count(start_step) if plan.steps is None else range(start_step, plan.steps)
        self._batches: Iterator[Any] = iter(
            DataLoader(
                _Steps(plan),
                batch_size=None,
                sampler=steps,
                collate_fn=_as_it_is,
                num_workers=workers,
                multiprocessing_context=_worker_context() if workers else None,
                pin_memory=device.type == "cuda",
            )
        )

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        return self

    def __next__(self) -> dict[str, Batch]:
        return {
            name: Batch(images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True), ids)
            for name, (images, labels, ids) in zip(self._plan.streams, next(self._batches), strict=True)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker processes."""
        self._batches = iter(())
