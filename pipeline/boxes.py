"""Boxes in pictures: top, left, bottom, right in pixels of what the network sees, shape (B, 4), int32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def boxes_around(centres_B2: NDArray[np.int64], sides_B: NDArray[np.int64], image_size: int) -> NDArray[np.int32]:
    """Return the boxes of these centres (row, column) and sides, clipped to the picture.

    A box reaches half its side, rounded down, in each direction, as in the code of Cutout's and CutMix's authors: an
    odd side covers one pixel less.
    """
    halves_B1 = sides_B[:, None] // 2
    return np.concatenate([centres_B2 - halves_B1, centres_B2 + halves_B1], axis=1).clip(0, image_size).astype(np.int32)


def inside(boxes_B4: NDArray[np.int32], images_BHWC: torch.Tensor) -> torch.Tensor:
    """Return which pixels of each picture lie in its box: shape (B, H, W, 1), bool, on the pictures' device."""
    import torch

    boxes_4B = torch.from_numpy(boxes_B4.T.copy()).to(images_BHWC.device)
    top_B111, left_B111, bottom_B111, right_B111 = boxes_4B.view(4, -1, 1, 1, 1)
    rows_H, columns_W = (torch.arange(size, device=images_BHWC.device) for size in images_BHWC.shape[1:3])
    rows_H11, columns_W1 = rows_H.view(-1, 1, 1), columns_W.view(-1, 1)
    return (rows_H11 >= top_B111) & (rows_H11 < bottom_B111) & (columns_W1 >= left_B111) & (columns_W1 < right_B111)
