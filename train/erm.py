"""Single-branch training: one stream drawn by any sampler, under any objective; plain cross-entropy by default.

    accelerate launch train/erm.py [--data data/digits] [--method.q 0] [--method.objective gradual]

Measured: digits, 60 epochs, six first weights: 94.2 overall, 86.5 ± 6.1 on few-shot classes; half a minute each on one
core of an AMD EPYC. CIFAR-10-LT as JPEG, 20 epochs, three seeds: 49.0 ± 3.6, GraLoss 60.9 ± 1.8; a quarter of an hour.
Published, ResNet-32, 200 epochs: CIFAR-10-LT 70.4, CIFAR-100-LT 38.3 (imbalance factor 100).

q chooses the sampler, P(class j) ∝ n_j^q: 1 instance-balanced (the plain baseline), 0.5 square-root, 0 class-balanced,
-1 reversed, or progressive (Kang et al., "Decoupling Representation and Classifier", ICLR 2020, section 3). The
objectives are those of train/engine/objectives.py; `gradual` (GraLoss) is stage one of GLAG, whose stage two is
train/afg.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch
from pipeline.plan import Stream
from pipeline.sampling import Exponent, class_probabilities
from train.engine.launch import run
from train.engine.method import Method, Progress, StepResult
from train.engine.objectives import Adjusted, make_objective
from train.networks.networks import build_network


class ERM(Method):
    """Empirical risk minimisation: one branch, one stream, one objective."""

    name = "erm"

    @dataclass
    class Settings:
        """The method's settings.

        Attributes:
            q: the sampling exponent, or progressive.
            objective: ce (cross-entropy), adjusted (logit-adjusted loss; with its tau of 1 balanced softmax) or gradual
                (GraLoss), with settings of its own in parentheses, such as "adjusted(tau=1.5)".
        """

        q: Exponent = 1.0
        objective: str = "ce"

    def __init__(self, config: Any, train_counts_C: NDArray[np.int64]) -> None:
        q, model = config.method.q, config.model
        self._objective = make_objective(config.method.objective, train_counts_C)
        if isinstance(self._objective, Adjusted) and q != 1:
            self._objective.draw_by(lambda progress: _drawn(train_counts_C, q, progress))
        drawn = "" if q == 1 else f", q={q if isinstance(q, str) else format(q, 'g')}"
        self.title = self._objective.title + drawn
        self.streams = (Stream("train", q=q, augment=config.input.augment),)
        self.network = build_network("plain", model.backbone, len(train_counts_C), model.weights)

    def step(self, batch: dict[str, Batch], progress: Progress) -> StepResult:  # noqa: D102
        images_BHWC, labels_B = batch["train"].images_BHWC, batch["train"].labels_B
        logits_BC = self.network(images_BHWC)
        losses_B = self._objective.losses(logits_BC, labels_B, progress)
        return StepResult(losses_B.mean(), self._objective.sums(logits_BC, labels_B, progress))

    def end_of_epoch(self, sums: dict[str, Tensor], progress: Progress) -> dict[str, float]:  # noqa: D102
        return self._objective.end_of_epoch(sums, progress)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return self._objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        self._objective.load_state_dict(state)


def _drawn(train_counts_C: NDArray[np.int64], q: Exponent, progress: Progress) -> NDArray[np.float64]:
    """Return the probability of drawing each class in an epoch, (C,), as `pipeline.plan.TrainPlan` has it."""
    return class_probabilities(train_counts_C, q, (progress.epoch - 1) / max(1, progress.epochs - 1))


if __name__ == "__main__":
    run(ERM)
