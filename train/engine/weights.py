"""Class weights, which any objective may have, and the mean of a step's losses.

--method.weights "effective(beta=0.999)"          a name of `WEIGHTINGS`

inverse     w_j = 1 / n_j                         re-weighting (RW)
effective   w_j = (1 − β) / (1 − β^n_j)           effective number of samples (Cui et al., "Class-Balanced Loss
                                                  Based on Effective Number of Samples", CVPR 2019, Eq. 4)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch
from train.engine.calls import make_settings, no_settings, split_call, unknown


class Weighting(ABC):
    """How much each class weighs.

    Attributes:
        title: what tables put before an objective's title.
    """

    title: ClassVar[str]

    @abstractmethod
    def weigh(self, counts_J: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the weights of classes with so many training images, at least one each: shape (J,), above 0."""


@dataclass(frozen=True)
class Inverse(Weighting):
    """1 / n_j."""

    title = "RW"

    def weigh(self, counts_J: NDArray[np.float64]) -> NDArray[np.float64]:  # noqa: D102
        return 1 / counts_J


@dataclass(frozen=True)
class Effective(Weighting):
    """(1 − β) / (1 − β^n_j): from 1 for all at β = 0 to 1 / n_j at β = 1.

    Attributes:
        beta: β.
    """

    title = "CB"

    beta: ClosedUnitInterval = 0.9999

    def weigh(self, counts_J: NDArray[np.float64]) -> NDArray[np.float64]:  # noqa: D102
        if self.beta in (0, 1):  # the limits
            return np.ones_like(counts_J) if self.beta == 0 else 1 / counts_J
        # 1 − β^n without the digits that it would lose where β^n is close to 1.
        return (self.beta - 1) / np.expm1(counts_J * np.log(self.beta))


WEIGHTINGS: dict[str, type[Weighting] | None] = {"none": None, "inverse": Inverse, "effective": Effective}


def make_weighting(text: str) -> Weighting | None:
    """Make a weighting from "name" or "name(setting=value)", a name of `WEIGHTINGS`.

    Raises:
        UserError: an unknown name, a setting that the weighting does not have, or a value that it cannot have.
    """
    name, given = split_call("method.weights", text, "effective or effective(beta=0.999)")
    if name not in WEIGHTINGS:
        raise unknown("method.weights", name, WEIGHTINGS)
    kind = WEIGHTINGS[name]
    if kind is None:
        no_settings("method.weights", text, given)
        return None
    return make_settings("method.weights", text, name, kind, given)


def class_weights(weighting: Weighting, train_counts_C: NDArray[np.int64]) -> Tensor:
    """Return w_j, float32 (C,), with a mean of 1 over the classes that have training images, and 0 for the others."""
    present_C = train_counts_C > 0
    weights_C = np.zeros(len(train_counts_C))
    weights_C[present_C] = weighting.weigh(train_counts_C[present_C].astype(np.float64))
    return torch.from_numpy(weights_C * (present_C.sum() / weights_C.sum())).float()


def mean_loss(losses: Callable[[Tensor], Tensor], batch: Batch, weights_C: Tensor | None = None) -> Tensor:
    """Return Σ w·l / Σ w over the whole step's batch: a scalar, this part's share of it.

    A mixed image's loss is share · w_y·l(y) + (1 − share) · w_y'·l(y'), y' being its partner's label, and its weight
    likewise. The sum of the weights is that of the whole step, so the mean over parts and ranks is the mean of a batch
    that was never cut.

    Args:
        losses: labels (B,), int64 -> each image's loss (B,).
        batch: a part of a step's batch, with `step_counts_C` where there are weights.
        weights_C: w, shape (C,); None: 1 for each.
    """

    def weighted(labels_B: Tensor) -> Tensor:
        return losses(labels_B) if weights_C is None else weights_C[labels_B] * losses(labels_B)

    losses_B = weighted(batch.labels_B)
    if batch.partners_B is not None and batch.shares_B is not None:
        losses_B = batch.shares_B * losses_B + (1 - batch.shares_B) * weighted(batch.partners_B)
    if weights_C is None:
        return losses_B.mean()
    assert batch.step_counts_C is not None
    # No matrix product, which autocast would round to half precision.
    return losses_B.mean() * (batch.step_counts_C.sum() / (weights_C * batch.step_counts_C).sum())
