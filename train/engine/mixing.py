"""Mixed batches, as a setting: which images are blended with which, by the plan, and hidden maps by the method.

    --method.mix "mixup(alpha=0.2)"                   a name of `MIXES`

    mixup      pictures and labels by one share (Zhang et al. 2018)
    remix      the same, the label going to the rarer class (Chou et al. 2020)
    cutmix     a box of the partner's picture pasted in (Yun et al. 2019)
    manifold   maps of the trunk instead of pictures (Verma et al. 2019), at a depth drawn for each step

With partner_q the partners come from a stream of their own: "manifold(partner_q=-1)" is BBN's manifold mixup with two
samplers.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat

from pipeline.mix import CutMix, Mix, Mixup, Remix
from pipeline.sampling import Exponent, random_generator
from shards.errors import UserError
from train.engine.calls import make_settings, no_settings, split_call, unknown
from train.engine.method import Progress

PARTNERS = "partners"  # the stream that partners come from, where they have one


@dataclass
class Mixing(ABC):
    """What the kinds of mixing share.

    Attributes:
        title: what tables call it.
        alpha: an image's share is drawn from Beta(alpha, alpha).
        probability: of a batch being mixed at all (of an image, with per_image).
        per_image: each image has a share of its own; the papers' code draws one for the batch.
        partner_q: the sampling exponent of a stream that partners come from; None: they are the batch's own.
    """

    title: ClassVar[str]

    alpha: PositiveFloat = 1.0
    probability: ClosedUnitInterval = 1.0
    per_image: bool = False
    partner_q: Exponent | None = None

    @abstractmethod
    def mix(self) -> Mix:
        """Return what the plan is asked for."""

    @property
    def partner(self) -> str | None:
        """The stream that partners come from; None for the stream's own."""
        return None if self.partner_q is None else PARTNERS

    @property
    def label(self) -> str:
        """What tables call it, with where its partners come from."""
        if self.partner_q is None:
            return self.title
        return f"{self.title}, two samplers" + ("" if self.partner_q == -1 else f", partners q={said(self.partner_q)}")


@dataclass
class PictureMixup(Mixing):
    """Mixup."""

    title = "mixup"

    def mix(self) -> Mix:  # noqa: D102
        return Mixup(self.alpha, self.partner, probability=self.probability, per_image=self.per_image)


@dataclass
class RarerMixup(Mixing):
    """Remix.

    Attributes:
        kappa: from which ratio of class sizes on the rarer class takes the label.
        tau: up to which share of the other one.
    """

    title = "Remix"

    kappa: PositiveFloat = 3.0
    tau: ClosedUnitInterval = 0.5

    def mix(self) -> Mix:  # noqa: D102
        return Remix(
            self.alpha,
            self.partner,
            probability=self.probability,
            per_image=self.per_image,
            kappa=self.kappa,
            tau=self.tau,
        )


@dataclass
class BoxMixing(Mixing):
    """CutMix."""

    title = "CutMix"

    def mix(self) -> Mix:  # noqa: D102
        return CutMix(self.alpha, self.partner, probability=self.probability, per_image=self.per_image)


@dataclass
class ManifoldMixup(Mixing):
    """Manifold mixup; its α of 2 and its depths are the authors' for CIFAR (Verma et al. 2019, section 5).

    Attributes:
        depth: 0 for the pictures, k for the maps after stage k of the trunk; random: one of 0, 1 and 2 for each step.
    """

    title = "manifold mixup"

    alpha: PositiveFloat = 2.0
    depth: NonNegativeInt | Literal["random"] = "random"

    def mix(self) -> Mix:  # noqa: D102
        return Mixup(self.alpha, self.partner, True, self.probability, self.per_image)

    def depth_of(self, progress: Progress, depths: int) -> int:
        """Return a step's depth, the same on every rank and in every part of the step."""
        if self.depth != "random":
            return self.depth
        generator = random_generator(progress.seed, "depth", progress.epoch, progress.step)
        return int(generator.integers(1 + min(2, depths)))


def said(q: Exponent) -> str:
    """Return a sampling exponent as titles say it: 0, -1, progressive."""
    return q if isinstance(q, str) else format(q, "g")


MIXES: dict[str, type[Mixing] | None] = {
    "none": None,
    "mixup": PictureMixup,
    "remix": RarerMixup,
    "cutmix": BoxMixing,
    "manifold": ManifoldMixup,
}


def make_mixing(text: str) -> Mixing | None:
    """Make a kind of mixing from "name" or "name(setting=value)", a name of `MIXES`.

    Raises:
        UserError: an unknown name, a setting that it does not have, or a value that it cannot have.
    """
    name, given = split_call("method.mix", text, "mixup or mixup(alpha=0.2)")
    if name not in MIXES:
        raise unknown("method.mix", name, MIXES)
    kind = MIXES[name]
    if kind is None:
        no_settings("method.mix", text, given)
        return None
    mixing = make_settings("method.mix", text, name, kind, given)
    try:
        mixing.mix()
    except UserError as error:
        raise UserError(f"method.mix={text}: {error}") from None
    return mixing
