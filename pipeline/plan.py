"""Plans: what each rank loads at each step, for every stream, before a byte is read.

seed, epoch, step ──> ids of the global batch ──> rank's slice ──> Draw(ids, windows, flips, …) ──> any loader

                   global batch of 8, two ranks          (one world size or another:
    uniform     [ a b c d | e f g h ]                     the same eight images)
    reversed    [ t t u v | w t x u ]
                  rank 0     rank 1
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.augment import Flips, Interpolation, Recipe, Windows, find_recipe
from pipeline.mix import Mix
from pipeline.sampling import (
    checked_probabilities,
    class_probabilities,
    draw_ids,
    epoch_order,
    random_generator,
)
from pipeline.stream import Stream
from shards.errors import UserError
from shards.index import Split

# What a Draw says of all its images at once.
OF_ALL = ("mix", "step_counts_C", "interpolation")


@dataclass(frozen=True)
class Draw:
    """One rank's part of one stream's batch, in the order of the global batch.

    Attributes:
        ids_B: sample ids, shape (B,), int64.
        windows_B4: top, left, height, width in pixels of the stored image, shape (B, 4), int32.
        flips_B: mirror left to right, shape (B,), bool.
        distortions_B: what `pipeline.distort` then does to the pictures, shape (B,), a field for each distortion of
            the recipe; None for a recipe without.
        mix: how the pictures are then mixed; None where they are not.
        mixing_B: what it drew, shape (B,), dtype `mix.row`; None as mix.
        step_counts_C: how much of each class's label the whole step's batch holds, over all ranks, shape (C,), float32;
            None in an evaluation.
        interpolation: how windows are resized.
    """

    ids_B: NDArray[np.int64]
    windows_B4: Windows
    flips_B: Flips
    distortions_B: NDArray[np.void] | None = None
    mix: Mix | None = None
    mixing_B: NDArray[np.void] | None = None
    step_counts_C: NDArray[np.float32] | None = None
    interpolation: Interpolation = "bilinear"

    def part(self, part: slice | list[int]) -> Self:
        """Return the same for some of the images."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OF_ALL}
        return replace(self, **{name: array[part] for name, array in arrays.items() if array is not None})


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
        UserError: a batch that ranks cannot share evenly, an empty split, an unknown recipe or exponent, class
            probabilities that do not fit the split, a stream that repeats none with a sampler, or mixing that the
            batch or the other streams do not allow.
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
    # By stream: the latest epoch and its table.
    _latest: dict[str, tuple[int, NDArray[Any]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise UserError(
                f"input.batch_size={self.batch_size} must be a positive multiple of the {self.world_size} processes"
            )
        if self.image_size < 1:
            raise UserError(f"input.image_size={self.image_size} must be at least 1")
        if not len(self.split):
            raise UserError(f"the split {self.split.name!r} has no images")
        assert len(set(self.streams)) == len(self.specs), "stream names must differ"
        for spec in self.specs:
            for distortion in find_recipe(spec.augment).distortions:
                distortion.check(self.image_size)
            if self._drawn_by(spec).repeats is not None:
                raise UserError(
                    f"stream {spec.name!r} repeats {spec.repeats!r}, which has no sampler of its own; name another"
                )
            self._probabilities(self._drawn_by(spec), epoch=0)
            if spec.mix is not None:
                self._check_mix(spec, spec.mix)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_latest": {}}  # a worker process makes its own tables

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
        spec = self._drawn_by(spec).at(epoch, self.epochs)
        table = self._table(spec, epoch)
        if spec.permutes:
            return table[step * self.batch_size : (step + 1) * self.batch_size]
        starts, by_class = self.split.class_starts, self.split.by_class
        return draw_ids(self.seed, spec.name, epoch, step, self.batch_size, table, starts, by_class)

    def draws(self, step: int) -> list[Draw]:
        """Return one Draw per stream for a step counted from 0 over all epochs."""
        epoch, step = divmod(step, self.steps_per_epoch)
        mine = rank_slice(self.batch_size, self.rank, self.world_size)
        draws: dict[str, Draw] = {}
        for spec, recipe in zip(self.specs, self.recipes, strict=True):
            generator = random_generator(self.seed, spec.name, "augment", epoch, step)
            ids = self.global_ids(spec, epoch, step)
            draw = _draw(self.split, ids, recipe, generator, self.image_size)
            if spec.mix is not None:
                generator = random_generator(self.seed, spec.name, "mix", epoch, step)
                mixing_B = spec.mix.draw(generator, len(ids), self.image_size)
                draw = replace(draw, mix=spec.mix, mixing_B=mixing_B)
            draws[spec.name] = draw
        return [replace(draw.part(mine), step_counts_C=self._step_counts(name, draws)) for name, draw in draws.items()]

    def _step_counts(self, name: str, draws: dict[str, Draw]) -> NDArray[np.float32]:
        """Return what each class's labels weigh in a stream's global batch: shape (C,), with the sum batch_size."""
        draw, labels_N, counts_C = draws[name], self.split.samples["label"], self.split.class_counts
        labels_B = labels_N[draw.ids_B].astype(np.int64)
        if draw.mix is None:
            return np.bincount(labels_B, minlength=len(counts_C)).astype(np.float32)
        assert draw.mixing_B is not None
        rows_B = draw.mix.partner_rows(len(labels_B))
        partners_B = labels_N[draws[draw.mix.partner or name].ids_B[rows_B]].astype(np.int64)
        shares_B = draw.mix.label_shares(draw.mixing_B, labels_B, partners_B, counts_C)
        both, weights = np.concatenate([labels_B, partners_B]), np.concatenate([shares_B, 1 - shares_B])
        return np.bincount(both, weights, minlength=len(counts_C)).astype(np.float32)

    def _drawn_by(self, spec: Stream) -> Stream:
        """Return the stream whose sampler gives this one its ids: mostly itself."""
        if spec.repeats is None:
            return spec
        for other in self.specs:
            if other.name == spec.repeats:
                return other
        raise UserError(
            f"stream {spec.name!r} repeats {spec.repeats!r}, which is no stream; the streams are:"
            f" {', '.join(self.streams)}"
        )

    def _check_mix(self, spec: Stream, mix: Mix) -> None:
        if mix.partner is None:
            if self.rank_batch % 2:
                raise UserError(
                    f"stream {spec.name!r} mixes images in pairs and input.batch_size={self.batch_size} gives each of"
                    f" the {self.world_size} processes {self.rank_batch}; make it a multiple of {2 * self.world_size}"
                )
            return
        others = {other.name: other for other in self.specs if other.name != spec.name}
        if mix.partner not in others:
            raise UserError(
                f"stream {spec.name!r} is mixed with {mix.partner!r}, which is no other stream; the others are:"
                f" {', '.join(others) or 'none'}"
            )
        partners = others[mix.partner].mix
        if mix.hidden and partners is not None and not partners.hidden:
            raise UserError(
                f"stream {spec.name!r} mixes hidden maps with {mix.partner!r}, whose pictures are mixed themselves;"
                " leave the mix of one of them out"
            )

    def _probabilities(self, spec: Stream, epoch: int) -> NDArray[np.float64]:
        if spec.probabilities is not None:
            return checked_probabilities(self.split.class_counts, spec.probabilities)
        return class_probabilities(self.split.class_counts, spec.q, min(1.0, epoch / max(1, self.epochs - 1)))

    def _table(self, spec: Stream, epoch: int) -> NDArray[Any]:
        """Return what an epoch's ids are taken from: their order, or the cumulative probabilities of the classes."""
        known, table = self._latest.get(spec.name, (None, None))
        if table is None or known != epoch:
            if spec.permutes:
                sizes = (
                    [len(self.split)]
                    if spec.shard_window is None
                    else np.bincount(self.split.samples["shard"]).tolist()
                )
                order = epoch_order(self.seed, spec.name, epoch, sizes, spec.shard_window)
                # A batch larger than the split repeats the order.
                table = np.resize(order, max(len(order), self.batch_size))
            else:
                table = np.cumsum(self._probabilities(spec, epoch))
            self._latest[spec.name] = epoch, table
        return table


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
        return [_draw(self.split, ids, self.recipes[0], np.random.default_rng(0), self.image_size)]


def _draw(
    split: Split, ids_B: NDArray[np.int64], recipe: Recipe, generator: np.random.Generator, image_size: int
) -> Draw:
    """Draw what a recipe does to the samples of a batch."""
    # The field before the rows: indexing whole records costs ten times as much.
    heights_B, widths_B = (split.samples[axis][ids_B].astype(np.int64) for axis in ("height", "width"))
    windows_B4, flips_B = recipe.draw(generator, heights_B, widths_B, image_size)
    distortions_B = recipe.draw_distortions(generator, len(ids_B), image_size)
    return Draw(ids_B, windows_B4, flips_B, distortions_B, interpolation=recipe.interpolation)
