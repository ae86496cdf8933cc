"""Checkpoints: everything that a run needs to go on, written so that a kill leaves the old one or the new one.

    checkpoints/step-00000135/    model.safetensors, state.pt (optimiser, scaler and counters; loaded as plain data)
    checkpoints/selected.safetensors, selected.json    the weights that did best on the selecting split

Nothing random is saved: every random number of a run is a function of (seed, epoch, step).
"""

import json
import os
import pickle
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shards.errors import UserError
from train.networks import load_weights
from train.runs import write_json

FOLDER = "checkpoints"


@dataclass
class Counters:
    """How far a run is.

    Attributes:
        step: steps done, over all epochs.
        epochs: whole epochs done.
        seconds: time spent training and evaluating, over all sessions.
        images: training images seen over all ranks and streams.
        training_seconds: time spent in training steps alone.
    """

    step: int = 0
    epochs: int = 0
    seconds: float = 0.0
    images: int = 0
    training_seconds: float = 0.0


def save_checkpoint(run: Path, network: torch.nn.Module, states: dict[str, Any], counters: Counters) -> None:
    """Write a checkpoint and then remove the older ones. `states` holds state dicts by name."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        _save_weights(network, temporary / "model.safetensors")
        torch.save({"counters": vars(counters), **states}, temporary / "state.pt")
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        target = folder / f"step-{counters.step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for older in folder.iterdir():
        if older != target and older.name.startswith(("step-", ".partial-")):
            shutil.rmtree(older, ignore_errors=True)


def load_checkpoint(run: Path, network: torch.nn.Module) -> tuple[dict[str, Any], Counters] | None:
    """Load the newest checkpoint's weights into the network; return the other state dicts and the counters.

    Returns:
        None where the run has no checkpoint yet.

    Raises:
        UserError: the checkpoint is damaged, or belongs to another network.
    """
    found = sorted((run / FOLDER).glob("step-*"))
    if not found:
        return None
    load_weights(network, found[-1] / "model.safetensors")
    path = found[-1] / "state.pt"
    try:
        states = torch.load(path, map_location="cpu", weights_only=True)
        return states, Counters(**states.pop("counters"))
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())[:120]}); remove {found[-1]} to start the run again"
        ) from None


def save_selected(run: Path, network: torch.nn.Module, epoch: int, score: float) -> None:
    """Keep the weights of the epoch that did best so far on the selecting split."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = folder / ".selected.partial"
    _save_weights(network, temporary)
    os.replace(temporary, folder / "selected.safetensors")
    write_json(folder / "selected.json", {"epoch": epoch, "balanced_accuracy": score})


def read_selected(run: Path) -> tuple[Path, int, float] | None:
    """Return the selected weights' file, their epoch and their score, or None where nothing was selected."""
    folder = run / FOLDER
    try:
        told = json.loads((folder / "selected.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return folder / "selected.safetensors", int(told["epoch"]), float(told["balanced_accuracy"])


def _save_weights(network: torch.nn.Module, path: Path) -> None:
    save_file({key: value.detach().contiguous() for key, value in network.state_dict().items()}, path)
