"""The resident loader: every image is decoded once and kept; batches are cut from memory, on a GPU all there.

    first asked for   shards ─> decode (threads) ─> one buffer of uint8 rows
    ever after        rows of all windows at once ─> resize where sizes differ ─> mirror ─> step

What was decoded stays with the split, on its device: the next loader of the split, such as the next epoch's
evaluation, finds it there. It goes when the dataset does.
"""

import itertools
import os
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from pipeline.augment import Interpolation, Windows
from pipeline.batch import Loader, Shown, steps_from
from pipeline.budget import free_memory, numbered
from pipeline.distort import distort
from pipeline.kept import drop, is_kept_with, kept_with
from pipeline.pictures import UndecodableError, decode
from pipeline.plan import Draw, Plan
from pipeline.reader import ShardReader
from pipeline.windows import Buffers, cut_window, mirror, resize_windows
from shards.errors import UserError
from shards.index import Split

SHARE = 0.25  # of the free memory, by default
STEPS_AHEAD = 2  # whose images are decoded while the steps before them are used


class TooLargeError(UserError):
    """A split's decoded images do not fit the memory that is set aside for them."""


class _Layout(NamedTuple):
    """Where each image lies in a buffer, in bytes: its start, and from one of its rows to the next; the whole size.

    Where all images have one size, rows are followed by black, an eighth of the width: the right margin of one row
    and the left margin of the next. More black before the first image serves as a row above or below any image. So
    each row of a window that reaches beyond its image is one piece of memory, like any other.

        black … | row 0 of image 0 | black | row 1 of image 0 | black | row 0 of image 1 | black …

    Otherwise there is no black, and margin is 0.
    """

    heights_N: NDArray[np.int64]
    widths_N: NDArray[np.int64]
    starts_N: NDArray[np.int64]
    strides_N: NDArray[np.int64]
    margin: int  # in pixels
    size: int

    @classmethod
    def of(cls, split: Split) -> Self:
        heights_N, widths_N = (split.samples[axis].astype(np.int64) for axis in ("height", "width"))
        one_size = len(split) and np.ptp(heights_N) == np.ptp(widths_N) == 0
        margin = -(-int(widths_N[0]) // 8) if one_size else 0
        strides_N = 3 * (widths_N + margin)
        sizes_N = heights_N * strides_N
        black = 3 * (int(widths_N[0]) + 2 * margin) if one_size else 0
        return cls(heights_N, widths_N, black + np.cumsum(sizes_N) - sizes_N, strides_N, margin, black + sizes_N.sum())


class Decoded:
    """A split's images on a device: decoded, or black until they are `put` there.

    Attributes:
        there_N: which ones are, shape (N,), bool.
    """

    def __init__(self, layout: _Layout, device: torch.device) -> None:
        self._layout = layout
        self.there_N = np.zeros(len(layout.starts_N), dtype=np.bool_)
        if device.type == "cpu":
            # NumPy's zeros take no memory before they are written to.
            self._bytes = torch.from_numpy(np.zeros(layout.size, dtype=np.uint8))
        else:
            self._bytes = torch.zeros(layout.size, dtype=torch.uint8, device=device)

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self._bytes.device

    @property
    def size(self) -> int:
        """Bytes that it has, or will have once all images are there."""
        return self._layout.size

    @property
    def to_come(self) -> int:
        """Bytes of these that it does not take yet."""
        images = len(self.there_N)
        lacking = images - np.count_nonzero(self.there_N) if self.device.type == "cpu" else 0
        return int(self.size * lacking // max(1, images))

    def lacking(self, ids_B: NDArray[np.int64]) -> list[int]:
        """Return those of the ids, once each, whose images are not there."""
        return np.unique(ids_B[~self.there_N[ids_B]]).tolist()

    def put(self, sample: int, image_HWC: NDArray[np.uint8]) -> None:
        """Keep a decoded image."""
        self._image(sample).copy_(torch.from_numpy(image_HWC))
        self.there_N[sample] = True

    def windows(self, ids_B: NDArray[np.int64], windows_B4: Windows) -> torch.Tensor | list[torch.Tensor]:
        """Return windows of images, black beyond the image, uint8.

        Returns:
            One tensor (B, height, width, 3) where images have one size and windows too; otherwise B tensors
            (height, width, 3), which may lie in the buffer.
        """
        heights_N, widths_N, starts_N, strides_N, margin, size = self._layout
        top_B, left_B, height_B, width_B = windows_B4.T.astype(np.int64)
        height, width = int(height_B[0]), int(width_B[0])
        if not (
            margin
            and (height_B == height).all()
            and (width_B == width).all()
            and left_B.min() >= -margin
            and left_B.max() + width <= widths_N[0] + margin
        ):
            return [
                cut_window(self._image(sample), *window)
                for sample, window in zip(ids_B, windows_B4.tolist(), strict=True)
            ]
        row_BH = top_B[:, None] + np.arange(height)
        start_BH = (starts_N[ids_B] + 3 * left_B)[:, None] + strides_N[0] * row_BH
        start_BH[(row_BH < 0) | (row_BH >= heights_N[0])] = 0
        pieces = self._bytes.as_strided((size - 3 * width + 1, 3 * width), (1, 1))
        starts = torch.from_numpy(start_BH.ravel()).to(self.device)
        return pieces.index_select(0, starts).view(-1, height, width, 3)

    def _image(self, sample: int) -> torch.Tensor:
        heights_N, widths_N, starts_N, strides_N, *_ = self._layout
        return self._bytes.as_strided(
            (int(heights_N[sample]), int(widths_N[sample]), 3), (int(strides_N[sample]), 3, 1), int(starts_N[sample])
        )


_alive: weakref.WeakSet[Decoded] = weakref.WeakSet()


def decoded_of(split: Split, device: torch.device, gigabytes: float | None) -> Decoded:
    """Return a split's images on a device, which all its loaders share, and set memory aside at the first call.

    Args:
        split: the split.
        device: where they shall lie.
        gigabytes: as for `room_for`.

    Raises:
        TooLargeError: they would take more.
    """
    check_room([split], device, gigabytes)
    return set_aside(split, device)


def check_room(splits: Sequence[Split], device: torch.device, gigabytes: float | None) -> None:
    """Raise a TooLargeError where the images of splits do not fit; arguments as for `room_for`."""
    size, room = room_for(splits, device, gigabytes)
    if size > room:
        raise TooLargeError(
            f"the images of {', '.join(split.name for split in splits)} take {size / 1e9:.3g} GB decoded and the"
            f" resident loader may use"
            f" {max(0, room) / 1e9:.3g} GB on {device}; give it more with --input.resident_gb, or use"
            " --input.loader dali"
        )


def room_for(splits: Sequence[Split], device: torch.device, gigabytes: float | None) -> tuple[int, float]:
    """Return the bytes that splits' images will take on a device beyond what is set aside, and those that they may.

    Args:
        splits: those whose images are set aside there already count nothing.
        device: where they shall lie.
        gigabytes: what this process may use on the device for all splits; None for `SHARE` of what was free
            before any was set aside, on a CPU divided by the processes of this machine. Never more than is free.
    """
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    others = [images for images in _alive if images.device == device]
    promised = sum(images.size for images in others)
    taken = promised - sum(images.to_come for images in others)
    free = free_memory(device) / sharing
    # A share of all that was free, once: of what is left, each further split would take its share again, and the
    # network would find no room.
    most = SHARE * (free + taken) if gigabytes is None else min(gigabytes * 1e9, free + taken)
    lacking = [split for split in splits if not is_kept_with(split, (Decoded, device))]
    # What is there already needs no room, even where there is none.
    return sum(_Layout.of(split).size for split in lacking), max(0, most - promised)


def set_aside(split: Split, device: torch.device) -> Decoded:
    """Return a split's images on a device, which all its loaders share; black at the first call."""

    def make() -> Decoded:
        with torch.inference_mode(False):  # evaluation asks first, and training writes later
            images = Decoded(_Layout.of(split), device)
        _alive.add(images)
        return images

    return kept_with(split, (Decoded, device), make)


def let_go(split: Split, device: torch.device | str) -> None:
    """Free the memory of a split's images on a device, which nobody will look at again, once its loaders are closed."""
    device = numbered(device)  # under which they are kept
    drop(split, (Decoded, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # torch would keep it, and the next split would not find it free


def bytes_to_come(device: torch.device) -> int:
    """Return how many bytes of those that are set aside on a device its memory still counts as free."""
    return sum(images.to_come for images in _alive if images.device == numbered(device))


class _Coming(NamedTuple):
    """A step whose images are being decoded."""

    draws: list[Draw]
    decoding: "list[Future[Pictures]]"


Pictures = list[tuple[int, NDArray[np.uint8]] | UndecodableError]


class ResidentLoader(Loader):
    """A buffer of decoded images, and threads that decode what is first asked for."""

    def __init__(
        self, plan: Plan, device: torch.device, threads: int, start_step: int, gigabytes: float | None = None
    ) -> None:
        super().__init__(plan, device)
        self._images = decoded_of(plan.split, device, gigabytes)
        self._reader = ShardReader(plan.split)
        self._threads = threads * len(plan.streams)
        self._pool = ThreadPoolExecutor(self._threads)
        self._buffers = Buffers(plan.rank_batch, plan.image_size, plan.image_size, 3)
        self._steps = iter(steps_from(plan, start_step))
        self._coming: deque[_Coming] = deque()

    @torch.inference_mode(False)  # which threads that resize do not share
    def _next_step(self) -> list[Shown]:
        for step in itertools.islice(self._steps, 1 + STEPS_AHEAD - len(self._coming)):
            draws = self._plan.draws(step)
            shown_B = np.concatenate([self.faults.replace(self._plan, draw).ids_B for draw in draws])
            self._coming.append(_Coming(draws, self._decode(self._images.lacking(shown_B))))
        if not self._coming:
            raise StopIteration
        draws, decoding = self._coming.popleft()
        self._keep(decoding)
        return [self._show(draw) for draw in draws]

    def _decode(self, samples: list[int]) -> "list[Future[Pictures]]":
        share = -(-len(samples) // self._threads)
        return [
            self._pool.submit(_decode, self._plan.split, self._reader, samples[first : first + share])
            for first in range(0, len(samples), share or 1)
        ]

    def _keep(self, decoding: "list[Future[Pictures]]") -> None:
        for future in decoding:
            for picture in future.result():
                if isinstance(picture, UndecodableError):
                    self.faults.add(self._plan.split, picture)
                else:
                    self._images.put(*picture)

    def _show(self, draw: Draw) -> Shown:
        shown = self.faults.replace(self._plan, draw)
        while lacking := self._images.lacking(shown.ids_B):  # what takes a bad image's place was not asked for
            self._keep(self._decode(lacking))
            shown = self.faults.replace(self._plan, draw)
        self.faults.count(draw)
        return Shown(self._cut(shown), shown)

    def _cut(self, draw: Draw) -> torch.Tensor:
        size = self._plan.image_size
        if not len(draw.ids_B):
            return torch.empty((0, size, size, 3), dtype=torch.uint8, device=self._device)
        windows = self._images.windows(draw.ids_B, draw.windows_B4)
        if (draw.windows_B4[:, 2:] == size).all():
            images_BHWC = windows if isinstance(windows, torch.Tensor) else torch.stack(windows)
        elif self._device.type == "cpu":
            images_BHWC = self._buffers.take()[: len(windows)]
            share = -(-len(windows) // self._threads)
            firsts = range(0, len(windows), share)
            resize = partial(resize_windows, interpolation=draw.interpolation)
            list(self._pool.map(resize, (windows[i : i + share] for i in firsts), images_BHWC.split(share)))
        else:
            images_BHWC = resize_on_gpu(windows, size, draw.interpolation)
        images_BHWC = mirror(images_BHWC, draw.flips_B)
        return images_BHWC if draw.distortions_B is None else distort(images_BHWC, draw.distortions_B)

    def close(self) -> None:
        """Stop the threads. The decoded images stay with the split."""
        self._steps = iter(())
        self._coming.clear()
        self._reader.close()  # else the threads would wait for shards that nobody needs
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()  # what they opened meanwhile


def resize_on_gpu(
    windows: torch.Tensor | list[torch.Tensor], image_size: int, interpolation: Interpolation = "bilinear"
) -> torch.Tensor:
    """Resize windows, uint8 (height, width, 3) each, to (B, S, S, 3): antialiased, as `resize_windows` does."""
    if isinstance(windows, list):
        return torch.cat([resize_on_gpu(window_HWC.unsqueeze(0), image_size, interpolation) for window_HWC in windows])
    planes_BCHW = windows.permute(0, 3, 1, 2).float()
    planes_BCHW = F.interpolate(planes_BCHW, (image_size, image_size), mode=interpolation, antialias=True)
    return planes_BCHW.add_(0.5).clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def _decode(split: Split, reader: ShardReader, samples: list[int]) -> Pictures:
    pictures: Pictures = []
    for sample in samples:
        try:
            pictures.append((sample, np.array(decode(split, reader, sample))))
        except UndecodableError as error:
            pictures.append(error)
    return pictures
