"""Checkpoints: everything that a run needs to resume, written so that a kill leaves the old one or the new one.

    checkpoints/step-00000135/    model.safetensors, state.pt (loaded as plain data), sums.json (of those two)
    checkpoints/selected.safetensors    the weights that did best on the selecting split; which those are, is inside

Where the streams stand needs no more than the step. What methods draw by torch's generators continues where it was;
everything else random is a function of (seed, epoch, step).
"""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from shards.atomic import partial_file, partial_folder
from shards.errors import UserError
from train.networks.model_files import load_weights

FOLDER = "checkpoints"
SUMS = "sums.json"
SELECTED = "selected.safetensors"


@dataclass
class Counters:
    """How far a run is, and what the epoch under way has gathered.

    Attributes:
        step: steps done, over all epochs.
        epochs: whole epochs done.
        seconds: time spent training and evaluating, over all sessions.
        images: training images seen over all ranks and streams, in whole epochs.
        training_seconds: time spent in training steps alone, in whole epochs.
        evaluation_seconds: time spent evaluating.
        epoch_seconds: time spent in the epoch's steps so far.
    """

    step: int = 0
    epochs: int = 0
    seconds: float = 0.0
    images: int = 0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    epoch_seconds: float = 0.0


def save_checkpoint(run: Path, network: torch.nn.Module, states: dict[str, Any], counters: Counters, keep: int) -> None:
    """Write a checkpoint and then remove all but the newest `keep`. `states` holds state dicts by name."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    with partial_folder(folder / ".partial") as temporary:
        state = io.BytesIO()
        torch.save({"counters": vars(counters), **states}, state)
        files = {"model.safetensors": _weights(network), "state.pt": state.getvalue()}
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        for name, content in (files | {SUMS: json.dumps(sums).encode()}).items():
            with (temporary / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        target = folder / f"step-{counters.step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    older = [path for path in _found(run) if path.name < target.name]
    for path in older[keep - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(run: Path, network: torch.nn.Module) -> tuple[dict[str, Any], Counters] | None:
    """Load the newest whole checkpoint's weights into the network; return the other state dicts and the counters.

    A damaged checkpoint is skipped for the one before it, with a line on stderr.

    Returns:
        None where the run has no checkpoint yet.

    Raises:
        UserError: all checkpoints are damaged, or the newest whole one belongs to another network.
    """
    found = _found(run)
    for path in found:
        try:
            states = _read(path)
            counters = Counters(**states.pop("counters"))
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            print(f"warning: {path} is damaged ({' '.join(str(error).split())[:120]}); skipped", file=sys.stderr)
            continue
        remedy = f"resume with the settings in {run / 'config.yaml'}, or begin another run"
        load_weights(network, path / "model.safetensors", remedy)
        return states, counters
    if found:
        raise UserError(f"every checkpoint of {run} is damaged; remove {run / FOLDER} to start the run again")
    return None


def has_checkpoint(run: Path) -> bool:
    """Return whether a run has a checkpoint, whole or damaged."""
    return bool(_found(run))


def _found(run: Path) -> list[Path]:
    return sorted((p for p in (run / FOLDER).glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), reverse=True)


def _read(path: Path) -> dict[str, Any]:
    sums = json.loads((path / SUMS).read_text(encoding="utf-8"))
    for name, expected in sums.items():
        with (path / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise ValueError(f"{name} has changed since it was written")
    states: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return states


def save_selected(run: Path, network: torch.nn.Module, epoch: int, score: float) -> None:
    """Keep the weights of the epoch that did best so far on the selecting split: one file, with epoch and score."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    content = {"epoch": epoch, "balanced_accuracy": score}
    with partial_file(folder / SELECTED) as temporary:
        temporary.write_bytes(_weights(network, {"selected": json.dumps(content)}))
    (folder / "selected.json").unlink(missing_ok=True)  # of a run that was begun when it was beside


def read_selected(run: Path) -> tuple[Path, int, float] | None:
    """Return the selected weights' file, their epoch and their score, or None where nothing was selected.

    A damaged file counts as none, with a line on stderr: it must not keep a run of three days from its end.
    """
    path, beside = run / FOLDER / SELECTED, run / FOLDER / "selected.json"
    try:
        with safe_open(path, "pt") as file:
            inside = (file.metadata() or {}).get("selected")
        content = json.loads(inside or beside.read_text(encoding="utf-8"))
        return path, int(content["epoch"]), float(content["balanced_accuracy"])
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        print(f"warning: {path} is damaged ({' '.join(str(error).split())[:120]}); not used", file=sys.stderr)
        return None


def forget_selected(run: Path) -> None:
    """Remove the selected weights: an attempt that left no checkpoint may have had other settings."""
    (run / FOLDER / SELECTED).unlink(missing_ok=True)
    (run / FOLDER / "selected.json").unlink(missing_ok=True)


def _weights(network: torch.nn.Module, metadata: dict[str, str] | None = None) -> bytes:
    # safetensors refuses channels_last tensors.
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    return save(state, metadata)
