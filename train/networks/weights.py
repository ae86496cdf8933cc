"""State dicts out of files, checked against the network that they are for."""

import argparse
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from shards.errors import UserError

# A run's model files (train/networks/model_files.py), what is taken first.
OWN_FILES = ("model-selected.safetensors", "model.safetensors")
# Under what training programs keep the state dict among other things; averaged weights come first.
INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model")
# What wrappers put before a name.
WRAPPED = ("_orig_mod.", "module.")


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a .safetensors file, or of one that torch.save wrote, on the CPU.

    Of a training checkpoint, as timm writes them, the state dict inside; without the prefixes of DDP and torch.compile.

    Raises:
        UserError: the file is missing, damaged, or holds no plain state dict.
    """
    try:
        with path.open("rb"):  # safetensors calls every file that it cannot open missing
            pass
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            # Training programs keep their command line beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the file of a trained model") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} cannot be read: it is damaged, or holds more than weights; save model.state_dict() and give that"
            " file"
        ) from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); see to its permissions, or name another") from None
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); replace the damaged file") from None
    if isinstance(state, dict):
        state = next((state[key] for key in INSIDE if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no plain state dict; save model.state_dict() and give that file")
    return {_unwrapped(key): value for key, value in state.items()}


def read_own(path: Path) -> dict[str, Tensor] | None:
    """Return the state dict of a network of ours: of a run's folder, or of one of its model files; None of others.

    Of a folder the weights that val selected, where it did, else the last.

    Raises:
        UserError: a folder without a model of ours, or a damaged file.
    """
    if path.is_dir():
        found = next((path / name for name in OWN_FILES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path} holds no {OWN_FILES[-1]}; name the folder of a finished run, or a file of weights")
        state = read_state(found)
        if not _is_own(state):  # model hubs give their files this name, too
            raise UserError(f"{path} is no run's folder: its {found.name} is of another program; name that file itself")
        return state
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            own = _is_own(file.keys())
    except (OSError, SafetensorError):
        return None  # who reads it says what is wrong with it
    return read_state(path) if own else None


def _is_own(names: Iterable[str]) -> bool:
    parts = {name.partition(".")[0] for name in names}
    return "classifier" in parts and bool(parts & {"branch", "conventional"})


def _unwrapped(key: str) -> str:
    while key.startswith(WRAPPED):
        key = key.partition(".")[2]
    return key


def load_state(module: nn.Module, state: dict[str, Tensor], source: Path | str, remedy: str) -> None:
    """Load `state` into `module` if all names and shapes agree, else name the first that does not."""
    check_state(module.state_dict(), state, source, remedy)
    module.load_state_dict(state, strict=False)


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Path | str, remedy: str) -> None:
    """Raise a UserError that names the first tensor in which two state dicts differ by name or shape."""
    for key in [*own, *(key for key in state if key not in own)]:
        # Old files lack this counter, which batch norm with a momentum never reads.
        if key.endswith("num_batches_tracked"):
            continue
        here, there = (str(tuple(side[key].shape)) if key in side else "absent" for side in (own, state))
        if here != there:
            raise UserError(f"{source} is of another model: {key} is {there} in it and {here} here; {remedy}")
