"""The operations that AutoAugment, RandAugment and TrivialAugment choose from, by torchvision.

A chosen operation is a number and a magnitude in torchvision's own units, so that rows say what is done and not how it
was drawn. Pictures of one operation and magnitude pass together: a batch has tens of such groups, not hundreds.
"""

from collections.abc import Callable
from functools import cache
from math import atan, degrees
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# What is drawn for a picture: a number of `NAMES`, and its magnitude.
OPERATION = np.dtype([("operation", "u1"), ("magnitude", "<f4")])

# Each operation's strongest magnitude, which a level of 1 gives: AutoAugment's (Cubuk et al. 2019, Table 6), which
# RandAugment took over, and those of TrivialAugment's wide space (Müller and Hutter 2021).
# Shears: slope. Translations: share of the picture's side; wide: pixels. Rotation: degrees. Factors: their distance
# from 1. Posterize: bits that are lost. Solarize: how far the threshold falls from white.
STRONGEST = {
    "Identity": 0.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 150 / 331, "TranslateY": 150 / 331, "Rotate": 30,
    "Brightness": 0.9, "Color": 0.9, "Contrast": 0.9, "Sharpness": 0.9, "Posterize": 4, "Solarize": 1,
    "AutoContrast": 0, "Equalize": 0, "Invert": 0,
}  # fmt: skip
STRONGEST_WIDE = STRONGEST | {
    "ShearX": 0.99, "ShearY": 0.99, "TranslateX": 32, "TranslateY": 32, "Rotate": 135,
    "Brightness": 0.99, "Color": 0.99, "Contrast": 0.99, "Sharpness": 0.99, "Posterize": 6,
}  # fmt: skip
NAMES = tuple(STRONGEST)
SIGNED = NAMES[1:10]  # may go in either direction


def chosen(
    operations: NDArray[np.int64],
    levels: NDArray[np.float64],
    negative: NDArray[np.bool_],
    image_size: int,
    wide: bool = False,
) -> NDArray[np.void]:
    """Return operations with their magnitudes, dtype `OPERATION`, of the shape of the arguments.

    Args:
        operations: numbers of `NAMES`.
        levels: 0 … 1, from nothing to the strongest.
        negative: whether an operation that knows directions takes the other one.
        image_size: in pixels.
        wide: in TrivialAugment's wide space.
    """
    strongest = np.array(list((STRONGEST_WIDE if wide else STRONGEST).values()))
    if not wide:
        strongest[_numbers("TranslateX", "TranslateY")] *= image_size
    magnitudes = levels * strongest[operations] * np.where(negative & np.isin(operations, _numbers(*SIGNED)), -1, 1)
    magnitudes = np.where(operations == _numbers("Posterize"), 8 - np.rint(magnitudes), magnitudes)
    magnitudes = np.where(operations == _numbers("Solarize"), 255 * (1 - magnitudes), magnitudes)
    rows = np.zeros(operations.shape, dtype=OPERATION)
    rows["operation"], rows["magnitude"] = operations, magnitudes
    return rows


def _numbers(*names: str) -> list[int]:
    return [NAMES.index(name) for name in names]


def operate(images_BHWC: torch.Tensor, rows_BN: NDArray[np.void], fill: int) -> torch.Tensor:
    """Apply each picture's operations in turn.

    Args:
        images_BHWC: uint8, on any device; stays as it is.
        rows_BN: N operations for each picture, dtype `OPERATION`.
        fill: the grey level of what comes in from beyond the border.

    Returns:
        Shape (B, H, W, 3), uint8.
    """
    # Planes side by side, so that a picture's sums do not depend on how many pass together.
    planes_BCHW = images_BHWC.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
    for rows_B in rows_BN.T:
        for row in np.unique(rows_B):
            operation = _operations()[NAMES[row["operation"]]]
            asked = torch.from_numpy(np.flatnonzero(rows_B == row)).to(planes_BCHW.device)
            shown_BCHW = operation(planes_BCHW.index_select(0, asked), float(row["magnitude"]), [float(fill)] * 3)
            planes_BCHW.index_copy_(0, asked, shown_BCHW)
    return planes_BCHW.permute(0, 2, 3, 1).contiguous()


Operation = Callable[[torch.Tensor, float, list[float]], torch.Tensor]


@cache
def _operations() -> dict[str, Operation]:
    # Imported by the first that needs it: it takes seconds.
    from torchvision.transforms.v2 import functional

    def affine(fill: list[float], **options: Any) -> dict[str, Any]:
        return {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], "fill": fill, **options}

    # A shear moves the rows of a picture by its slope, from the first row or column on.
    return {
        "Identity": lambda x, m, fill: x,
        "ShearX": lambda x, m, fill: functional.affine(
            x, **affine(fill, shear=[degrees(atan(m)), 0.0], center=[0.0, 0.0])
        ),
        "ShearY": lambda x, m, fill: functional.affine(
            x, **affine(fill, shear=[0.0, degrees(atan(m))], center=[0.0, 0.0])
        ),
        "TranslateX": lambda x, m, fill: functional.affine(x, **affine(fill, translate=[int(m), 0])),
        "TranslateY": lambda x, m, fill: functional.affine(x, **affine(fill, translate=[0, int(m)])),
        "Rotate": lambda x, m, fill: functional.rotate(x, m, fill=fill),
        "Brightness": lambda x, m, fill: functional.adjust_brightness(x, 1 + m),
        "Color": lambda x, m, fill: functional.adjust_saturation(x, 1 + m),
        "Contrast": lambda x, m, fill: functional.adjust_contrast(x, 1 + m),
        "Sharpness": lambda x, m, fill: functional.adjust_sharpness(x, 1 + m),
        "Posterize": lambda x, m, fill: functional.posterize(x, int(m)),
        "Solarize": lambda x, m, fill: functional.solarize(x, m),
        "AutoContrast": lambda x, m, fill: functional.autocontrast(x),
        "Equalize": lambda x, m, fill: functional.equalize(x),
        "Invert": lambda x, m, fill: functional.invert(x),
    }
