"""Objectives: what a single branch minimises for each image.

    --method.objective "gradual(scale=0.5)"        a name of `OBJECTIVES`, or of a class elsewhere: my_module.MyLoss

    ce         −log softmax(z)_y
    adjusted   −log softmax(z + τ·log p)_y      logit-adjusted loss (Menon et al., ICLR 2021, Eq. 10); with τ = 1
                                                balanced softmax (Ren et al., NeurIPS 2020, Eq. 4)
    gradual    −log softmax(z + α(t)·log p)_y   gradual balanced loss, GraLoss (Zhang and Xiang 2022, Eq. 3 and 4)

z are the logits, y is the label, and p each class's share of what is drawn: of the training images, or, with a sampler
that favours some classes, what that makes of it (else they would be favoured twice). Plain logits predict.
"""

import ast
import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shards.errors import UserError
from train.engine.method import Progress


class Objective(ABC):
    """What is minimised for each image; made from its own settings and n_j, the training images of each class.

    Attributes:
        Settings: a dataclass of its settings; one that it does not have is refused.
        title: what tables call it.
        classifier: the last layer that it wants: linear, or cosine (see `train.networks.networks.build_network`).
    """

    @dataclass
    class Settings:
        """No settings."""

    classifier: ClassVar[str] = "linear"
    title: str

    def __init__(self, settings: Any, train_counts_C: NDArray[np.int64]) -> None:
        self.settings, self.train_counts_C = settings, train_counts_C

    @abstractmethod
    def losses(self, logits_BC: Tensor, labels_B: Tensor, progress: Progress) -> Tensor:
        """Return each image's loss, shape (B,), from logits (B, C), float32, and labels (B,), int64."""

    def sums(self, logits_BC: Tensor, labels_B: Tensor, progress: Progress) -> dict[str, Tensor | float]:
        """Return what is to be summed over the epoch: see `train.engine.method.StepResult`."""
        return {}

    def end_of_epoch(self, sums: dict[str, Tensor], progress: Progress) -> dict[str, float]:
        """Take the epoch's sums; return further numbers to log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what it keeps from step to step: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        assert not state, state.keys()


class CrossEntropy(Objective):
    """−log softmax(z)_y."""

    title = "CE"

    def losses(self, logits_BC: Tensor, labels_B: Tensor, progress: Progress) -> Tensor:  # noqa: D102
        return F.cross_entropy(logits_BC, labels_B, reduction="none")


class Adjusted(Objective):
    """−log softmax(z + τ·log p)_y: classes without training images are left out of the softmax."""

    @dataclass
    class Settings:
        """The settings.

        Attributes:
            tau: τ; 1 is balanced softmax, 0 cross-entropy.
        """

        tau: NonNegativeFloat = 1.0

    _shares_of_epoch: Callable[[Progress], NDArray[np.float64]] | None = None
    _prior_of: int | None = None

    def __init__(self, settings: Any, train_counts_C: NDArray[np.int64]) -> None:
        super().__init__(settings, train_counts_C)
        self.title = f"logit-adjusted, τ={settings.tau:g}" if settings.tau != 1 else "balanced softmax"
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
        """

        scale: NonNegativeFloat = 1.0
        base: PositiveFloat = 2.0

    def __init__(self, settings: Any, train_counts_C: NDArray[np.int64]) -> None:
        Objective.__init__(self, settings, train_counts_C)
        self.title = "GraLoss"
        self._log_prior_C = log_prior(train_counts_C)

    def strength(self, progress: Progress) -> float:  # noqa: D102
        return gradual_weight(progress.epoch, progress.epochs, self.settings.scale, self.settings.base)


def gradual_weight(epoch: int, epochs: int, scale: float, base: float) -> float:
    """Return α(t) = s·(c^t − 1), with t = T/T_max, from 1/T_max to 1 (Zhang and Xiang 2022, Eq. 3).

    Args:
        epoch: T, from 1.
        epochs: T_max.
        scale: s.
        base: c; 2 makes α rise to s. A base of 1 keeps it at 0, and one below 1 makes it negative.
    """
    return scale * (base ** (epoch / epochs) - 1)


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
    return F.cross_entropy(logits_BC + tau * log_prior_C, labels_B, reduction="none")


OBJECTIVES: dict[str, type[Objective]] = {"ce": CrossEntropy, "adjusted": Adjusted, "gradual": Gradual}


def make_objective(text: str, train_counts_C: NDArray[np.int64]) -> Objective:
    """Make an objective from "name" or "name(setting=value, …)".

    Args:
        text: the name is one of `OBJECTIVES`, or the dotted path of an `Objective` that can be imported.
        train_counts_C: n_j, shape (C,).

    Raises:
        UserError: an unknown name, a setting that the objective does not have, or a value that it cannot have.
    """
    name, given = _name_and_settings(text)
    kind = _find(name)
    known = [field.name for field in fields(kind.Settings)]
    for setting in given:
        if setting not in known:
            has = f"its settings are: {', '.join(known)}" if known else "it has no settings"
            raise UserError(f"method.objective={text}: {name} has no setting {setting!r}; {has}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind.Settings, name.replace(".", "_"))
    try:
        parsed = parser.instantiate(parser.parse_object({name.replace(".", "_"): given}))
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"method.objective={text}: {' '.join(str(error).split())}") from None
    return kind(parsed[name.replace(".", "_")], train_counts_C)


def _name_and_settings(text: str) -> tuple[str, dict[str, Any]]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        return ast.unparse(call.func), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise UserError(
            f"method.objective={text} is not understood; write it as gradual or gradual(scale=0.5)"
        ) from None


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
    near = difflib.get_close_matches(name, OBJECTIVES, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"method.objective={name} is unknown{guess}; choose one of: {', '.join(OBJECTIVES)}")
