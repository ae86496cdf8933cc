"""The feature bank: what a frozen network makes of every image of a split, kept with the run that trained it.

    runs/digits-bbn-1/features/train/
        bank.json       what made it: weights, dataset, recipe, …; `complete` once every image was taken
        features.npy    (R, D) float16, the rows of class 0, then those of class 1, and so on; read by memory mapping
        labels.npy      (R,) int64
        seen.npy        (R,) bool: the rows that are filled; after a kill the others are still to do

A bank is reused while everything in bank.json but `complete` is what would make it now, else it is remade. All ranks
fill it together, on a filesystem that they share: where a row belongs is known from the dataset's index alone.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipeline.augment import Flips, Recipe, Windows, find_recipe
from pipeline.plan import Draw, rank_slice
from pipeline.sampling import random_generator
from shards.atomic import write_json
from shards.errors import UserError
from shards.index import MANIFEST, Dataset, Split
from train.engine import runs
from train.engine.config import Input
from train.engine.guards import StallGuard
from train.features.commands import STALL_MINUTES
from train.features.rows import Rows
from train.networks.model_files import FILES
from train.networks.networks import BilateralNetwork, PlainNetwork

FOLDER = "features"
ARRAYS = ("features", "labels", "seen")


@dataclass(frozen=True)
class ViewPlan:
    """One pass over some samples of a split: every one once, as view number `view` shows it, the last batch short.

    What a sample looks like depends on its id, the recipe and the view, not on which others are shown with it: the bank
    is the same for any number of ranks, also when a run is cut off.
    """

    split: Split
    ids_R: NDArray[np.int64]
    batch_size: int
    image_size: int
    augment: str
    view: int = 0
    streams: tuple[str, ...] = field(default=("eval",), init=False)
    shown: tuple[Windows, Flips] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        heights_N, widths_N = (self.split.samples[axis].astype(np.int64) for axis in ("height", "width"))
        generator = random_generator(0, "features", self.view)
        shown = find_recipe(self.augment).draw(generator, heights_N, widths_N, self.image_size)
        object.__setattr__(self, "shown", shown)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipe as far as it draws windows and mirrors: what else it may do to pictures is left out."""
        recipe = find_recipe(self.augment)
        return (Recipe(recipe.name, recipe.draw, recipe.pads, interpolation=recipe.interpolation),)

    @property
    def rank_batch(self) -> int:  # noqa: D102
        return self.batch_size

    @property
    def steps(self) -> int:  # noqa: D102
        return -(-len(self.ids_R) // self.batch_size)

    def draws(self, step: int) -> list[Draw]:
        """Return the one Draw of a step counted from 0."""
        ids_B = self.ids_R[step * self.batch_size : (step + 1) * self.batch_size]
        windows_N4, flips_N = self.shown
        return [Draw(ids_B, windows_N4[ids_B], flips_N[ids_B], interpolation=self.recipes[0].interpolation)]


def feature_bank(
    run: Path,
    network: PlainNetwork | BilateralNetwork,
    dataset: Dataset,
    split: str,
    input: Input,
    accelerator: Accelerator,
    views: int = 0,
    weights: str = "last",
    stall_minutes: float = STALL_MINUTES,
) -> tuple[Tensor, Tensor]:
    """Return a split's features and labels, from the run's bank where it fits, else by extraction.

    Args:
        run: the stage-one run, which keeps the bank.
        network: the run's network, on the accelerator's device; it is used in evaluation mode.
        dataset: what to look at.
        split: the split's name; it has at least one image.
        input: how the run showed images: its evaluation recipe is used, or with `views` its training recipe (windows
            and mirroring; colours stay).
        accelerator: gives device, precision and ranks. Every rank returns the whole bank.
        views: how often each image is taken with the training recipe; 0: once, as in evaluation.
        weights: which of the run's weights the network has: "last" or "selected".
        stall_minutes: how long to wait for a batch.

    Returns:
        features_RD, float16, and labels_R, int64, ascending: R = images × max(1, views), less those that do not
        decode. On a CPU the features are memory-mapped; else both are on the accelerator's device.

    Raises:
        UserError: the disk is full, another process takes features of this run, features that half precision cannot
            hold, or what the loader raises.
    """
    folder = run / FOLDER / split
    wanted = _wanted(run, network, dataset, split, input, accelerator, views, weights)
    # The first process looks for all: on a network file system others may still see what was there before.
    (whole,) = broadcast_object_list([_read(folder) == wanted | {"complete": True}])
    if not whole:
        if accelerator.is_main_process:
            try:
                folder.parent.mkdir(exist_ok=True)
                runs.lock(folder.parent)
            except OSError as error:
                raise _unwritable(folder, error, wanted) from None
            found = _read(folder)  # another process may have finished it meanwhile
            if found and {**found, "complete": True} == wanted | {"complete": True}:
                print(f"resuming the features of {split} in {folder}")
            else:
                if found:
                    differing = ", ".join(key for key in wanted if found.get(key) != wanted[key])
                    print(f"the features of {split} in {folder} differ in: {differing}; extracting them again")
                _begin(folder, wanted)
        accelerator.wait_for_everyone()
        _fill(folder, network, dataset.splits[split], input, accelerator, wanted, stall_minutes)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(folder / "bank.json", wanted | {"complete": True})
            runs.unlock(folder.parent)
    # Copy on write: nothing is written, but torch warns about memory that cannot be.
    features_RD, labels_R, seen_R = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in ARRAYS)
    if not seen_R.all():
        features_RD, labels_R = features_RD[seen_R], labels_R[seen_R]
        accelerator.print(
            f"{len(seen_R) - len(labels_R):,} of {len(seen_R):,} features of {split} are missing, because their images"
            f" did not decode; once they do, remove {folder} to take them again"
        )
    return torch.from_numpy(features_RD).to(accelerator.device), torch.from_numpy(labels_R).to(accelerator.device)


def _wanted(
    run: Path,
    network: PlainNetwork | BilateralNetwork,
    dataset: Dataset,
    split: str,
    input: Input,
    accelerator: Accelerator,
    views: int,
    weights: str,
) -> dict[str, Any]:
    """Return what bank.json says of such a bank; arguments as for `feature_bank`."""
    return {
        "split": split,
        "network": run.resolve().name,
        "weights": weights_digest(run, weights),
        "dataset": _digest(dataset.root / MANIFEST),
        "recipe": input.augment if views else input.eval_augment,
        "image_size": input.image_size,
        "views": views,
        "precision": accelerator.mixed_precision,
        "class_counts": (dataset.splits[split].class_counts * max(1, views)).tolist(),
        "dimensions": network.classifier.in_features,
    }


def rows_to_take(
    run: Path,
    network: PlainNetwork | BilateralNetwork,
    dataset: Dataset,
    split: str,
    input: Input,
    accelerator: Accelerator,
    views: int = 0,
    weights: str = "last",
) -> int:
    """Return how many rows of such a bank the run does not keep yet; arguments as for `feature_bank`."""
    wanted, folder = _wanted(run, network, dataset, split, input, accelerator, views, weights), run / FOLDER / split
    found, rows = _read(folder), sum(wanted["class_counts"])
    if found is None or found | {"complete": True} != wanted | {"complete": True}:
        return rows
    return 0 if found["complete"] else rows - int(np.load(folder / "seen.npy").sum())


def keep_bank(run: Path, split: str, weights: str = "last") -> None:
    """Say that a finished bank fits the run's weights as they are now: their classifier alone has changed."""
    folder = run / FOLDER / split
    known = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
    write_json(folder / "bank.json", known | {"weights": weights_digest(run, weights)})


def bank_ids(run: Path, split: Split) -> NDArray[np.int64]:
    """Return the samples that a finished bank of one view holds, row by row: ids_R, int64."""
    seen_R = np.load(run / FOLDER / split.name / "seen.npy")
    return np.asarray(split.by_class[seen_R], np.int64)


def weights_digest(run: Path, weights: str) -> str:
    """Return what identifies a run's weights, "last" or "selected".

    Raises:
        UserError: they are not there.
    """
    try:
        return _digest(run / FILES[weights])
    except FileNotFoundError:
        raise UserError(
            f"{run} has no {FILES[weights]} any more: it is being trained, or was tidied up; start again when it is"
            " finished, or name another run with --from"
        ) from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> dict[str, Any] | None:
    """Return what bank.json says, or None where there is no whole one or an array is not what it says."""
    try:
        found = dict(json.loads((folder / "bank.json").read_text(encoding="utf-8")))
        rows = sum(found["class_counts"])
        expected = [((rows, found["dimensions"]), np.float16), ((rows,), np.int64), ((rows,), np.bool_)]
        for name, (shape, dtype) in zip(ARRAYS, expected, strict=True):
            array = np.load(folder / f"{name}.npy", mmap_mode="r")
            if array.shape != shape or array.dtype != dtype:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _begin(folder: Path, wanted: dict[str, Any]) -> None:
    """Make the files of an empty bank, with room on the disk for all of it."""
    counts = wanted["class_counts"]
    arrays = {"labels": np.repeat(np.arange(len(counts)), counts), "seen": np.zeros(sum(counts), np.bool_)}
    try:
        # New files, not new contents: somebody may have the old ones mapped.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        with (folder / "features.npy").open("wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (sum(counts), wanted["dimensions"])}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            os.posix_fallocate(file.fileno(), file.tell(), _size(wanted))
    except OSError as error:
        (folder / "features.npy").unlink(missing_ok=True)
        raise _unwritable(folder, error, wanted) from None
    write_json(folder / "bank.json", wanted | {"complete": False})


def _size(wanted: dict[str, Any]) -> int:
    """Return the bytes that features take."""
    return 2 * int(wanted["dimensions"]) * sum(wanted["class_counts"])


def _unwritable(folder: Path, error: OSError, wanted: dict[str, Any]) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "make room" if full else f"copy {folder.parents[1]} to where you may write, and name the copy with --from"
    return UserError(
        f"{folder} cannot be written ({error.strerror}): the features of {wanted['split']} take"
        f" {_size(wanted) / 1e9:.2f} GB; {remedy}"
    )


def _fill(
    folder: Path,
    network: PlainNetwork | BilateralNetwork,
    split: Split,
    input: Input,
    accelerator: Accelerator,
    wanted: dict[str, Any],
    stall_minutes: float,
) -> None:
    """Take this rank's share of the features that are missing."""
    views = max(1, wanted["views"])
    missing_RV = ~np.load(folder / "seen.npy").reshape(-1, views)
    accelerator.wait_for_everyone()  # before anyone fills rows
    place_N = np.empty(len(split), np.int64)
    place_N[split.by_class] = np.arange(len(split))
    with Rows(folder, wanted["dimensions"]) as bank:
        for view in range(views):
            ids = np.sort(split.by_class[missing_RV[:, view]])  # in the order of the shards
            mine = ids[rank_slice(len(ids), accelerator.process_index, accelerator.num_processes)]
            plan = ViewPlan(split, mine, input.batch_size, input.image_size, wanted["recipe"], view)
            for ids_B, features_BD in _features(network, plan, input, accelerator, stall_minutes):
                bank.write(place_N[ids_B] * views + view, features_BD)


@torch.no_grad()
def _features(
    network: PlainNetwork | BilateralNetwork,
    plan: ViewPlan,
    input: Input,
    accelerator: Accelerator,
    stall_minutes: float,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float16]]]:
    if not plan.steps:
        return
    network.eval()
    with (
        input.open_loader(plan, accelerator.device) as loader,
        StallGuard(loader, plan.streams, accelerator.process_index, 60 * stall_minutes) as batches,
    ):
        title = f"features of {plan.split.name}"
        silent = not accelerator.is_main_process or None
        for batch in tqdm(batches, title, plan.steps, unit="batch", leave=False, disable=silent):
            with accelerator.autocast():
                features_BD = network.features(batch["eval"].images_BHWC)
            half_BD = features_BD.half()
            if not half_BD.isfinite().all():
                least, most = features_BD.min().item(), features_BD.max().item()
                raise UserError(
                    f"features of {plan.split.name} reach from {least:g} to {most:g}, and half precision, in which they"
                    f" are kept, holds {torch.finfo(torch.half).max:g} at most; a network whose features are that large"
                    " has diverged: train it again with a lower optim.lr"
                )
            yield batch["eval"].ids_B, half_BD.cpu().numpy()
