"""What every loader delivers, and what all of them do alike."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.faults import faults_of
from pipeline.plan import Draw, Plan
from shards.errors import UserError


@dataclass(frozen=True)
class Batch:
    """One stream's part of a step on one rank. All tensors are on the loader's device.

    A stream with a `pipeline.mix.Mix` has partners: the loss of an image is

        shares_B · loss(labels_B) + (1 - shares_B) · loss(partners_B)

    and where the method mixes hidden maps h itself (`Mix.hidden`), it continues with

        hidden_shares_B · h + (1 - hidden_shares_B) · h'[hidden_partners_B]

    h' being h, or the maps of the stream that is mixed in.

    Attributes:
        images_BHWC: 0 … 255, RGB, H = W = the plan's image_size; uint8, or float32 where shares of pictures add up.
        labels_B: int64, 0 … C - 1.
        ids_B: the ids of the samples shown, int64, NumPy; labels_B are theirs.
        partners_B: the labels of the images mixed in, int64; None in a stream that is not mixed.
        shares_B: the weight of labels_B, 0 … 1, float32; None as partners_B.
        hidden_partners_B: each image's partner, as a row of h', int64; None where no hidden maps are mixed.
        hidden_shares_B: the weight of an image's own map, 0 … 1, float32; None as hidden_partners_B.
        step_counts_C: how much of each class's label the whole step's batch holds, over all ranks and parts, shape
            (C,), float32, with the batch size as its sum; None in an evaluation. What a loss with class weights is
            divided by must be the same on every rank and in every part.
    """

    images_BHWC: torch.Tensor
    labels_B: torch.Tensor
    ids_B: NDArray[np.int64]
    partners_B: torch.Tensor | None = None
    shares_B: torch.Tensor | None = None
    hidden_partners_B: torch.Tensor | None = None
    hidden_shares_B: torch.Tensor | None = None
    step_counts_C: torch.Tensor | None = None

    def part(self, part: slice) -> Self:
        """Return the same for some of the images, start to stop, such as an accumulation part.

        Raises:
            UserError: it separates images whose hidden maps are to be mixed with each other.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "step_counts_C"}
        cut = replace(self, **{name: value[part] for name, value in values.items() if value is not None})
        if cut.hidden_partners_B is not None:
            count, rows_B = len(cut.ids_B), cut.hidden_partners_B - part.indices(len(self.ids_B))[0]
            cut = replace(cut, hidden_partners_B=rows_B)
            if not torch.equal(rows_B, rows_B.clamp(0, count - 1)):
                raise UserError(
                    f"a part of {count} images separates pairs that are mixed with each other; set optim.accumulate so"
                    " that each part has an even number of images"
                )
        return cut


class Shown(NamedTuple):
    """What a loader made of one stream's draw: images (B, S, S, 3), uint8, on any device, and the draw they show."""

    images_BHWC: torch.Tensor
    draw: Draw


class Loader(ABC):
    """Iterates over a plan's steps from `start_step`; each step is a dict from stream name to `Batch`.

    All loaders show the same ids, labels, windows and flips for a plan; their pictures differ by resampling error only.
    An image that does not decode is replaced (see `pipeline.faults`) and counted in `faults`; a shard that is missing,
    unreadable or too short raises a UserError. `close()`, or leaving a with block, frees threads, processes and files.

    Attributes:
        faults: the split's images that did not decode.
        waiting_for: the stream whose batch a step waits for, where the loader knows it.
    """

    waiting_for: str | None = None

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self.faults = faults_of(plan.split)

    @abstractmethod
    def _next_step(self) -> list[Shown]:
        """Return what the next step shows, stream by stream, and count its faults; StopIteration at the plan's end."""

    @abstractmethod
    def close(self) -> None:
        """Free what the loader holds."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Batch]:
        while True:
            step = self._next_step()
            self.faults.check()
            if any(len(shown.draw.ids_B) for shown in step):  # else no image of an evaluation's batch decodes
                streams = dict(zip(self._plan.streams, step, strict=True))
                # The ones on the device first: a stream's pictures may be mixed into another's.
                shown = {name: Shown(self._here(part.images_BHWC), part.draw) for name, part in streams.items()}
                return {name: self._batch(name, shown) for name in shown}

    def _here(self, values: torch.Tensor | NDArray[Any]) -> torch.Tensor:
        tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
        return tensor.to(self._device, non_blocking=True)

    def _batch(self, name: str, shown: dict[str, Shown]) -> Batch:
        split, (images_BHWC, draw) = self._plan.split, shown[name]
        labels_B = split.samples["label"][draw.ids_B].astype(np.int64)
        counts_C = None if draw.step_counts_C is None else self._here(draw.step_counts_C)
        plain = Batch(images_BHWC, self._here(labels_B), draw.ids_B, step_counts_C=counts_C)
        if draw.mix is None:
            return plain
        assert draw.mixing_B is not None
        other = shown[draw.mix.partner or name]
        rows_B = draw.mix.partner_rows(len(draw.ids_B))
        # By what is shown, not by what was drawn: another image may have replaced one that does not decode.
        partners_B = split.samples["label"][other.draw.ids_B[rows_B]].astype(np.int64)
        shares_B = draw.mix.label_shares(draw.mixing_B, labels_B, partners_B, split.class_counts)
        mixed = replace(plain, partners_B=self._here(partners_B), shares_B=self._here(shares_B))
        rows_here_B = self._here(rows_B)
        if draw.mix.hidden:
            hidden_shares_B = self._here(draw.mixing_B["share"].copy())
            return replace(mixed, hidden_partners_B=rows_here_B, hidden_shares_B=hidden_shares_B)
        partners_BHWC = other.images_BHWC.index_select(0, rows_here_B)
        return replace(mixed, images_BHWC=draw.mix.blend(images_BHWC, partners_BHWC, draw.mixing_B))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def steps_from(plan: Plan, start_step: int) -> Iterable[int]:
    """Return the numbers of a plan's steps from here on, without end where the plan has none."""
    return itertools.count(start_step) if plan.steps is None else range(start_step, plan.steps)
