"""What a method asks the loader for."""

from dataclasses import dataclass, replace
from typing import Self

from numpy.typing import ArrayLike

from pipeline.mix import Mix
from pipeline.sampling import Exponent, epochs_before
from shards.errors import UserError


@dataclass(frozen=True)
class Stream:
    """What a method asks the loader for: a name, a sampler and an augmentation.

    Attributes:
        name: how the method finds the stream's batch; also part of the stream's random seed.
        q: the sampling exponent of P(class j) ∝ n_j^q, or "progressive"; q = 1 visits each image once per epoch.
        augment: a recipe of `pipeline.augment`, such as "imagenet+rand(2,9)".
        probabilities: P(class j), one for each class, in place of q.
        replacement: draw independently with q = 1 too, as all other samplers do anyway.
        shard_window: for storage with slow random reads: an epoch of q = 1 reads this many shards at a time (see
            `pipeline.sampling.epoch_order`). Draws with replacement know no such order: one that kept to some
            shards would change what a batch is made of.
        repeats: the name of a stream of the same plan whose ids this one shows again: a second view of the same
            images, with windows, flips and distortions of its own. In place of a sampler.
        mix: how each image is mixed with a partner; None for images as they are.
        from_share: the share of the run's epochs that go by before the sampler applies, from 0 to below 1; until then
            the stream visits each image once per epoch (deferred re-sampling; Cao et al. 2019).

    Raises:
        UserError: fields that exclude each other, or a shard_window or from_share out of range.
    """

    name: str
    q: Exponent = 1.0
    augment: str = "none"
    probabilities: ArrayLike | None = None
    replacement: bool = False
    shard_window: int | None = None
    repeats: str | None = None
    mix: Mix | None = None
    from_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.from_share < 1:
            raise UserError(
                f"stream {self.name!r} has from_share={self.from_share:g}; it must be at least 0, and below 1 so that"
                " its sampler applies in the last epoch at least"
            )
        chosen = [f"q={self.q}"] if self.q != 1 else []
        chosen += ["probabilities"] if self.probabilities is not None else []
        if len(chosen) == 2:
            raise UserError(f"stream {self.name!r} has both {chosen[0]} and probabilities; give one of them")
        chosen += ["replacement"] if self.replacement else []
        if self.shard_window is not None and chosen:
            raise UserError(
                f"stream {self.name!r} has shard_window={self.shard_window}, which orders an epoch of q=1,"
                f" and {chosen[0]}, which draws with replacement; leave one out"
            )
        if self.shard_window is not None and self.shard_window < 1:
            raise UserError(f"stream {self.name!r} has shard_window={self.shard_window}; it must be at least 1 shard")
        chosen += ["shard_window"] if self.shard_window is not None else []
        if self.repeats is not None and chosen:
            raise UserError(
                f"stream {self.name!r} repeats the ids of {self.repeats!r} and has {chosen[0]}; leave one out"
            )

    @property
    def permutes(self) -> bool:
        """Whether its sampler visits each image once per epoch; else it draws with replacement."""
        return self.q == 1 and self.probabilities is None and not self.replacement

    def at(self, epoch: int, epochs: int) -> Self:
        """Return the stream as it draws in an epoch counted from 0."""
        if epoch >= epochs_before(self.from_share, epochs):
            return self
        return replace(self, q=1.0, probabilities=None, replacement=False)
