"""Single-branch training: one stream drawn by any sampler, under any objective; plain cross-entropy by default.

    accelerate launch train/erm.py [--data data/digits] [--method.q 0] [--method.objective gradual]

Measured: digits, 60 epochs, six first weights: 94.2 overall, 86.5 ± 6.1 on few-shot classes; half a minute each on one
core of an AMD EPYC. CIFAR-10-LT as JPEG, 20 epochs, three seeds: 49.0 ± 3.6, GraLoss 60.9 ± 1.8; a quarter of an hour.
Published, ResNet-32, 200 epochs: CIFAR-10-LT 70.4, CIFAR-100-LT 38.3 (imbalance factor 100).

q chooses the sampler, P(class j) ∝ n_j^q: 1 instance-balanced (the plain baseline), 0.5 square-root, 0 class-balanced,
-1 reversed, or progressive (Kang et al., "Decoupling Representation and Classifier", ICLR 2020, section 3). The
objectives are those of train/networks/objectives.py; `gradual` (GraLoss) is stage one of GLAG, whose stage two is
train/afg.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from numpy.typing import NDArray

from pipeline.batch import Batch
from pipeline.plan import Stream
from pipeline.sampling import Exponent
from train.engine.launch import run
from train.engine.method import Method, Progress, StepResult, unwrapped
from train.networks.networks import build_network
from train.networks.objectives import Objective, adjusted_cross_entropy, gradual_weight, log_prior


class ERM(Method):
    """Empirical risk minimisation: one branch, one stream, one objective."""

    name = "erm"

    @dataclass
    class Settings:
        """The method's settings.

        Attributes:
            q: the sampling exponent, or progressive.
            objective: ce (cross-entropy), adjusted (by τ·log p: logit-adjusted loss, balanced softmax at τ = 1), or
                gradual (by α(t)·log p, GraLoss).
            tau: τ of adjusted.
            gradual: s of gradual's α(t) = s·(c^t − 1), with t from 0 in the first epoch to 1 in the last.
            gradual_base: c.
        """

        q: Exponent = 1.0
        objective: Objective = "ce"
        tau: NonNegativeFloat = 1.0
        gradual: NonNegativeFloat = 1.0
        gradual_base: PositiveFloat = 2.0

    def __init__(self, config: Any, train_counts_C: NDArray[np.int64]) -> None:
        self._settings = config.method
        q, tau = config.method.q, config.method.tau
        titles = {"ce": "CE", "adjusted": f"logit-adjusted, τ={tau:g}", "gradual": "GraLoss"}
        drawn = "" if q == 1 else f", q={q if isinstance(q, str) else format(q, 'g')}"
        self.title = titles[config.method.objective] + drawn
        self.streams = (Stream("train", q=q, augment=config.input.augment),)
        self.network = build_network("plain", config.model.backbone, len(train_counts_C), config.model.weights)
        self._log_prior_C = log_prior(train_counts_C)

    def step(self, batch: dict[str, Batch], progress: Progress) -> StepResult:  # noqa: D102
        images_BHWC, labels_B = batch["train"].images_BHWC, batch["train"].labels_B
        logits_BC = self.network(images_BHWC)
        self._log_prior_C = self._log_prior_C.to(logits_BC.device)
        tau = self._tau(progress)
        loss = adjusted_cross_entropy(logits_BC, labels_B, self._log_prior_C, tau)
        return StepResult(loss, logits_BC, {"tau": tau} if self._settings.objective != "ce" else {})

    def _tau(self, progress: Progress) -> float:
        """Return how far the logits are adjusted in this epoch."""
        match self._settings.objective:
            case "ce":
                return 0.0
            case "adjusted":
                return float(self._settings.tau)
            case "gradual":
                s, c = self._settings.gradual, self._settings.gradual_base
                return gradual_weight(progress.epoch, progress.epochs, s, c)
        raise AssertionError(self._settings.objective)

    def predict(self, images_BHWC: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return unwrapped(self.network)(images_BHWC)


if __name__ == "__main__":
    run(ERM)
