"""A method from outside the project: two streams, a head that is not exported, sums over an epoch, state of its own.

python toy_method.py --data DIR --run DIR …
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.plan import Stream
from train.engine.launch import run
from train.engine.method import Method, StepResult, unwrapped
from train.networks.networks import build_network


class WithHead(nn.Module):
    """The model, and a second head on its features that only training uses."""

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.classifier.in_features, num_classes)

    def forward(self, images_BHWC, others_BHWC):
        features_BD = self.model.features(images_BHWC)
        return self.model.classify(features_BD), self.head(self.model.features(others_BHWC))


class Toy(Method):
    """Weighs each class by how rarely it was recognised in the epochs before."""

    name = "toy"

    @dataclass
    class Settings:
        """The method's settings.

        Attributes:
            share: of the second head's loss.
        """

        share: float = 0.5

    def __init__(self, config, train_counts_C):
        self.title = "Toy"
        self._share, self._classes = config.method.share, len(train_counts_C)
        self.streams = (Stream("first", augment=config.input.augment), Stream("second", q=0.0, augment="none"))
        self.network = WithHead(build_network("plain", num_classes=self._classes, **config.network()), self._classes)
        self._weights_C = torch.ones(self._classes)

    @property
    def model(self):
        return unwrapped(self.network).model

    def step(self, batch, progress):
        first, second = batch["first"], batch["second"]
        logits_BC, head_BC = self.network(first.images_BHWC, second.images_BHWC)
        loss = (F.cross_entropy(logits_BC, first.labels_B, reduction="none") * self._weights_C[first.labels_B]).mean()
        right_B = logits_BC.argmax(1) == first.labels_B
        sums = {
            "right": first.labels_B[right_B].bincount(minlength=self._classes),
            "seen": first.labels_B.bincount(minlength=self._classes),
            "head_loss": F.cross_entropy(head_BC, second.labels_B).detach(),
        }
        return StepResult(loss + self._share * F.cross_entropy(head_BC, second.labels_B), sums)

    def parameter_groups(self):
        network = self.network
        return [{"params": [*network.model.parameters()]}, {"params": [*network.head.parameters()], "lr_scale": 10.0}]

    def end_of_epoch(self, sums, progress):
        recall_C = sums["right"] / sums["seen"].clamp(min=1)
        self._weights_C = (0.5 * self._weights_C + 1 - recall_C).float()
        return {"recall": float(recall_C.mean()), "images": float(sums["seen"].sum())}

    def state_dict(self):
        return {"weights": self._weights_C}

    def load_state_dict(self, state):
        self._weights_C = state["weights"]


if __name__ == "__main__":
    run(Toy)
