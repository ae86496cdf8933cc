"""Single-branch training with cross-entropy: the baseline that everything is compared with.

    accelerate launch train/erm.py [--data data/digits] [--method.q 0]

Measured: digits, 60 epochs, six first weights: 94.2 overall, 86.5 ± 6.1 on few-shot classes; half a minute each on one
core of an AMD EPYC. Published, ResNet-32, 200 epochs: CIFAR-10-LT 70.4, CIFAR-100-LT 38.3 (imbalance factor 100).

q chooses the sampler, P(class j) ∝ n_j^q: 1 instance-balanced (the plain baseline), 0.5 square-root, 0 class-balanced,
-1 reversed, or progressive (Kang et al., "Decoupling Representation and Classifier", ICLR 2020, section 3).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from pipeline.batch import Batch
from pipeline.plan import Stream
from pipeline.sampling import Exponent
from train.loop import run
from train.method import Method, Progress, StepResult, unwrapped
from train.networks import build_network


class ERM(Method):
    """Empirical risk minimisation: one branch, one stream, cross-entropy."""

    name = "erm"

    @dataclass
    class Settings:
        """The method's settings.

        Attributes:
            q: the sampling exponent, or progressive.
        """

        q: Exponent = 1.0

    def __init__(self, config: Any, num_classes: int) -> None:
        q = config.method.q
        self.title = "CE" if q == 1 else f"CE, q={q if isinstance(q, str) else format(q, 'g')}"
        self.streams = (Stream("train", q=q, augment=config.input.augment),)
        self.network = build_network("plain", config.model.backbone, num_classes, config.model.weights)

    def step(self, batch: dict[str, Batch], progress: Progress) -> StepResult:  # noqa: D102
        images_BHWC, labels_B = batch["train"].images_BHWC, batch["train"].labels_B
        logits_BC = self.network(images_BHWC)
        return StepResult(F.cross_entropy(logits_BC, labels_B), logits_BC)

    def predict(self, images_BHWC: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return unwrapped(self.network)(images_BHWC)


if __name__ == "__main__":
    run(ERM)
