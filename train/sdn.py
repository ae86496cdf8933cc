"""SDNHL: the strong-weak dual-branch network with hard-aware loss (Zhang and Ye).

    tailstream train sdn [--data data/digits] [--method.gamma 0.3] [--method.hard_from 1]

    images, weak view ───> trunk ──> weak branch ────> z_w ── L(z_w, y) ──┐
       │ (the same ones)     ║                          └── KL(P_s‖P_w)   ├─(+)─> λ·(L_w + L_s) + (1−λ)·[b − KL]₊
       └ strong view ────> trunk ──> strong branch ──> z_s ── L(z_s, y) ──┘
    λ = (T/T_max)^γ: first the branches part, then they classify (D2C);  L = LDAM-DRW, at last the hard-aware loss

Measured: digits, 30 epochs, one first weight: 95.8 overall, 91.1 on few-shot classes (CE: 89.1, 74.3).
Published, ResNet-32, 200 epochs: CIFAR-10-LT 81.1, CIFAR-100-LT 50.6 (imbalance factor 100). There is no public code.

The strong view adds colours with a probability of 0.8, grey 0.2 and blur 0.5 to the training recipe. Where the paper
leaves a choice, this is what was made of it:

- Its text maximises KL(P_s‖P_w), and its loss adds it with a plus sign, which would minimise it. Here it is maximised.
  KL has no upper bound, and early on, when 1−λ is nearly 1, maximising it would do nothing but raise logits. So each
  image's divergence is raised up to b (`bound`, in nats) and no further: (1−λ)·max(0, b − KL).
- What the branches share is not said; as in BBN it is the trunk up to the last block, and each stream has batch
  statistics of its own. Each branch has a classifier of its own, on cosines, as LDAM asks.
- "LDAM-DRW for the first 160 of 200 epochs, the hard-aware loss for the last 40": LDAM's own code defers its weights to
  epoch 160 too, so they weigh the hard-aware loss, whose formula has such weights w beside its own w̃. `defer` may let
  them begin earlier. Each branch has its own w̃, by its own accuracy, counted from the first epoch on.
- How two branches predict is not said. The mean of their logits does, which is one linear classifier on both branches'
  features: so second stages and export take the model as any other.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat
from numpy.typing import NDArray

from pipeline.sampling import epochs_before
from pipeline.stream import Stream
from shards.errors import UserError
from train.engine.launch import run
from train.engine.method import Method, Progress, StepResult

if TYPE_CHECKING:  # torch comes with the run: see train/engine/launch.py
    from torch import Tensor

    from pipeline.batch import Batch

BRANCHES = ("weak", "strong")


def classification_weight(epoch: int, epochs: int, gamma: float) -> float:
    """Return λ = (T/T_max)^γ, with T from 1 (SDNHL, section 2.2): 1 throughout for a γ of 0."""
    return float((epoch / epochs) ** gamma)


def divergences(logits_s_BC: "Tensor", logits_w_BC: "Tensor") -> "Tensor":
    """Return KL(P_s‖P_w) = Σ_i P_s^i·log(P_s^i / P_w^i) of each image, in nats, shape (B,) (SDNHL, section 2.1)."""
    from torch.nn import functional as F

    log_s_BC, log_w_BC = logits_s_BC.log_softmax(1), logits_w_BC.log_softmax(1)
    return F.kl_div(log_w_BC, log_s_BC, reduction="none", log_target=True).sum(1)


class SDN(Method):
    """Two views of each image, two branches, and a loss that parts them before it classifies."""

    name = "sdn"

    @dataclass
    class Settings:
        """The method's settings.

        Attributes:
            gamma: γ of λ = (T/T_max)^γ: 1 linear, below 1 concave, above convex, 0 no difference loss (Table 6).
            bound: up to which divergence, in nats, the branches are driven apart.
            objective: each branch's classification loss, as in train/erm.py.
            weights: of classes, as in train/erm.py.
            defer: the share of the epochs that go by before weights apply.
            hard: the classification loss of the last part.
            hard_from: the share of the epochs that go by before it; 1 leaves it out (SDN without HL).
        """

        gamma: NonNegativeFloat = 1.0
        bound: PositiveFloat = 1.0
        objective: str = "ldam"
        weights: str = "effective"
        defer: NonNegativeFloat = 0.8
        hard: str = "hard"
        hard_from: ClosedUnitInterval = 0.8

    def __init__(self, config: Any, train_counts_C: NDArray[np.int64]) -> None:
        from train.engine.objectives import make_objective
        from train.engine.weights import class_weights, make_weighting
        from train.networks.networks import build_network

        settings = config.method
        self._settings, weighting = settings, make_weighting(settings.weights)
        if weighting is not None and settings.defer >= 1:
            raise UserError(
                f"method.defer={settings.defer:g} defers to after the last epoch; give a share of the epochs below 1,"
                " or --method.weights none"
            )
        self._weights_C = None if weighting is None else class_weights(weighting, train_counts_C)
        # Of its own for each branch: some count what they recognise.
        self._objectives = {
            (branch, part): make_objective(text, train_counts_C)
            for branch in BRANCHES
            for part, text in (("first", settings.objective), ("last", settings.hard))
        }
        first, last = self._objectives["weak", "first"], self._objectives["weak", "last"]
        if (last.classifier, last.scale) not in (("linear", last.scale), (first.classifier, first.scale)):
            raise UserError(
                f"method.hard={settings.hard} wants another classifier than method.objective={settings.objective};"
                " give both the same"
            )
        self.title = "SDN" if settings.hard_from == 1 else "SDNHL"
        weak = Stream("weak", augment=config.input.augment)
        self.streams = (weak, Stream("strong", augment=f"{weak.augment}+strong", repeats="weak"))
        self.network = build_network(
            "bilateral",
            num_classes=len(train_counts_C),
            classifier=first.classifier,
            scale=first.scale,
            **config.network(),
        )

    def step(self, batch: "dict[str, Batch]", progress: Progress) -> StepResult:  # noqa: D102
        from train.engine.weights import mean_loss

        settings, weights_C = self._settings, None
        if self._weights_C is not None and progress.epoch > epochs_before(settings.defer, progress.epochs):
            weights_C = self._weights_C = self._weights_C.to(batch["weak"].labels_B.device)
        part = "last" if progress.epoch > epochs_before(settings.hard_from, progress.epochs) else "first"
        logits_w_BC, logits_s_BC = self.network(batch["weak"].images_BHWC, batch["strong"].images_BHWC)
        logits = {"weak": logits_w_BC, "strong": logits_s_BC}

        def classification(branch: str) -> "Tensor":
            objective = self._objectives[branch, part]
            return mean_loss(lambda y_B: objective.losses(logits[branch], y_B, progress), batch[branch], weights_C)

        divergences_B = divergences(logits_s_BC, logits_w_BC)
        lambda_ = classification_weight(progress.epoch, progress.epochs, settings.gamma)
        loss = lambda_ * (classification("weak") + classification("strong"))
        loss = loss + (1 - lambda_) * (settings.bound - divergences_B).clamp(min=0).mean()
        sums: dict[str, Tensor | float] = {"lambda": lambda_, "divergence": divergences_B.mean()}
        for (branch, part), objective in self._objectives.items():
            for name, value in objective.sums(logits[branch], batch[branch].labels_B, progress).items():
                sums[f"{branch}_{part}_{name}"] = value
        return StepResult(loss, sums)

    def end_of_epoch(self, sums: "dict[str, Tensor]", progress: Progress) -> dict[str, float]:  # noqa: D102
        logged: dict[str, float] = {}
        for (branch, part), objective in self._objectives.items():
            prefix = f"{branch}_{part}_"
            own = {name.removeprefix(prefix): value for name, value in sums.items() if name.startswith(prefix)}
            logged |= {f"{branch}_{name}": value for name, value in objective.end_of_epoch(own, progress).items()}
        return logged

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {f"{branch}_{part}": objective.state_dict() for (branch, part), objective in self._objectives.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        for (branch, part), objective in self._objectives.items():
            objective.load_state_dict(state[f"{branch}_{part}"])


if __name__ == "__main__":
    run(SDN)
