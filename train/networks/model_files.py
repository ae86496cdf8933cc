"""Trained models as files: `model.safetensors`, the state, and `model.json`, what it takes to rebuild the network."""

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from shards.atomic import partial_folder
from shards.errors import UserError
from train.networks.cosine import folded_state
from train.networks.networks import BilateralNetwork, Network, PlainNetwork, build_network
from train.networks.weights import load_state, read_state

WEIGHTS_FILE = "model.safetensors"
SPEC_FILE = "model.json"
_KEYS = {"kind", "backbone", "num_classes"}


def save_model(network: Network, folder: Path | str) -> None:
    """Write `model.safetensors` (the state) and `model.json` (the spec) into `folder`.

    A cosine classifier is written as the plain linear layer that gives the same logits. Each file appears whole or not
    at all. The folder is made where it is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses channels_last tensors.
    state = {key: value.detach().cpu().contiguous() for key, value in folded_state(network).items()}
    with partial_folder(folder / ".model.partial") as temporary:
        save_file(state, temporary / WEIGHTS_FILE)
        (temporary / SPEC_FILE).write_text(json.dumps(network.spec, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS_FILE, SPEC_FILE):
            os.replace(temporary / name, folder / name)


def load_model(folder: Path | str) -> PlainNetwork | BilateralNetwork:
    """Return the network that `save_model` wrote into `folder`, on the CPU, in evaluation mode.

    Raises:
        UserError: a file is missing, damaged, or one does not fit the other.
    """
    path = Path(folder) / SPEC_FILE
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} cannot be read, so {folder} holds no trained model; give a run's folder") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train the run again") from None
    if not isinstance(spec, dict) or spec.keys() not in (_KEYS, _KEYS | {"unit_features"}):
        raise UserError(
            f"{path} must hold exactly kind, backbone and num_classes, and unit_features in some; train the run again"
        )
    network = build_network(**spec)
    load_weights(network, Path(folder) / WEIGHTS_FILE)
    return network.eval()


def load_weights(network: nn.Module, path: Path | str) -> None:
    """Load a file that `save_model` wrote into a network of the same architecture, in place.

    Raises:
        UserError: the file is missing or damaged, or belongs to another architecture; `network` is
            unchanged then.
    """
    remedy = f"build the network that the {SPEC_FILE} beside it names"
    load_state(network, read_state(Path(path)), path, remedy)
