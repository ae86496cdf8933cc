"""Single-branch training: any sampler, any objective, any class weights, any mixing; plain cross-entropy by default.

    tailstream train erm [--data data/digits] [--method.q 0] [--method.objective gradual]
    … --method.objective ldam --method.weights effective --method.defer 0.8                      LDAM-DRW
    … --method.objective focal --method.weights effective                                        CB-focal
    … --method.q 0 --method.defer 0.8                                                            CE-DRS
    … --method.mix "manifold(partner_q=-1)"                        manifold mixup with two samplers (BBN, Table 1)

Measured: digits, 60 epochs, six first weights: 94.2 overall, 86.5 ± 6.1 on few-shot classes; half a minute each on one
core of an AMD EPYC. CIFAR-10-LT as JPEG, 20 epochs, three seeds: 49.0 ± 3.6, GraLoss 60.9 ± 1.8; a quarter of an hour.
Digits, 30 epochs, one seed: CE 89.1 overall and 74.3 on few-shot classes, CE-DRS 89.8 and 77.6, hard-aware 89.8 and
77.7, CB-focal 91.1 and 83.2, CE-DRW 92.0 and 82.7, RW 94.5 and 91.6, LDAM-DRW 94.7 and 88.3, manifold mixup with two
samplers 95.1 and 90.5; seeds differ by several points.
Published, ResNet-32, 200 epochs: CIFAR-10-LT 70.4, CIFAR-100-LT 38.3 (imbalance factor 100); LDAM-DRW 77.0 and 42.0.

    images, labels ── stream(q) ──> mix ──> network ──> l(z, y) ──> Σ w·l / Σ w
                        └─ from `defer` on (DRS)          └─ objective  └─ weights, from `defer` on (DRW)

q chooses the sampler, P(class j) ∝ n_j^q: 1 instance-balanced (the plain baseline), 0.5 square-root, 0 class-balanced,
-1 reversed, or progressive (Kang et al., "Decoupling Representation and Classifier", ICLR 2020, section 3). Objectives
are those of train/engine/objectives.py, weights of train/engine/weights.py, mixing of train/engine/mixing.py; `gradual`
(GraLoss) is stage one of GLAG, whose stage two is train/afg.py. Deferral is that of Cao et al., NeurIPS 2019.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jsonargparse.typing import NonNegativeFloat
from numpy.typing import NDArray

from pipeline.sampling import Exponent, class_probabilities, epochs_before
from pipeline.stream import Stream
from shards.errors import UserError
from train.engine.launch import run
from train.engine.method import Method, Progress, StepResult
from train.engine.mixing import PARTNERS, ManifoldMixup, make_mixing, said

if TYPE_CHECKING:  # torch comes with the run: see train/engine/launch.py
    from torch import Tensor

    from pipeline.batch import Batch


class ERM(Method):
    """Empirical risk minimisation: one branch, one stream, one objective."""

    name = "erm"
    in_title = frozenset({"method.q", "method.objective", "method.weights", "method.defer", "method.mix"})

    @dataclass
    class Settings:
        """The method's settings.

        Attributes:
            q: the sampling exponent, or progressive.
            objective: ce (cross-entropy), adjusted (logit-adjusted loss; with its tau of 1 balanced softmax), gradual
                (GraLoss), focal, ldam, smoothed (label-aware smoothing) or hard (hard-aware loss), with settings of its
                own in parentheses, such as "adjusted(tau=1.5)".
            weights: of classes: none, inverse (of their images) or effective (number of samples), such as
                "effective(beta=0.999)".
            defer: the share of the epochs that go by before weights and q apply, such as 0.8: deferred re-weighting
                (DRW) and re-sampling (DRS). Until then there are no weights, and the data as it is.
            mix: none, mixup, remix, cutmix or manifold (manifold mixup), such as "mixup(alpha=0.2)"; with
                partner_q, as in "manifold(partner_q=-1)", the partners come from a second stream with that exponent.
        """

        q: Exponent = 1.0
        objective: str = "ce"
        weights: str = "none"
        defer: NonNegativeFloat = 0.0
        mix: str = "none"

    def __init__(self, config: Any, train_counts_C: NDArray[np.int64]) -> None:
        from train.engine.calls import unusual
        from train.engine.objectives import Adjusted, make_objective
        from train.engine.weights import class_weights, make_weighting
        from train.networks.networks import build_network

        settings = config.method
        self._objective = make_objective(settings.objective, train_counts_C)
        self._defer, weighting = settings.defer, make_weighting(settings.weights)
        self._weights_C = None if weighting is None else class_weights(weighting, train_counts_C)
        self._mixing = make_mixing(settings.mix)
        network = build_network(
            "plain",
            num_classes=len(train_counts_C),
            classifier=self._objective.classifier,
            scale=self._objective.scale,
            **config.network(),
        )
        adjusted = self._objective if isinstance(self._objective, Adjusted) else None
        self._check(settings, config.model.backbone, network.depths, adjusted is not None)
        self.network = network
        augment, mix = config.input.augment, self._mixing.mix() if self._mixing else None
        train = Stream("train", q=settings.q, augment=augment, mix=mix, from_share=settings.defer)
        self.streams = (train,)
        if adjusted and settings.q != 1:
            adjusted.draw_by(lambda progress: _drawn(train_counts_C, train, progress))
        if self._mixing and self._mixing.partner_q is not None:
            self.streams += (Stream(PARTNERS, q=self._mixing.partner_q, augment=augment),)
        prefix, mixed = weighting.title if weighting else None, self._mixing.label if self._mixing else None
        own = unusual(self._objective.settings, self._objective.in_title)
        own += unusual(weighting) if weighting else []
        own += unusual(self._mixing, {"partner_q"}) if self._mixing else []
        own += [f"defer={settings.defer:g}"] if settings.defer not in (0, 0.8) else []  # LDAM-DRW's, and the field's
        self.title = ", ".join([_title(self._objective.title, prefix, settings, mixed), *own])

    def _check(self, settings: Any, backbone: str, depths: int, adjusts: bool) -> None:
        """Refuse settings that make no sense together."""
        if settings.defer >= 1:
            raise UserError(
                f"method.defer={settings.defer:g} defers to after the last epoch; give the share of the epochs that go"
                " by before, below 1, such as 0.8"
            )
        if settings.defer and self._weights_C is None and settings.q == 1:
            raise UserError(
                f"method.defer={settings.defer:g} has nothing to defer with method.weights=none and method.q=1; set one"
                " of these, such as --method.weights effective, or leave method.defer out"
            )
        if self._mixing is None:
            return
        if self._objective.counts_hits:
            raise UserError(
                f"method.objective={settings.objective} counts which images are recognised, and method.mix="
                f"{settings.mix} gives each two labels; choose another objective, or --method.mix none"
            )
        if adjusts and self._mixing.partner_q is not None:
            raise UserError(
                f"method.objective={settings.objective} adjusts for the classes that one sampler draws, and method.mix="
                f"{settings.mix} mixes those of two; leave partner_q out, or choose another objective"
            )
        if isinstance(self._mixing, ManifoldMixup) and self._mixing.depth != 0 and depths == 0:
            raise UserError(
                f"method.mix={settings.mix} mixes maps between a ResNet's stages, and model.backbone={backbone} shows"
                " none; choose mixup, or manifold(depth=0)"
            )
        if isinstance(self._mixing, ManifoldMixup) and self._mixing.depth != "random" and self._mixing.depth > depths:
            raise UserError(
                f"method.mix={settings.mix} is too deep: the trunk of model.backbone={backbone} has depths 0 to"
                f" {depths}; choose one of them"
            )

    def step(self, batch: "dict[str, Batch]", progress: Progress) -> StepResult:  # noqa: D102
        from train.engine.weights import mean_loss

        train, weights_C = batch["train"], None
        if self._weights_C is not None and progress.epoch > epochs_before(self._defer, progress.epochs):
            weights_C = self._weights_C = self._weights_C.to(train.labels_B.device)
        logits_BC = self._logits(batch, progress)
        loss = mean_loss(lambda labels_B: self._objective.losses(logits_BC, labels_B, progress), train, weights_C)
        return StepResult(loss, self._objective.sums(logits_BC, train.labels_B, progress))

    def _logits(self, batch: "dict[str, Batch]", progress: Progress) -> "Tensor":
        from train.networks.networks import HiddenMix

        train = batch["train"]
        if not isinstance(self._mixing, ManifoldMixup):  # pictures are mixed already
            logits_BC: Tensor = self.network(train.images_BHWC)
            return logits_BC
        assert train.hidden_partners_B is not None
        assert train.hidden_shares_B is not None
        depth = self._mixing.depth_of(progress, self.model.depths)
        mix = HiddenMix(depth, train.hidden_partners_B, train.hidden_shares_B)
        others_BHWC = batch[PARTNERS].images_BHWC if PARTNERS in batch else None
        mixed_BC: Tensor = self.network(train.images_BHWC, mix, others_BHWC)
        return mixed_BC

    def end_of_epoch(self, sums: "dict[str, Tensor]", progress: Progress) -> dict[str, float]:  # noqa: D102
        return self._objective.end_of_epoch(sums, progress)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return self._objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        self._objective.load_state_dict(state)


def _drawn(train_counts_C: NDArray[np.int64], stream: Stream, progress: Progress) -> NDArray[np.float64]:
    """Return the probability of drawing each class in an epoch, (C,), as `pipeline.plan.TrainPlan` has it."""
    epoch, epochs = progress.epoch - 1, progress.epochs
    return class_probabilities(train_counts_C, stream.at(epoch, epochs).q, epoch / max(1, epochs - 1))


def _title(objective: str, weighting: str | None, settings: Any, mixing: str | None) -> str:
    """Return what the field calls it: CE, CE-DRW, LDAM-DRW, CB-focal, RW, CE-DRS, mixup, Remix-DRW, …"""
    plain = objective == "CE"
    title = mixing if mixing and plain else objective
    if weighting and not settings.defer:
        title = weighting if weighting == "RW" and title == "CE" else f"{weighting}-{title}"
    elif weighting:
        title += "-DRW"
    if settings.q != 1 and settings.defer:
        title += "-DRS"
    if weighting == "RW" and settings.defer:
        title += ", inverse"
    if settings.q != 1 and not (settings.defer and settings.q == 0):
        title += f", q={said(settings.q)}"
    return f"{title} + {mixing}" if mixing and not plain else title


if __name__ == "__main__":
    run(ERM)
