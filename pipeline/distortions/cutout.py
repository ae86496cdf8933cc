"""Cutout: a square of each picture is hidden."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.boxes import boxes_around, inside
from pipeline.distort import Distortion
from shards.errors import UserError

GREY = 128  # the authors' zero after normalisation, about the mean of photographs


@dataclass(frozen=True)
class Cutout(Distortion):
    """DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.

    The square lies around any pixel and may reach beyond the border, so that some pictures lose less. The paper's sides
    for pictures of 32 pixels: 16 for CIFAR-10, 8 for CIFAR-100.

    Attributes:
        side: of the square, in pixels of the picture that the network sees.
    """

    name = "cutout"
    side: int

    def __post_init__(self) -> None:
        if self.side < 2:
            raise UserError(f"{self} hides nothing; its side must be at least 2 pixels")

    def check(self, image_size: int) -> None:  # noqa: D102
        if self.side // 2 >= image_size:
            raise UserError(
                f"{self} hides all of a picture of {image_size} pixels; its side must be below {2 * image_size}"
            )

    def draw(self, generator: np.random.Generator, count: int, image_size: int) -> NDArray[np.int32]:
        """Draw the boxes (top, left, bottom, right): shape (count, 4)."""
        return boxes_around(generator.integers(image_size, size=(count, 2)), np.full(count, self.side), image_size)

    def apply(self, images_BHWC: torch.Tensor, rows_B: NDArray[np.int32]) -> torch.Tensor:  # noqa: D102
        return images_BHWC.masked_fill(inside(rows_B, images_BHWC), GREY)
