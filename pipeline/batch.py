"""What every loader delivers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.faults import Faults


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


class Loader(Protocol):
    """Iterates over a plan's steps from `start_step`; each step is a dict from stream name to `Batch`.

    All loaders show the same ids, labels, windows and flips for a plan; their pictures differ by resampling
    error only. An image that does not decode is mended as `pipeline.faults` says and counted in `faults`; a shard that
    is missing, unreadable or too short raises a UserError. `close()`, or leaving a with block, frees threads,
    processes and files.
    """

    faults: Faults
    waiting_for: str | None  # the stream whose batch a step waits for, where the loader knows it

    def __iter__(self) -> Iterator[dict[str, Batch]]: ...
    def __next__(self) -> dict[str, Batch]: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...
    def close(self) -> None: ...  # noqa: D102
