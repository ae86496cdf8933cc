"""Objectives: what a single branch minimises for each image.

    --method.objective "gradual(scale=0.5)"        a name of `OBJECTIVES`, or of a class elsewhere: my_module.MyLoss

    ce         −log softmax(z)_y
    adjusted   −log softmax(z + τ·log p)_y      logit-adjusted loss (Menon et al., ICLR 2021, Eq. 10); with τ = 1
                                                balanced softmax (Ren et al., NeurIPS 2020, Eq. 4)
    gradual    −log softmax(z + α(t)·log p)_y   gradual balanced loss, GraLoss (Zhang and Xiang 2022, Eq. 3 and 4)
    focal      (1 − p_y)^γ · −log p_y           Lin et al., ICCV 2017, Eq. 4, with softmax in sigmoid's place
    ldam       −log softmax(z − s·Δ_y·e_y)_y    label-distribution-aware margins on scaled cosines (Cao et al.,
                                                NeurIPS 2019, Eq. 13)
    smoothed   −Σ_k t_k·log p_k                 label-aware smoothing (Zhong et al., CVPR 2021, Eq. 2 and 3)
    hard       −w_y·log p_y                     hard-aware loss (Zhang and Ye, SDNHL, section 2.3)

z are the logits, p_k = softmax(z)_k, y is the label, and p without an index each class's share of what is drawn: of the
training images, or, with a sampler that favours some classes, what that makes of it (else they would be favoured
twice). Plain logits predict. Class weights and mixed labels are settings of their own (`weights`, `mixing`), which
compose with any of these.
"""

import importlib
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shards.errors import UserError
from train.engine.calls import make_settings, split_call, unknown
from train.engine.losses import LDAM, CrossEntropy, Focal, Form, HardAware, LabelAwareSmoothing, Objective
from train.engine.method import Progress
from train.networks.cosine import SCALE


class Adjusted(Objective):
    """−log softmax(z + τ·log p)_y: classes without training images are left out of the softmax."""

    @dataclass
    class Settings:
        """The settings.

        Attributes:
            tau: τ; 1 is balanced softmax, 0 cross-entropy.
            cosine: whether z are scaled cosines, as LIFT has them (Shi et al., ICML 2024).
            scale: of the cosines.
        """

        tau: NonNegativeFloat = 1.0
        cosine: bool = False
        scale: PositiveFloat = SCALE

        def __post_init__(self) -> None:
            if self.scale != SCALE and not self.cosine:
                raise UserError(f"scale={self.scale:g} has no effect without cosine=True; leave it out or give both")

    in_title = frozenset({"tau", "cosine"})
    _shares_of_epoch: Callable[[Progress], NDArray[np.float64]] | None = None
    _prior_of: int | None = None

    def __init__(self, settings: Any, train_counts_C: NDArray[np.int64]) -> None:
        super().__init__(settings, train_counts_C)
        self.title = f"logit-adjusted, τ={settings.tau:g}" if settings.tau != 1 else "balanced softmax"
        if settings.cosine:
            self.title += ", cosine"
            self.classifier, self.scale = "cosine", settings.scale
        self._log_prior_C = log_prior(train_counts_C)

    def draw_by(self, shares_of_epoch: Callable[[Progress], NDArray[np.float64]]) -> None:
        """Take p, shape (C,), from a function of the epoch, as the stream has it, in the place of the training images'.

        Args:
            shares_of_epoch: returns the probability of drawing each class; it sums to 1.
        """
        self._shares_of_epoch = shares_of_epoch

    def losses(self, logits_BC: Tensor, labels_B: Tensor, progress: Progress) -> Tensor:  # noqa: D102
        if self._shares_of_epoch and self._prior_of != progress.epoch:
            self._log_prior_C, self._prior_of = log_prior(self._shares_of_epoch(progress)), progress.epoch
        self._log_prior_C = self._log_prior_C.to(logits_BC.device)
        return adjusted_cross_entropy(logits_BC, labels_B, self._log_prior_C, self.strength(progress))

    def sums(self, logits_BC: Tensor, labels_B: Tensor, progress: Progress) -> dict[str, Tensor | float]:  # noqa: D102
        return {"tau": self.strength(progress)}

    def strength(self, progress: Progress) -> float:
        """Return how far the logits are adjusted in this epoch."""
        return float(self.settings.tau)


class Gradual(Adjusted):
    """GraLoss: −log softmax(z + α(t)·log p)_y, where α(t) rises over the epochs."""

    @dataclass
    class Settings:
        """The settings.

        Attributes:
            scale: s of α(t) = s·(c^t − 1); the paper has 1, and 0.5 on iNaturalist.
            base: c; 2 makes α rise to s.
            form: convex, linear or concave (the paper's Table 5); see `gradual_weight`.
        """

        scale: NonNegativeFloat = 1.0
        base: PositiveFloat = 2.0
        form: Form = "convex"

    in_title = frozenset({"form"})

    def __init__(self, settings: Any, train_counts_C: NDArray[np.int64]) -> None:
        Objective.__init__(self, settings, train_counts_C)
        self.title = "GraLoss" if settings.form == "convex" else f"GraLoss, {settings.form}"
        self._log_prior_C = log_prior(train_counts_C)

    def strength(self, progress: Progress) -> float:  # noqa: D102
        return gradual_weight(progress.epoch, progress.epochs, *astuple(self.settings))


def gradual_weight(epoch: int, epochs: int, scale: float, base: float, form: Form = "convex") -> float:
    """Return α(t) = s·(c^t − 1), with t = T/T_max, from 1/T_max to 1 (Zhang and Xiang 2022, Eq. 3).

    Args:
        epoch: T, from 1.
        epochs: T_max.
        scale: s.
        base: c; 2 makes α rise to s. A base of 1 keeps it at 0, and one below 1 makes it negative.
        form: the paper draws three forms (Fig. 3) and gives the formula of one. The others here lead from 0 to the same
            end, s·(c − 1): linear in a straight line, and concave by Eq. 3 with 1/c and −s·c for c and s, which is the
            convex curve turned by half a turn.
    """
    t = epoch / epochs
    if form == "linear":
        return scale * (base - 1) * t
    if form == "concave":
        return scale * base * (1 - base**-t)
    return scale * (base**t - 1)


def log_prior(train_counts_C: NDArray[Any]) -> Tensor:
    """Return log p of each class from its training images, or its share (C,): float32 (C,), −∞ where it has none."""
    counts_C = torch.from_numpy(train_counts_C).double()
    return (counts_C / counts_C.sum()).log().float()


def adjusted_cross_entropy(logits_BC: Tensor, labels_B: Tensor, log_prior_C: Tensor, tau: float) -> Tensor:
    """Return −log softmax(z + τ·log p)_y of each image, shape (B,) (Zhang and Xiang 2022, Eq. 2 and 4).

    Args:
        logits_BC: z, of any floating dtype.
        labels_B: int64; of classes that have training images.
        log_prior_C: see `log_prior`.
        tau: τ, or α(t); at 0 this is cross-entropy over all classes.
    """
    if tau == 0:  # where 0·(−∞) would be no number
        return F.cross_entropy(logits_BC, labels_B, reduction="none")
    if tau < 0:  # which would make +∞ of −∞
        log_prior_C = log_prior_C.nan_to_num(neginf=torch.inf)
    return F.cross_entropy(logits_BC + tau * log_prior_C, labels_B, reduction="none")


OBJECTIVES: dict[str, type[Objective]] = {
    "ce": CrossEntropy,
    "adjusted": Adjusted,
    "gradual": Gradual,
    "focal": Focal,
    "ldam": LDAM,
    "smoothed": LabelAwareSmoothing,
    "hard": HardAware,
}


def make_objective(text: str, train_counts_C: NDArray[np.int64]) -> Objective:
    """Make an objective from "name" or "name(setting=value, …)".

    Args:
        text: the name is one of `OBJECTIVES`, or the dotted path of an `Objective` that can be imported.
        train_counts_C: n_j, shape (C,).

    Raises:
        UserError: an unknown name, a setting that the objective does not have, or a value that it cannot have.
    """
    name, given = split_call("method.objective", text, "gradual or gradual(scale=0.5)")
    kind = _find(name)
    return kind(make_settings("method.objective", text, name, kind.Settings, given), train_counts_C)


def _find(name: str) -> type[Objective]:
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, _, attribute = name.rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"method.objective={name} cannot be imported ({error}); is its folder on PYTHONPATH?"
            ) from None
        if isinstance(found, type) and issubclass(found, Objective):
            return found
        raise UserError(f"method.objective={name} is no Objective of {__name__}; derive it from that class")
    raise unknown("method.objective", name, OBJECTIVES)
