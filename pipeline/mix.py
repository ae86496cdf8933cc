"""Mixing: each image is blended with a partner, and its label with the partner's.

    Stream("train", mix=Mixup())                             Stream("uniform", mix=Mixup(partner="reversed"))

    global batch     a b | c d | e f | g h                   uniform     a b c d
    partners         b a | d c | f e | h g                   reversed    t u v w     partners
    rank 1 of 2                  e f | g h

Within a stream the neighbours of the global batch are each other's partners. As a batch is in random order already,
that is a random partner, like the row of a shuffled copy in the papers' code, except that none is its own. And it lies
in the same rank's slice and in the same accumulation part, so that mixing costs no picture more and is the same for any
number of either. Between two streams the images at the same place are partners.

The plan draws what `Mix.draw` says by (seed, stream, epoch, step) for the global batch, and every loader blends the
pictures on its device by the one function `Mix.blend`. With `hidden` it leaves them alone: the method blends hidden
maps (manifold mixup, Verma et al. 2019) by what its `Batch` says. A further kind of mixing is a subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import boxes_around, inside
from shards.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Mix(ABC):
    """How a stream's images are mixed.

    Attributes:
        alpha: an image's share is drawn from Beta(alpha, alpha).
        partner: the stream whose images are mixed in, or None for the stream's own.
        hidden: the method blends hidden maps itself, and gets the pictures as they are.
        probability: of a batch being mixed at all (of an image, with per_image).
        per_image: each image has a share of its own; the papers' code draws one for the batch.

    Raises:
        UserError: an alpha or probability out of range.
    """

    name: ClassVar[str]
    row: ClassVar[np.dtype[np.void]] = np.dtype([("share", "<f4")])  # what is drawn for an image

    alpha: float = 1.0
    partner: str | None = None
    hidden: bool = False
    probability: float = 1.0
    per_image: bool = False

    def __post_init__(self) -> None:
        if not (np.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"{self.name} has alpha={self.alpha:g}; it must be above 0 (1 is the papers')")
        if not 0 <= self.probability <= 1:
            raise UserError(f"{self.name} has probability={self.probability:g}; it must be from 0 to 1")

    def draw(self, generator: np.random.Generator, count: int, image_size: int) -> NDArray[np.void]:
        """Draw the share of each image of a global batch: shape (count,), dtype `row`; a share of 1 mixes nothing."""
        drawn = count if self.per_image else min(1, count)
        shares = generator.beta(self.alpha, self.alpha, drawn)
        mixed = generator.random(drawn) < self.probability
        rows_B = np.zeros(count, dtype=self.row)
        rows_B["share"] = np.where(mixed, shares, 1.0)
        return rows_B

    @abstractmethod
    def blend(self, images_BHWC: torch.Tensor, partners_BHWC: torch.Tensor, rows_B: NDArray[np.void]) -> torch.Tensor:
        """Return blended pictures, uint8 or float32, 0 … 255; the ones given, uint8 on any device, stay as they are."""

    def label_shares(
        self, rows_B: NDArray[np.void], labels_B: NDArray[Any], partners_B: NDArray[Any], counts_C: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return the weight of each image's own label, shape (B,); its partner's has the rest.

        Args:
            rows_B: what was drawn.
            labels_B: the images' labels.
            partners_B: the partners' labels.
            counts_C: n_j, training images of each class.
        """
        return rows_B["share"].astype(np.float32)

    def partner_rows(self, count: int) -> NDArray[np.int64]:
        """Return where in a batch of so many images each one's partner is, shape (count,)."""
        if self.partner is not None:
            return np.arange(count)
        assert count % 2 == 0, f"{count} images have no neighbour each"
        return np.arange(count) ^ 1


@dataclass(frozen=True)
class Mixup(Mix):
    """Pictures and labels by the same share (Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018)."""

    name = "mixup"

    def blend(self, images_BHWC: torch.Tensor, partners_BHWC: torch.Tensor, rows_B: NDArray[np.void]) -> torch.Tensor:  # noqa: D102
        import torch

        shares_B111 = torch.from_numpy(rows_B["share"].copy()).to(images_BHWC.device).view(-1, 1, 1, 1)
        return partners_BHWC.float().lerp_(images_BHWC.float(), shares_B111)


@dataclass(frozen=True)
class Remix(Mixup):
    """Mixup whose label goes to the rarer class (Chou et al., "Remix: Rebalanced Mixup", 2020, Eq. 8).

    With n_i and n_j images of the classes of image and partner and a share of λ, the weight of the image's label is
    0 where n_i / n_j ≥ κ and λ < τ, 1 where n_i / n_j ≤ 1 / κ and 1 − λ < τ, and else λ.

    Attributes:
        kappa: κ, from which ratio of class sizes on.
        tau: τ, up to which share of the rarer one's opponent.
    """

    name = "remix"

    kappa: float = 3.0
    tau: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kappa >= 1:
            raise UserError(f"remix has kappa={self.kappa:g}; it must be at least 1")
        if not 0 <= self.tau <= 1:
            raise UserError(f"remix has tau={self.tau:g}; it must be from 0 to 1")

    def label_shares(  # noqa: D102
        self, rows_B: NDArray[np.void], labels_B: NDArray[Any], partners_B: NDArray[Any], counts_C: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        shares_B = rows_B["share"].astype(np.float32)
        own_B, others_B = counts_C[labels_B], counts_C[partners_B]
        to_partner_B = (own_B >= self.kappa * others_B) & (shares_B < self.tau)
        to_own_B = (others_B >= self.kappa * own_B) & (1 - shares_B < self.tau)
        return np.where(to_partner_B, 0, np.where(to_own_B, 1, shares_B)).astype(np.float32)


@dataclass(frozen=True)
class CutMix(Mix):
    """A box of the partner's picture pasted in (Yun et al., "CutMix: Regularization Strategy…", 2019).

    The box covers a share of 1 − λ of the picture around a uniformly drawn centre, as far as it lies inside; an image's
    share is then the part of its pixels that are left.

    Raises:
        UserError: as `Mix`, or `hidden`, for which it is not defined.
    """

    name = "cutmix"
    row = np.dtype([("share", "<f4"), ("box", "<i4", (4,))])  # top, left, bottom, right

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden:
            raise UserError(
                "cutmix pastes pictures and cannot mix hidden maps; use mixup or remix, or leave hidden out"
            )

    def draw(self, generator: np.random.Generator, count: int, image_size: int) -> NDArray[np.void]:  # noqa: D102
        rows_B = super().draw(generator, count, image_size)
        drawn = count if self.per_image else min(1, count)
        sides_B = (image_size * np.sqrt(1.0 - rows_B["share"][:drawn])).astype(np.int64)
        rows_B["box"] = boxes_around(generator.integers(image_size, size=(drawn, 2)), sides_B, image_size)
        top_B, left_B, bottom_B, right_B = rows_B["box"].T
        rows_B["share"] = 1 - (bottom_B - top_B) * (right_B - left_B) / image_size**2
        return rows_B

    def blend(self, images_BHWC: torch.Tensor, partners_BHWC: torch.Tensor, rows_B: NDArray[np.void]) -> torch.Tensor:  # noqa: D102
        import torch

        return torch.where(inside(rows_B["box"], images_BHWC), partners_BHWC, images_BHWC)


MIXES: dict[str, type[Mix]] = {mix.name: mix for mix in (Mixup, CutMix, Remix)}
