"""What a run predicts for each image of its held-out splits, kept so that nobody needs a second pass.

predictions.npz             of the last weights; predictions-selected.npz of those that val chose
    test_ids          (N,) int64, ascending: rows of the split's samples; images that did not decode are left out
    test_labels       (N,) int64
    test_topk_labels  (N, K) int32, by falling score; K is the number of classes, 100 at most
    test_topk_scores  (N, K) probabilities: float32 where all classes are there, else float16
    val_…             the same for val, and what calibration needs of it:
    val_logits        (M, C) float32 up to 100 classes, else float16
    val_logit_rows    (M,) int64: the rows of val_ids that they belong to; all of them, unless that is too much
"""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from shards.atomic import partial_file
from shards.errors import UserError

FILES = {"last": "predictions.npz", "selected": "predictions-selected.npz"}
MOST_CLASSES = 100
# Logits kept of val: two or three numbers are fitted to them, for which so many (a quarter of a gigabyte) are plenty.
MOST_LOGITS = 1 << 27


@dataclass(frozen=True)
class Predictions:
    """A split's predictions, by ascending id; see the top of the file.

    Attributes:
        ids_N: int64.
        labels_N: int64.
        topk_labels_NK: int32.
        topk_scores_NK: float32 or float16, in [0, 1].
        logits_NC: float32 or float16; None where they were not asked for.
    """

    ids_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    topk_labels_NK: NDArray[np.int32]
    topk_scores_NK: NDArray[np.floating[Any]]
    logits_NC: NDArray[np.floating[Any]] | None = None

    def arrays(self, split: str) -> dict[str, NDArray[Any]]:
        """Return the arrays of predictions.npz."""
        found: dict[str, NDArray[Any]] = {
            f"{split}_ids": self.ids_N,
            f"{split}_labels": self.labels_N,
            f"{split}_topk_labels": self.topk_labels_NK,
            f"{split}_topk_scores": self.topk_scores_NK,
        }
        if self.logits_NC is not None:
            step = -(-self.logits_NC.size // MOST_LOGITS) or 1
            found |= {
                f"{split}_logits": self.logits_NC[::step],
                f"{split}_logit_rows": np.arange(0, len(self.ids_N), step),
            }
        return found


class Collector:
    """Takes the logits of a split batch by batch, on every rank its own images."""

    def __init__(self, num_classes: int, logits: bool) -> None:
        """`logits`: whether to keep all of them, for calibration."""
        few = num_classes <= MOST_CLASSES
        self._k, self._dtype = min(num_classes, MOST_CLASSES), torch.float32 if few else torch.float16
        empty = torch.empty
        self._parts: list[tuple[NDArray[Any], ...]] = []
        self._logits = logits
        self.add(np.empty(0, np.int64), empty(0, dtype=torch.int64), empty(0, num_classes))

    def add(self, ids_B: NDArray[np.int64], labels_B: Tensor, logits_BC: Tensor) -> None:
        """Take a batch: logits float32, on any device."""
        # Stable: of equal scores the lower class comes first, as in the figures.
        scores_BC, order_BC = logits_BC.float().softmax(1).sort(dim=1, descending=True, stable=True)
        part = [labels_B, order_BC[:, : self._k].int(), scores_BC[:, : self._k].to(self._dtype)]
        if self._logits:
            part.append(logits_BC.to(self._dtype))
        self._parts.append((np.asarray(ids_B, np.int64), *(tensor.cpu().numpy() for tensor in part)))

    def gather(self, accelerator: Accelerator | None = None) -> Predictions:
        """Return the predictions of all ranks, on every rank; each image once."""
        mine = [tuple(np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))]
        parts = gather_object(mine) if accelerator is not None and accelerator.num_processes > 1 else mine
        arrays = [np.concatenate(column) for column in zip(*parts, strict=True)]
        _, order = np.unique(arrays[0], return_index=True)
        return Predictions(*(array[order] for array in arrays))


def write_predictions(run_folder: Path, splits: Mapping[str, Predictions], weights: str = "last") -> None:
    """Write a run's predictions.npz: a split's predictions by its name. The file appears whole or not at all."""
    arrays: dict[str, Any] = {
        name: array for split, predictions in splits.items() for name, array in predictions.arrays(split).items()
    }
    with partial_file(run_folder / FILES[weights]) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_predictions(run_folder: Path, weights: str, *names: str) -> list[NDArray[Any]]:
    """Return some arrays of a run's predictions; no other array is read from the disk.

    Raises:
        UserError: there is no such file or array, or it is damaged.
    """
    with _opened(run_folder, weights) as file:
        for name in names:
            if name not in file.files:
                raise KeyError(name)
        arrays = [file[name] for name in names]
        for name, array in zip(names, arrays, strict=True):
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{name} is no array")
        return arrays


def read_val_logits(run_folder: Path, weights: str, num_classes: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the val logits that a run kept, (M, C) with M >= 1, and their labels.

    Raises:
        UserError: there are none, they are not finite, or they do not fit each other or the number of classes.
    """
    logits_MC, rows_M, labels_N = read_predictions(run_folder, weights, "val_logits", "val_logit_rows", "val_labels")
    path = run_folder / FILES[weights]
    try:
        labels_M = labels_N[rows_M]
        fits = logits_MC.shape == (len(labels_M), num_classes) and 0 <= labels_M.min() <= labels_M.max() < num_classes
    except (IndexError, ValueError):  # rows that are not there, or none at all
        fits = False
    if not fits:
        raise UserError(f"{path} is damaged, or of another run: its arrays do not fit; train the run again")
    if not np.isfinite(logits_MC).all():
        raise UserError(f"the val logits in {path} hold nan or inf: the training has diverged; use another run")
    return logits_MC, labels_M


def kept_arrays(run_folder: Path, weights: str) -> list[str]:
    """Return the names of the arrays in a run's predictions; raises as `read_predictions` does."""
    with _opened(run_folder, weights) as file:
        return list(file.files)


@contextmanager
def _opened(run_folder: Path, weights: str) -> Iterator[Any]:
    path = run_folder / FILES[weights]
    try:
        with path.open("rb") as raw, np.lib.npyio.NpzFile(raw, allow_pickle=False) as file:
            yield file
    except FileNotFoundError:
        raise UserError(
            f"{run_folder} has no {path.name}: it was trained before predictions were kept; --resume evaluates a run of"
            " stage one again, a second stage is to be trained again"
        ) from None
    except KeyError as error:
        raise UserError(f"{path} has no array {error.args[0]!r}; train the run again") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); train the run again") from None
