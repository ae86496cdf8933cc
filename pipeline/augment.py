"""Augmentation recipes: which window of each stored image is shown, mirrored or not, and how it is distorted.

    --input.augment "imagenet+rand(2,9)+cutout(16)"         a crop, and any distortions that follow it
    --input.eval_augment "centre(0.95)+bicubic"             the centre square of 95 %, resized with a cubic filter

A recipe only draws numbers. Whoever loads the pictures cuts the window out of the stored image (black where it
reaches beyond the border), resizes it to the network's size with antialiasing (bilinear, unless the recipe says
bicubic), mirrors it where asked, and gives it to `pipeline.distort`. So every loader shows the same crops of the same
images in the same colours.

                stored image                     window (top, left, height, width)
        +---------------------------+            in pixels of the stored image
        |      +-----------+        |
        |      |  window   |  ----> resize to image_size x image_size, mirror or not, distort or not
        |      +-----------+        |
        +---------------------------+
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.distort import DISTORTIONS, Distortion, find_distortion, nearest
from pipeline.distortions import Strong
from shards.errors import UserError

Windows = NDArray[np.int32]  # shape (B, 4): top, left, height, width; may reach beyond the image
Flips = NDArray[np.bool_]  # shape (B,)
Interpolation = Literal["bilinear", "bicubic"]  # both antialiased: PIL's triangle filter, and its cubic one (a = −1/2)
BICUBIC: Final = "bicubic"


@dataclass(frozen=True)
class Recipe:
    """One augmentation.

    Attributes:
        name: what configurations call it.
        draw: `(generator, heights_B, widths_B, image_size) -> (windows_B4, flips_B)`.
        pads: whether windows may reach beyond the image (then no loader can decode the window alone).
        distortions: what is then done to the picture, in this order.
        centre_share: where the window is always the centre square: its side as a share of the shorter side.
        interpolation: how the window is resized.
    """

    name: str
    draw: Callable[[np.random.Generator, NDArray[np.int64], NDArray[np.int64], int], tuple[Windows, Flips]]
    pads: bool = False
    distortions: tuple[Distortion, ...] = ()
    centre_share: float | None = None
    interpolation: Interpolation = "bilinear"

    def draw_distortions(self, generator: np.random.Generator, count: int, image_size: int) -> NDArray[np.void] | None:
        """Draw what `pipeline.distort` does to each picture: shape (count,), a field for each distortion, or None."""
        if not self.distortions:
            return None
        drawn = {str(one): one.draw(generator, count, image_size) for one in self.distortions}
        distortions_B = np.zeros(count, dtype=[(name, rows.dtype, rows.shape[1:]) for name, rows in drawn.items()])
        for name, rows in drawn.items():
            distortions_B[name] = rows
        return distortions_B


def centre_windows(heights_B: NDArray[np.int64], widths_B: NDArray[np.int64], share: float) -> Windows:
    """Return centred squares whose side is `share` of the shorter side, shape (B, 4), int32."""
    sides_B = np.maximum(1, np.rint(np.minimum(heights_B, widths_B) * share)).astype(np.int64)
    tops_B, lefts_B = (heights_B - sides_B) // 2, (widths_B - sides_B) // 2
    return np.stack([tops_B, lefts_B, sides_B, sides_B], axis=1).astype(np.int32)


def _unflipped(windows_B4: Windows) -> tuple[Windows, Flips]:
    return windows_B4, np.zeros(len(windows_B4), dtype=np.bool_)


def _centre(name: str, share: float) -> Recipe:
    """Show the centre square, this share of the shorter side."""

    def draw(
        generator: np.random.Generator, heights_B: NDArray[np.int64], widths_B: NDArray[np.int64], image_size: int
    ) -> tuple[Windows, Flips]:
        return _unflipped(centre_windows(heights_B, widths_B, share))

    return Recipe(name, draw, centre_share=share)


def _eval(
    generator: np.random.Generator, heights_B: NDArray[np.int64], widths_B: NDArray[np.int64], image_size: int
) -> tuple[Windows, Flips]:
    """torchvision's Resize(256) and CenterCrop(224) in the stored image's pixels; the same part for any image_size."""
    stored_B2 = np.stack([heights_B, widths_B], axis=1)
    resized_B2 = 256 * stored_B2 // stored_B2.min(axis=1, keepdims=True)
    # Halves are rounded to even, as CenterCrop rounds them. In the stored image an edge is rounded to the next pixel.
    starts_B2 = np.rint((resized_B2 - 224) / 2)
    edges_2B2 = np.rint(np.stack([starts_B2, starts_B2 + 224]) * stored_B2 / resized_B2).astype(np.int32)
    return _unflipped(np.concatenate([edges_2B2[0], np.maximum(1, edges_2B2[1] - edges_2B2[0])], axis=1))


def _shift(
    generator: np.random.Generator, heights_B: NDArray[np.int64], widths_B: NDArray[np.int64], image_size: int
) -> tuple[Windows, Flips]:
    """Pad by an eighth and crop back (4 pixels of 32), without mirroring: for digits, text and other signs."""
    windows_B4 = centre_windows(heights_B, widths_B, 1.0)
    # Whole pixels of the network's input, as padding and cropping there would give.
    reach = image_size // 8
    shifts_B2 = generator.integers(-reach, reach + 1, size=(len(windows_B4), 2))
    windows_B4[:, :2] += np.rint(shifts_B2 * windows_B4[:, 2:] / image_size).astype(np.int32)
    return _unflipped(windows_B4)


def _cifar(
    generator: np.random.Generator, heights_B: NDArray[np.int64], widths_B: NDArray[np.int64], image_size: int
) -> tuple[Windows, Flips]:
    """Pad by an eighth (4 pixels of 32), crop back, mirror half of them (He et al. 2016, section 4.2)."""
    windows_B4, _ = _shift(generator, heights_B, widths_B, image_size)
    return windows_B4, generator.random(len(windows_B4)) < 0.5


def _imagenet(
    generator: np.random.Generator, heights_B: NDArray[np.int64], widths_B: NDArray[np.int64], image_size: int
) -> tuple[Windows, Flips]:
    """Random resized crop and mirroring (Szegedy et al. 2015).

    A share of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3 (log-uniform); of ten tries the first
    that fits inside the image, else the largest centred window within those ratios: torchvision's rule.
    """
    count, (narrowest, widest) = len(heights_B), (3 / 4, 4 / 3)
    window_h_B = np.maximum(1, np.minimum(heights_B, np.rint(widths_B / narrowest))).astype(np.int64)
    window_w_B = np.maximum(1, np.minimum(widths_B, np.rint(heights_B * widest))).astype(np.int64)
    misfits = np.arange(count)
    for _ in range(10):
        areas = (heights_B * widths_B)[misfits] * generator.uniform(0.08, 1.0, len(misfits))
        aspects = np.exp(generator.uniform(np.log(narrowest), np.log(widest), len(misfits)))
        tried_h, tried_w = np.rint(np.sqrt(areas / aspects)), np.rint(np.sqrt(areas * aspects))
        fits = (tried_h > 0) & (tried_h <= heights_B[misfits]) & (tried_w > 0) & (tried_w <= widths_B[misfits])
        window_h_B[misfits[fits]], window_w_B[misfits[fits]] = tried_h[fits], tried_w[fits]
        misfits = misfits[~fits]
        if not misfits.size:
            break
    room_2B = np.stack([heights_B - window_h_B, widths_B - window_w_B])
    starts_2B = np.floor(generator.random((2, count)) * (room_2B + 1)).astype(np.int64)
    starts_2B[:, misfits] = room_2B[:, misfits] // 2
    windows_B4 = np.stack([*starts_2B, window_h_B, window_w_B], axis=1).astype(np.int32)
    return windows_B4, generator.random(count) < 0.5


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _centre("none", 1.0),  # all of the shorter side
        Recipe("shift", _shift, pads=True),
        Recipe("cifar", _cifar, pads=True),
        Recipe("imagenet", _imagenet),
        Recipe("strong", _imagenet, distortions=(Strong(),)),
        Recipe("strong-cifar", _cifar, pads=True, distortions=(Strong(),)),
        Recipe("eval", _eval, centre_share=224 / 256),
    )
}


def check_fixed(text: str) -> None:
    """Raise a UserError for a recipe of evaluation that does not show each image in one way."""
    recipe = find_recipe(text)
    if recipe.centre_share is None or recipe.distortions:
        raise UserError(
            f"input.eval_augment={text} shows an image another way each time; use none, eval or centre(share), which"
            f" +{BICUBIC} may follow"
        )


@cache
def find_recipe(text: str) -> Recipe:
    """Return the recipe that a configuration asks for: a name of `RECIPES`, and distortions that follow it.

    Args:
        text: such as "cifar", "imagenet+bicubic+rand(2,9)+cutout(16)" or "centre(0.9)".

    Raises:
        UserError: an unknown name, with the choices, or arguments that a distortion does not take.
    """
    first, *others = (part.strip() for part in text.split("+"))
    share = re.fullmatch(r"centre\(\s*(\d*\.?\d+)\s*\)", first)
    if share and 0 < float(share[1]) <= 1:
        first = f"centre({float(share[1]):g})"
        recipe = _centre(first, float(share[1]))
    elif first in RECIPES:
        recipe = RECIPES[first]
    else:
        follow = ", ".join(f"+{DISTORTIONS[name].usage()}" for name in sorted(DISTORTIONS))
        raise UserError(
            f"no augmentation is called {first!r}; choose one of: {', '.join(RECIPES)}, centre(share), which any of"
            f" these may follow: +{BICUBIC}, {follow}{nearest(first, RECIPES)}"
        )
    if BICUBIC in others:
        others.remove(BICUBIC)
        first = f"{first}+{BICUBIC}"
        recipe = replace(recipe, interpolation=BICUBIC)
    distortions = recipe.distortions + tuple(find_distortion(part) for part in others)
    names = [str(distortion) for distortion in distortions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the augmentation {text!r} has {twice[0]} twice; leave one out")
    return replace(recipe, name="+".join([first, *names[len(recipe.distortions) :]]), distortions=distortions)
