"""How one linear classifier is trained, and what came out."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Kind = Literal["scaled", "lws", "linear"]


@dataclass(frozen=True)
class Recipe:
    """How one linear classifier is trained: SGD on cross-entropy, with a cosine.

    Attributes:
        kind: scaled, s ⊙ (W·f + b), scales and weights learnt, from stage one's; lws, the same with W and b frozen
            (learnable weight scaling, Kang et al., ICLR 2020, section 4.2); linear, a fresh W·f + b.
        epochs, lr, momentum, weight_decay: of SGD.
        unit: the length of features that the rate is meant for: W is learnt as if features were divided by it.
        early_cosine: whether the cosine is stepped before the epoch, as the reference of Kang et al. does: the last
            epoch's rate is 0. Else the first epoch has the whole rate, and 0 comes after the last.
        beta: the view: β of generated features; None where there is only one view.
        distill, distill_base: s and c of α(t) = s·(c^(t/T) − 1), the weight of distillation (GLAG Eq. 11).
        teacher_tau: the teacher is stage one less τ·log prior.
        smoothing: label-aware smoothing (MiSLAS, Zhong et al., CVPR 2021, Eq. 3): ε of the largest and the smallest
            class; between them it follows a quarter of a sine.
        weights: of classes, as train/erm.py's `method.weights`: the loss of a step is Σ w·l / Σ w.
        weight_rate: the rate of W and b as a share of that of the scales.
    """

    kind: Kind
    epochs: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    unit: float = 1.0
    early_cosine: bool = False
    beta: float | None = None
    distill: float = 0.0
    distill_base: float = 2.0
    teacher_tau: float = 0.0
    smoothing: tuple[float, float] = (0.0, 0.0)
    weights: str = "none"
    weight_rate: float = 1.0

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch from 1."""
        done = epoch if self.early_cosine and self.epochs > 1 else epoch - 1  # of a single epoch it would be 0
        return self.lr * 0.5 * (1 + math.cos(math.pi * done / self.epochs))


@dataclass
class Trained:
    """A trained classifier.

    Attributes:
        recipe: how.
        linear: the plain layer that gives the same logits; None where the loss became infinite or nan.
        rows: a row of numbers per epoch.
        beta_C: β at the end where it is adaptive.
    """

    recipe: Recipe
    linear: nn.Linear | None
    rows: list[dict[str, Any]]
    beta_C: Tensor | None = None
