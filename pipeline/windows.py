"""From decoded images to pictures on the CPU: windows cut out, mirrored, and resized straight into the batch.

DALI does the same, and takes half of all its time for it. torch's kernel for uint8 resizes to the same pictures
(triangle filter, as PIL and torchvision do) in a ninth of DALI's time where it writes into memory that it is given.
"""

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from pipeline.augment import Flips, Interpolation, Windows


def cut_window(image_HWC: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """Return a window of an image, (height, width, 3): a view of it, or a copy with black beyond its border."""
    inside_HWC = image_HWC[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if inside_HWC.shape[:2] == (height, width):
        return inside_HWC
    window_HWC = image_HWC.new_zeros((height, width, 3))
    below, right = max(-top, 0), max(-left, 0)
    window_HWC[below : below + inside_HWC.shape[0], right : right + inside_HWC.shape[1]] = inside_HWC
    return window_HWC


def cut_windows(images_BHWC: torch.Tensor, windows_B4: Windows) -> torch.Tensor:
    """Return a window of each image, all of one size, black beyond the image: (B, height, width, 3), uint8."""
    count, rows, columns, _ = images_BHWC.shape
    top_B, left_B, height_B, width_B = windows_B4.T.astype(np.int64)
    height, width = int(height_B[0]), int(width_B[0])
    assert (height_B == height).all(), height_B
    assert (width_B == width).all(), width_B
    above = max(0, -int(top_B.min()), int(top_B.max()) + height - rows)
    beside = max(0, -int(left_B.min()), int(left_B.max()) + width - columns)
    bytes_N = F.pad(images_BHWC, (0, 0, beside, beside, above, above)).flatten()
    row_BH = (np.arange(count) * (rows + 2 * above) + above + top_B)[:, None] + np.arange(height)
    start_BH = 3 * (row_BH * (columns + 2 * beside) + (beside + left_B)[:, None])
    # Each row of each window is one piece of memory, which may begin at any byte.
    pieces = bytes_N.as_strided((len(bytes_N) - 3 * width + 1, 3 * width), (1, 1))
    return pieces.index_select(0, torch.from_numpy(start_BH.ravel())).view(count, height, width, 3)


def mirror(images_BHWC: torch.Tensor, flips_B: Flips) -> torch.Tensor:
    """Mirror some of a batch's images left to right, in place, and return it; on any device."""
    if flips_B.any():
        where = np.flatnonzero(flips_B)
        rows = torch.from_numpy(where).to(images_BHWC.device)
        mirrored_BHWC = images_BHWC.index_select(0, rows).flip(2)
        if images_BHWC.is_cpu:
            images_BHWC.numpy()[where] = mirrored_BHWC.numpy()  # ten times as fast as torch's own assignment
        else:
            images_BHWC.index_copy_(0, rows, mirrored_BHWC)
    return images_BHWC


# torch's kernels, which write into memory that they are given; PIL and torchvision make the same pictures.
RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


def resize_windows(
    windows: Sequence[torch.Tensor],
    images_BHWC: torch.Tensor,
    flips_B: Flips | None = None,
    interpolation: Interpolation = "bilinear",
) -> None:
    """Resize each window to the batch's height and width, which overwrites the batch.

    Args:
        windows: B tensors of shape (height, width, 3), uint8, on the CPU.
        flips_B: which ones to mirror first.
        images_BHWC: where they go, uint8, on the CPU.
        interpolation: bilinear or bicubic, antialiased.
    """
    size = list(images_BHWC.shape[1:3])
    # interpolate() is this very operator but takes no `out`, and to allocate and copy costs twice what resizing does.
    resize = RESIZE[interpolation]
    flips = [False] * len(windows) if flips_B is None else flips_B.tolist()
    for window_HWC, image_1CHW, flip in zip(windows, images_BHWC.permute(0, 3, 1, 2).split(1), flips, strict=True):
        mirrored_HWC = window_HWC.flip(1) if flip else window_HWC
        resize(mirrored_HWC.permute(2, 0, 1).unsqueeze(0), size, False, out=image_1CHW)


class Buffers:
    """Batches whose memory is used again once nobody holds them any more: fresh pages cost as much as the resize.

    Args:
        shape: of a batch.
        most: how many may lie here unused; what comes back beyond that is freed.
    """

    def __init__(self, *shape: int, most: int = 8) -> None:
        self._shape = shape
        self._unused: deque[NDArray[np.uint8]] = deque(maxlen=most)

    def take(self) -> torch.Tensor:
        """Return a batch with whatever lies in it; uint8."""
        memory = self._unused.pop() if self._unused else np.empty(self._shape, dtype=np.uint8)
        # The tensor and every view of it hold this lease, and nothing else does.
        lease = memory[:]
        weakref.finalize(lease, self._unused.append, memory).atexit = False
        return torch.from_numpy(lease)
