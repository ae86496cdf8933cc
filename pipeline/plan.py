"""Plans: what each rank loads at each step, for every stream, before a byte is read.

seed, epoch, step ──> ids of the global batch ──> rank's slice ──> Draw(ids, windows, flips, …) ──> any loader

                   global batch of 8, two ranks          (one world size or another:
    uniform     [ a b c d | e f g h ]                     the same eight images)
    reversed    [ t t u v | w t x u ]
                  rank 0     rank 1
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.augment import Flips, Recipe, Windows, draw_distortions, find_recipe
from pipeline.sampling import Exponent, class_probabilities, draw_ids, epoch_permutation, random_generator
from shards.errors import UserError
from shards.index import Split


@dataclass(frozen=True)
class Stream:
    """What a method asks the loader for: a name, a sampler and an augmentation.

    Attributes:
        name: how the method finds the stream's batch; also part of the stream's random seed.
        q: the sampling exponent of P(class j) ∝ n_j^q, or "progressive"; q = 1 visits each image once per epoch.
        augment: the name of a recipe of `pipeline.augment`.
    """

    name: str
    q: Exponent = 1.0
    augment: str = "none"


@dataclass(frozen=True)
class Draw:
    """One rank's part of one stream's batch, in the order of the global batch.

    Attributes:
        ids_B: sample ids, shape (B,), int64.
        windows_B4: top, left, height, width in pixels of the stored image, shape (B, 4), int32.
        flips_B: mirror left to right, shape (B,), bool.
        distortions_B: what `pipeline.distort` then does to the pictures, shape (B,), dtype
            `pipeline.augment.DISTORTION`; None for a recipe that leaves colours alone.
    """

    ids_B: NDArray[np.int64]
    windows_B4: Windows
    flips_B: Flips
    distortions_B: NDArray[np.void] | None = None


class Plan(Protocol):
    """What a loader follows.

    Attributes:
        streams: the streams' names, in the order of a step's draws.
        recipes: each stream's augmentation, in the same order.
        rank_batch: the largest number of images that this rank gets per stream and step.
        image_size: height and width of the pictures to deliver, in pixels.
        steps: the number of steps, or None for a plan without end.
    """

    @property
    def split(self) -> Split: ...  # noqa: D102
    @property
    def streams(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def recipes(self) -> tuple[Recipe, ...]: ...  # noqa: D102
    @property
    def rank_batch(self) -> int: ...  # noqa: D102
    @property
    def image_size(self) -> int: ...  # noqa: D102
    @property
    def steps(self) -> int | None: ...  # noqa: D102

    def draws(self, step: int) -> list[Draw]:
        """Return one Draw per stream for a step counted from 0 over the whole plan."""
        ...


def rank_slice(size: int, rank: int, world_size: int) -> slice:
    """Return rank's contiguous part of a global batch; parts differ by at most one image."""
    return slice(size * rank // world_size, size * (rank + 1) // world_size)


@dataclass(frozen=True)
class TrainPlan:
    """The endless training plan: `steps_per_epoch` steps an epoch, all streams in step.

    An epoch is one pass of q = 1 over the split without the incomplete last batch (BBN drops it too; another
    permutation leaves out others next time). A split smaller than the batch makes one step, which repeats images.

    Raises:
        UserError: a batch that ranks cannot share evenly, an empty split, an unknown recipe or exponent.
    """

    split: Split
    specs: Sequence[Stream]
    batch_size: int  # images per stream in the global batch
    image_size: int
    seed: int
    epochs: int  # where progressive sampling ends
    rank: int = 0
    world_size: int = 1
    steps: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise UserError(
                f"input.batch_size={self.batch_size} must be a positive multiple of the {self.world_size} processes"
            )
        if self.image_size < 1:
            raise UserError(f"input.image_size={self.image_size} must be at least 1")
        if not len(self.split):
            raise UserError(f"the split {self.split.name!r} has no images")
        for spec in self.specs:
            find_recipe(spec.augment)
            class_probabilities(self.split.class_counts, spec.q)
        assert len(set(self.streams)) == len(self.specs), "stream names must differ"

    @property
    def streams(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(spec.name for spec in self.specs)

    @property
    def recipes(self) -> tuple[Recipe, ...]:  # noqa: D102
        return tuple(find_recipe(spec.augment) for spec in self.specs)

    @property
    def rank_batch(self) -> int:  # noqa: D102
        return self.batch_size // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the same on every rank; at least 1."""
        return max(1, len(self.split) // self.batch_size)

    def global_ids(self, spec: Stream, epoch: int, step: int) -> NDArray[np.int64]:
        """Return the sample ids of the global batch of `step` in `epoch`, both from 0: shape (batch_size,)."""
        if spec.q == 1.0:
            order = _cached_permutation(self.seed, spec.name, epoch, len(self.split), self.batch_size)
            return order[step * self.batch_size : (step + 1) * self.batch_size]
        progress = min(1.0, epoch / max(1, self.epochs - 1)) if spec.q == "progressive" else 0.0
        cumulative_C = _cached_cumulative(self.split.class_counts.tobytes(), spec.q, progress)
        return draw_ids(
            self.seed,
            spec.name,
            epoch,
            step,
            self.batch_size,
            cumulative_C,
            self.split.class_starts,
            self.split.by_class,
        )

    def draws(self, step: int) -> list[Draw]:
        """Return one Draw per stream for a step counted from 0 over all epochs."""
        epoch, step = divmod(step, self.steps_per_epoch)
        mine = rank_slice(self.batch_size, self.rank, self.world_size)
        draws = []
        for spec in self.specs:
            ids = self.global_ids(spec, epoch, step)
            rows = self.split.samples[ids]
            generator = random_generator(self.seed, spec.name, "augment", epoch, step)
            recipe = find_recipe(spec.augment)
            windows_B4, flips_B = recipe.draw(
                generator, rows["height"].astype(np.int64), rows["width"].astype(np.int64), self.image_size
            )
            distortions_B = draw_distortions(generator, self.batch_size)[mine] if recipe.distorts else None
            draws.append(Draw(ids[mine], windows_B4[mine], flips_B[mine], distortions_B))
        return draws


@dataclass(frozen=True)
class EvalPlan:
    """One pass over a split in id order: over all ranks every sample exactly once, the last batch short."""

    split: Split
    batch_size: int
    image_size: int
    augment: str = "none"
    rank: int = 0
    world_size: int = 1
    streams: tuple[str, ...] = field(default=("eval",), init=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"the evaluation batch {self.batch_size} must be at least 1")
        find_recipe(self.augment)

    @property
    def recipes(self) -> tuple[Recipe, ...]:  # noqa: D102
        return (find_recipe(self.augment),)

    @property
    def _mine(self) -> range:
        part = rank_slice(len(self.split), self.rank, self.world_size)
        return range(part.start, part.stop)

    @property
    def rank_batch(self) -> int:  # noqa: D102
        return self.batch_size

    @property
    def steps(self) -> int:
        """Steps of this rank; ranks may differ by one, so nothing may be synchronised per step."""
        return -(-len(self._mine) // self.batch_size)

    def draws(self, step: int) -> list[Draw]:
        """Return the one Draw of a step counted from 0."""
        chosen = self._mine[step * self.batch_size : (step + 1) * self.batch_size]
        ids = np.arange(chosen.start, chosen.stop, dtype=np.int64)
        rows = self.split.samples[ids]
        generator, (recipe,) = np.random.default_rng(0), self.recipes
        windows_B4, flips_B = recipe.draw(
            generator, rows["height"].astype(np.int64), rows["width"].astype(np.int64), self.image_size
        )
        distortions_B = draw_distortions(generator, len(ids)) if recipe.distorts else None
        return [Draw(ids, windows_B4, flips_B, distortions_B)]


@lru_cache(maxsize=4)
def _cached_permutation(seed: int, stream: str, epoch: int, samples: int, batch_size: int) -> NDArray[np.int64]:
    order = epoch_permutation(seed, stream, epoch, samples)
    return np.resize(order, max(samples, batch_size))  # repeats the permutation for a batch larger than the split


@lru_cache(maxsize=16)
def _cached_cumulative(counts: bytes, q: Exponent, progress: float) -> NDArray[np.float64]:
    return np.cumsum(class_probabilities(np.frombuffer(counts, dtype=np.int64), q, progress))
