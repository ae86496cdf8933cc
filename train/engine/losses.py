"""What is minimised for each image: the interface, and the losses that need no prior.

See `train.engine.objectives` for the formulas, and for how a setting names one.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shards.errors import UserError
from train.engine.method import Progress
from train.networks.cosine import SCALE
from train.networks.networks import Classifier

Form = Literal["convex", "linear", "concave"]


class Objective(ABC):
    """What is minimised for each image; made from its own settings and n_j, the training images of each class.

    Attributes:
        Settings: a dataclass of its settings; one that it does not have is refused.
        title: what tables call it.
        in_title: the settings that the title already says.
        classifier: the last layer that it wants: linear, or cosine (see `train.networks.networks.build_network`).
        scale: what cosines are multiplied by, where the classifier is cosine.
        counts_hits: whether it counts which images are recognised, which mixed ones cannot be.
    """

    @dataclass
    class Settings:
        """No settings."""

    classifier: Classifier = "linear"
    scale: float = SCALE
    counts_hits: ClassVar[bool] = False
    in_title: ClassVar[frozenset[str]] = frozenset()
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


class Focal(Objective):
    """(1 − p_y)^γ · −log p_y: what is recognised already weighs little.

    With class weights w it is w·(1 − p_y)^γ · −log p_y, CB-focal (Cui et al. 2019, Eq. 11). LDAM's code has exp(−w·CE)
    in the place of p_y, which is no probability.
    """

    @dataclass
    class Settings:
        """The settings.

        Attributes:
            gamma: γ; 0 is cross-entropy. Lin et al. have 2, LDAM's comparison 1.
        """

        gamma: NonNegativeFloat = 2.0

    title = "focal"

    def losses(self, logits_BC: Tensor, labels_B: Tensor, progress: Progress) -> Tensor:  # noqa: D102
        losses_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
        # 1 − p, exact for a small one; at 0 the power would have no gradient for a γ below 1.
        return (-torch.expm1(-losses_B)).clamp(min=1e-12) ** self.settings.gamma * losses_B


class LDAM(Objective):
    """Cosines c, from which the label's margin is taken before they are scaled: −log softmax(s·(c − Δ_y·e_y))_y.

    Δ_j ∝ n_j^(−1/4), and the largest of them is max_margin. The logits given are those of a cosine classifier, s·c.
    """

    @dataclass
    class Settings:
        """The settings, of which the authors' code has the defaults.

        Attributes:
            max_margin: the margin of the rarest class.
            scale: s.
        """

        max_margin: NonNegativeFloat = 0.5
        scale: PositiveFloat = 30.0

    classifier: Classifier = "cosine"
    title = "LDAM"

    def __init__(self, settings: Any, train_counts_C: NDArray[np.int64]) -> None:
        super().__init__(settings, train_counts_C)
        self.scale = settings.scale
        counts_C = torch.from_numpy(train_counts_C).double()
        margins_C = torch.where(counts_C > 0, counts_C.clamp(min=1) ** -0.25, 0)
        self._margins_C = (margins_C * (settings.max_margin / margins_C.max())).float()

    def losses(self, logits_BC: Tensor, labels_B: Tensor, progress: Progress) -> Tensor:  # noqa: D102
        self._margins_C = self._margins_C.to(logits_BC.device)
        margins_B1 = self.scale * self._margins_C[labels_B, None].to(logits_BC.dtype)
        return F.cross_entropy(logits_BC.scatter_add(1, labels_B[:, None], -margins_B1), labels_B, reduction="none")


class LabelAwareSmoothing(Objective):
    """(1 − ε_y)·−log p_y + ε_y·mean_k(−log p_k): the label keeps less where its class is frequent.

    ε_y = tail + (head − tail)·f((n_y − n_min) / (n_max − n_min)), where f(x) is sin(πx/2) (concave), x (linear) or
    1 − cos(πx/2) (convex; Eq. 3). The mean is over all classes, the label's included, as in the authors' code. Classes
    that are all equally frequent are all smoothed as the head.
    """

    @dataclass
    class Settings:
        """The settings; the defaults are the authors' for CIFAR-10-LT. For CIFAR-100-LT they have 0.4 and 0.1.

        Attributes:
            head: ε of the most frequent class.
            tail: ε of the rarest one.
            form: concave, linear or convex, between them.
        """

        head: ClosedUnitInterval = 0.3
        tail: ClosedUnitInterval = 0.0
        form: Form = "concave"

    title = "label-aware smoothing"

    def __init__(self, settings: Any, train_counts_C: NDArray[np.int64]) -> None:
        super().__init__(settings, train_counts_C)
        counts_C = torch.from_numpy(train_counts_C).double()
        least, most = counts_C[counts_C > 0].min(), counts_C.max()
        x_C = ((counts_C - least) / (most - least)).clamp(min=0) if most > least else torch.ones_like(counts_C)
        bend = {"linear": lambda x: x, "concave": lambda x: (x * math.pi / 2).sin(),
                "convex": lambda x: 1 - (x * math.pi / 2).cos()}[settings.form]  # fmt: skip
        self._smoothing_C = (settings.tail + (settings.head - settings.tail) * bend(x_C)).float()

    def losses(self, logits_BC: Tensor, labels_B: Tensor, progress: Progress) -> Tensor:  # noqa: D102
        self._smoothing_C = self._smoothing_C.to(logits_BC.device)
        epsilon_B = self._smoothing_C[labels_B]
        surprise_BC = -logits_BC.log_softmax(1)
        own_B = surprise_BC.gather(1, labels_B[:, None]).squeeze(1)
        return (1 - epsilon_B) * own_B + epsilon_B * surprise_BC.mean(1)


class HardAware(Objective):
    """−w̃_y·log p_y, where classes that were recognised badly in the epochs before weigh more: w̃ ← m·w̃ + 1/acc.

    acc is a class's accuracy on the training images of the epoch. Where the paper is silent: w̃ starts at 1/(1 − m),
    at which a class that is always recognised stays; an accuracy below `least` counts as `least`, so that a class that
    was never recognised has a weight; a class that the epoch did not show keeps its own; and as only the ratios of w̃
    separate classes, while their size would multiply the learning rate by some 1/(1 − m), the loss has them with a
    mean of 1 over the classes. The paper's fixed w is a weighting of `train.engine.weights`.
    """

    @dataclass
    class Settings:
        """The settings, for which the paper names no values.

        Attributes:
            momentum: m, below 1.
            least: the least accuracy that counts.
        """

        momentum: ClosedUnitInterval = 0.9
        least: PositiveFloat = 0.1

        def __post_init__(self) -> None:
            if self.momentum == 1:
                raise UserError("momentum=1 never forgets; it must be below 1")

    counts_hits = True
    title = "hard-aware"

    def __init__(self, settings: Any, train_counts_C: NDArray[np.int64]) -> None:
        super().__init__(settings, train_counts_C)
        self.weights_C = torch.full((len(train_counts_C),), 1 / (1 - settings.momentum))

    def losses(self, logits_BC: Tensor, labels_B: Tensor, progress: Progress) -> Tensor:  # noqa: D102
        self.weights_C = self.weights_C.to(logits_BC.device)
        weights_C = self.weights_C / self.weights_C.mean()
        return weights_C[labels_B] * F.cross_entropy(logits_BC, labels_B, reduction="none")

    def sums(self, logits_BC: Tensor, labels_B: Tensor, progress: Progress) -> dict[str, Tensor | float]:  # noqa: D102
        hits_B = (logits_BC.argmax(1) == labels_B).float()
        none_C = logits_BC.new_zeros(logits_BC.shape[1], dtype=torch.float32)
        return {
            "hits": none_C.scatter_add(0, labels_B, hits_B),
            "seen": none_C.scatter_add(0, labels_B, torch.ones_like(hits_B)),
        }

    def end_of_epoch(self, sums: dict[str, Tensor], progress: Progress) -> dict[str, float]:  # noqa: D102
        accuracy_C = (sums["hits"] / sums["seen"].clamp(min=1)).clamp(min=self.settings.least)
        old_C = self.weights_C.cpu().double()
        new_C = torch.where(sums["seen"] > 0, self.settings.momentum * old_C + 1 / accuracy_C, old_C)
        self.weights_C = new_C.float()
        return {"hardest": float(new_C.max() / new_C.mean())}

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"weights": self.weights_C.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        self.weights_C = state["weights"]
