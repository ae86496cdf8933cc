"""BBN: the bilateral-branch network with cumulative learning (Zhou et al., CVPR 2020).

    tailstream train bbn [--data data/digits] [--method.adaptor linear_decay] [--method.q 0]

    uniform stream ──> trunk ──> conventional branch ──> f_c ──> z_c = 2·W_c·f_c + b ── ·α ─────┐
                         ║                                                                      ├─(+)─> z
    reversed stream ─> trunk ──> re-balancing branch ──> f_r ──> z_r = 2·W_r·f_r + b ── ·(1-α) ─┘
    loss = α·CE(z, y_c) + (1-α)·CE(z, y_r),    α from 1 to 0 over the epochs

Measured: digits, 60 epochs, six first weights: 94.6 overall, 90.9 ± 3.1 on few-shot classes (CE: 94.2, 86.5 ± 6.1); a
minute each on one core of an AMD EPYC. Published, ResNet-32, 200 epochs: CIFAR-10-LT 79.8, CIFAR-100-LT 42.6
(imbalance factor 100); iNaturalist 2018, ResNet-50: 66.3, with twice the epochs 69.6. Its users report less than the
paper.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat
from numpy.typing import NDArray

from pipeline.sampling import Exponent, epochs_before, random_generator
from pipeline.stream import Stream
from shards.errors import UserError
from train.engine.launch import run
from train.engine.method import Method, Progress, StepResult

if TYPE_CHECKING:  # torch comes with the run: see train/engine/launch.py
    from torch import Tensor

    from pipeline.batch import Batch

Adaptor = Literal["equal", "beta", "parabolic_increment", "linear_decay", "cosine_decay", "parabolic_decay", "separate"]
ADAPTORS: tuple[Adaptor, ...] = get_args(Adaptor)


def adaptor_alpha(
    adaptor: Adaptor, epoch: int, last_epoch: int, seed: int = 0, step: int = 0, separation: float = 0.6
) -> float:
    """Return α, the weight of the conventional branch (BBN, Table 4; the default is Eq. 5).

    Args:
        adaptor: which of Table 4's strategies; or separate, two stages one after the other, which the authors' code
            holds in a comment: α is 1 until 0.6 of the epochs, 120 of 200, are gone by, and then 0.
        epoch: T, from 1. As in the authors' code the formulas take T - 1, so that training begins with α = 1.
        last_epoch: T_max, where decaying strategies reach 0; 0 is kept beyond it.
        seed, step: what "beta" draws from Beta(0.2, 0.2) with; the others do not look at them.
        separation: the share of T_max at which "separate" changes.

    Returns:
        α in [0, 1].
    """
    t = min(1.0, (epoch - 1) / last_epoch)
    match adaptor:
        case "equal":
            return 0.5
        case "beta":
            return float(random_generator(seed, "alpha", epoch, step).beta(0.2, 0.2))
        case "parabolic_increment":
            return t**2
        case "linear_decay":
            return 1 - t
        case "cosine_decay":
            return max(0.0, math.cos(t * math.pi / 2))
        case "parabolic_decay":
            return 1 - t**2
        case "separate":
            return 1.0 if epoch <= epochs_before(separation, last_epoch) else 0.0


def bbn_loss(logits_BC: "Tensor", labels_c_B: "Tensor", labels_r_B: "Tensor", alpha: float) -> "Tensor":
    """Return α·E(p, y_c) + (1-α)·E(p, y_r) (BBN, Eq. 3): a scalar from logits (B, C) and int64 labels (B,)."""
    from torch.nn.functional import cross_entropy

    return alpha * cross_entropy(logits_BC, labels_c_B) + (1 - alpha) * cross_entropy(logits_BC, labels_r_B)


class BBN(Method):
    """Two streams, two branches, one α."""

    name = "bbn"

    @dataclass
    class Settings:
        """The method's settings.

        Attributes:
            adaptor: how α goes over the epochs (Table 4), or separate: the conventional branch alone, and then the
                re-balancing one.
            alpha_span: T_max of the adaptor over the run's epochs; the authors' code has 100 for 90 epochs and 200
                for 180, so that α does not reach 0 there.
            separation: the share of T_max that the first stage of separate takes.
            q: the sampling exponent of the re-balancing stream (Table 3): -1 reversed, 0 balanced, 1 uniform.
        """

        adaptor: Adaptor = "parabolic_decay"
        alpha_span: PositiveFloat = 1.0
        separation: ClosedUnitInterval = 0.6
        q: Exponent = -1.0

    def __init__(self, config: Any, train_counts_C: NDArray[np.int64]) -> None:
        from train.networks.networks import build_network

        self.title = "BBN"
        self._settings = config.method
        separation = config.method.separation
        if config.method.adaptor != "separate" and separation != BBN.Settings.separation:
            raise UserError(
                f"method.separation={separation:g} has no effect with method.adaptor={config.method.adaptor}; leave it"
                " out, or choose separate"
            )
        self.streams = (
            Stream("uniform", q=1.0, augment=config.input.augment),
            Stream("reversed", q=config.method.q, augment=config.input.augment),
        )
        self.network = build_network("bilateral", num_classes=len(train_counts_C), **config.network())

    def step(self, batch: "dict[str, Batch]", progress: Progress) -> StepResult:  # noqa: D102
        alpha = adaptor_alpha(
            self._settings.adaptor,
            progress.epoch,
            max(1, round(self._settings.alpha_span * progress.epochs)),
            progress.seed,
            progress.step,
            self._settings.separation,
        )
        uniform, reversed_ = batch["uniform"], batch["reversed"]
        logits_c_BC, logits_r_BC = self.network(uniform.images_BHWC, reversed_.images_BHWC)
        logits_BC = alpha * logits_c_BC + (1 - alpha) * logits_r_BC
        return StepResult(bbn_loss(logits_BC, uniform.labels_B, reversed_.labels_B, alpha), {"alpha": alpha})


if __name__ == "__main__":
    run(BBN)
