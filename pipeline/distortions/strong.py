"""Colour distortion, grey and blur.

colours (four steps in the row's order) ─> grey ─> blur          one row of `DISTORTION` for each picture
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from pipeline.distort import Distortion

# On a CPU, pictures of this many pixels in all pass together: their planes stay in its cache from step to step.
_PIXELS_AT_ONCE = 1 << 16
_GREY = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision has it


# What is done to a picture. Factors of 1, a hue of 0 and a sigma of 0 change nothing.
DISTORTION = np.dtype(
    [
        ("order", "u1", (4,)),  # in which the next four are applied: a permutation of 0 … 3
        ("brightness", "<f4"),  # factor
        ("contrast", "<f4"),  # factor
        ("saturation", "<f4"),  # factor
        ("hue", "<f4"),  # turns of the colour circle, -0.5 … 0.5
        ("grey", "?"),
        ("sigma", "<f4"),  # Gaussian blur, in pixels of the picture that the network sees
    ]
)


@dataclass(frozen=True)
class Strong(Distortion):
    """The strong branch's distortions: colours with probability 0.8, grey 0.2, blur 0.5.

    The probabilities are SDNHL's ("Strong-weak Dual-branch Network with Hard-aware Loss", section 3.1), which names
    no strengths. Those are MoCo v2's (Chen et al., "Improved Baselines with Momentum Contrastive Learning", 2020),
    a milder form of SimCLR's (Chen et al. 2020, appendix A): factors of brightness, contrast and saturation from
    0.6 to 1.4, the hue turned by up to a tenth of the circle, in random order; blur with a sigma of 0.1 to 2 pixels.

    The steps are torchvision's `adjust_brightness`, `adjust_contrast`, `adjust_saturation`, `adjust_hue`,
    `rgb_to_grayscale` and `gaussian_blur` (to three sigmas, mirrored at the border), computed in float32 with one
    rounding at the end: within one grey level of torchvision's on float images.
    """

    name = "strong"

    def draw(self, generator: np.random.Generator, count: int, image_size: int) -> NDArray[np.void]:
        """Draw rows: shape (count,), dtype `DISTORTION`."""
        rows_B = np.zeros(count, dtype=DISTORTION)
        rows_B["order"] = generator.random((count, 4)).argsort(axis=1)
        coloured_B, grey_B, blurred_B = generator.random((3, count)) < np.array([[0.8], [0.2], [0.5]])
        for name in ("brightness", "contrast", "saturation"):
            rows_B[name] = np.where(coloured_B, generator.uniform(0.6, 1.4, count), 1.0)
        rows_B["hue"] = np.where(coloured_B, generator.uniform(-0.1, 0.1, count), 0.0)
        rows_B["grey"] = grey_B
        rows_B["sigma"] = np.where(blurred_B, generator.uniform(0.1, 2.0, count), 0.0)
        return rows_B

    def apply(self, images_BHWC: torch.Tensor, rows_B: NDArray[np.void]) -> torch.Tensor:
        """Distort each picture as its row asks; one whose row asks for nothing is unchanged bit by bit."""
        count, height, width, _ = images_BHWC.shape
        whole_batch = images_BHWC.device.type != "cpu"
        at_once = max(1, count if whole_batch else _PIXELS_AT_ONCE // (height * width))
        shown_BHWC = torch.empty_like(images_BHWC, memory_format=torch.contiguous_format)
        for first in range(0, count, at_once):
            part = slice(first, first + at_once)
            planes_BCHW = images_BHWC.new_empty((len(images_BHWC[part]), 3, height, width), dtype=torch.float32)
            # Plane by plane: several times as fast as a permuted copy.
            for channel in range(3):
                planes_BCHW[:, channel] = images_BHWC[part, ..., channel]
            planes_BCHW = _distort_planes(planes_BCHW, rows_B[part]).add_(0.5)
            for channel in range(3):
                shown_BHWC[part, ..., channel] = planes_BCHW[:, channel]
        return shown_BHWC


def _distort_planes(planes_BCHW: torch.Tensor, rows_B: NDArray[np.void]) -> torch.Tensor:
    """Return float32 planes in [0, 255], shape (B, 3, H, W); the ones given are used up."""
    for turn in range(len(_COLOURS)):
        for number, (name, neutral, step) in enumerate(_COLOURS):
            asked_B = (rows_B["order"][:, turn] == number) & (rows_B[name] != neutral)
            planes_BCHW = _where(asked_B, planes_BCHW, step, rows_B[name])
    planes_BCHW = _where(rows_B["grey"], planes_BCHW, lambda x_BCHW, _: x_BCHW.copy_(_grey(x_BCHW)), rows_B["grey"])
    return _where(rows_B["sigma"] > 0, planes_BCHW, _blur, rows_B["sigma"])


def _where(
    asked_B: NDArray[np.bool_],
    planes_BCHW: torch.Tensor,
    step: Callable[[torch.Tensor, NDArray[np.float32]], torch.Tensor],
    values_B: NDArray[np.float32],
) -> torch.Tensor:
    """Apply a step to the images that ask for it."""
    if asked_B.all():
        return step(planes_BCHW, values_B)
    if asked_B.any():
        rows = torch.from_numpy(np.flatnonzero(asked_B)).to(planes_BCHW.device)
        planes_BCHW.index_copy_(0, rows, step(planes_BCHW.index_select(0, rows), values_B[asked_B]))
    return planes_BCHW


def _column(values_B: NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values_B.astype(np.float32)).to(like.device).view(-1, 1, 1, 1)


def _grey(x_BCHW: torch.Tensor) -> torch.Tensor:
    red, green, blue = x_BCHW.split(1, dim=1)
    return red.mul(_GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def _brightness(x_BCHW: torch.Tensor, factors_B: NDArray[np.float32]) -> torch.Tensor:
    return x_BCHW.mul_(_column(factors_B, x_BCHW)).clamp_(0, 255)


def _contrast(x_BCHW: torch.Tensor, factors_B: NDArray[np.float32]) -> torch.Tensor:
    factors = _column(factors_B, x_BCHW)
    mean = _grey(x_BCHW.mean(dim=(2, 3), keepdim=True))
    return x_BCHW.mul_(factors).add_(mean * (1 - factors)).clamp_(0, 255)


def _saturation(x_BCHW: torch.Tensor, factors_B: NDArray[np.float32]) -> torch.Tensor:
    factors = _column(factors_B, x_BCHW)
    grey_B1HW = _grey(x_BCHW).mul_(1 - factors)
    return x_BCHW.mul_(factors).add_(grey_B1HW).clamp_(0, 255)


def _hue(x_BCHW: torch.Tensor, turns_B: NDArray[np.float32]) -> torch.Tensor:
    """Turn the hue of HSV (Smith 1978), value and chroma kept.

    With value v, chroma c and a hue of h sixths of a turn in (-3, 3], red being 0, the planes are
        x = v - c · clamp(2 - d, 0, 1),    d: h's distance on the circle from 3 (red), -1 (green) and 1 (blue),
    and from that |h| = 2 + (g + b - r - v) / c, with the sign of g - b.
    """
    red, green, blue = x_BCHW.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Without chroma there is no hue, and none is seen.
    sixths = (green + blue).sub_(red).sub_(value).div_(chroma.clamp_min(1e-6)).add_(2)
    turns = torch.copysign(sixths, green - blue).div_(6).add_(_column(turns_B, x_BCHW))
    opposite = torch.tensor([3 / 6, -1 / 6, 1 / 6], device=x_BCHW.device).view(1, 3, 1, 1)
    away_BCHW = turns - opposite
    away_BCHW.sub_(away_BCHW.round()).abs_()
    return torch.sub(value, away_BCHW.mul_(-6).add_(2).clamp_(0, 1).mul_(chroma), out=x_BCHW)


def _blur(x_BCHW: torch.Tensor, sigmas_B: NDArray[np.float32]) -> torch.Tensor:
    height, width = x_BCHW.shape[2:]
    # A border can mirror no more than the picture has.
    reach_B = np.minimum(np.ceil(3 * sigmas_B), min(height, width) - 1)
    reach = int(reach_B.max())
    taps = np.arange(reach + 1)
    weights_BT = np.exp(-0.5 * (taps / sigmas_B[:, None].astype(np.float64)) ** 2) * (taps <= reach_B[:, None])
    weights_BT /= (2 * weights_BT.sum(axis=1) - weights_BT[:, 0])[:, None]
    weights_T = [_column(weights_B, x_BCHW) for weights_B in weights_BT.T]
    x_BCHW = F.pad(x_BCHW, (reach, reach, reach, reach), mode="reflect")
    for axis, size in ((2, height), (3, width)):
        blurred_BCHW = x_BCHW.narrow(axis, reach, size) * weights_T[0]
        pair_BCHW = torch.empty_like(blurred_BCHW)
        for tap in taps[1:].tolist():
            torch.add(x_BCHW.narrow(axis, reach - tap, size), x_BCHW.narrow(axis, reach + tap, size), out=pair_BCHW)
            blurred_BCHW.addcmul_(pair_BCHW, weights_T[tap])
        x_BCHW = blurred_BCHW
    return x_BCHW


# What `order` counts: the field of a row, the value that changes nothing, the step.
_COLOURS: tuple[tuple[str, float, Callable[[torch.Tensor, NDArray[np.float32]], torch.Tensor]], ...] = (
    ("brightness", 1.0, _brightness),
    ("contrast", 1.0, _contrast),
    ("saturation", 1.0, _saturation),
    ("hue", 0.0, _hue),
)
