"""What every loader delivers, and what all of them do alike."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.faults import faults_of
from pipeline.plan import Plan


@dataclass(frozen=True)
class Batch:
    """One stream's part of a step on one rank.

    Attributes:
        images_BHWC: uint8, 0 … 255, RGB, on the loader's device, H = W = the plan's image_size.
        labels_B: int64, 0 … C - 1, on the loader's device.
        ids_B: the ids of the samples shown, int64, NumPy; labels_B are theirs.
    """

    images_BHWC: torch.Tensor
    labels_B: torch.Tensor
    ids_B: NDArray[np.int64]


class Shown(NamedTuple):
    """What a loader made of one stream's draw: images (B, S, S, 3), uint8, on any device, and the ids they show."""

    images_BHWC: torch.Tensor
    ids_B: NDArray[np.int64]


class Loader(ABC):
    """Iterates over a plan's steps from `start_step`; each step is a dict from stream name to `Batch`.

    All loaders show the same ids, labels, windows and flips for a plan; their pictures differ by resampling
    error only. An image that does not decode is mended as `pipeline.faults` says and counted in `faults`; a shard that
    is missing, unreadable or too short raises a UserError. `close()`, or leaving a with block, frees threads,
    processes and files.

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
            if any(len(shown.ids_B) for shown in step):  # else no image of an evaluation's batch decodes
                return {name: self._batch(shown) for name, shown in zip(self._plan.streams, step, strict=True)}

    def _batch(self, shown: Shown) -> Batch:
        labels_B = torch.from_numpy(self._plan.split.samples["label"][shown.ids_B].astype(np.int64))
        images_BHWC, labels_B = (part.to(self._device, non_blocking=True) for part in (shown.images_BHWC, labels_B))
        return Batch(images_BHWC, labels_B, shown.ids_B)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def steps_from(plan: Plan, start_step: int) -> Iterable[int]:
    """Return the numbers of a plan's steps from here on, without end where the plan has none."""
    return itertools.count(start_step) if plan.steps is None else range(start_step, plan.steps)
