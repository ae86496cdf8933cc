"""Trained models as files.

model.safetensors             the weights after the last epoch
model-selected.safetensors    those of the epoch that val chose, where it chose one
model.json                    how to rebuild the network, and what it takes to use it: see `Description`
"""

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from shards.atomic import partial_folder, write_json
from shards.errors import UserError
from train.networks.cosine import folded_state
from train.networks.networks import BilateralNetwork, Network, PlainNetwork, build_network
from train.networks.weights import load_state, read_state

FORMAT = 1
WEIGHTS_FILE = "model.safetensors"
SELECTED_FILE = "model-selected.safetensors"
SPEC_FILE = "model.json"
FILES = {"last": WEIGHTS_FILE, "selected": SELECTED_FILE}


@dataclass(frozen=True)
class Description:
    """What somebody who has nothing but the model's folder needs to know to use it.

    Attributes:
        classes: class names by label.
        train_counts: n_j, training images of class j.
        image_size: S: the network sees S×S pixels.
        eval_augment: the recipe of evaluation.
        crop_share: the centre square that it shows, as a share of the shorter side; None where it shows another window.
        interpolation: how that square is brought to S×S.
        mean, std: of the channels R, G, B in [0, 1]; the network normalises by itself.
        shorter_side: to which larger images were shrunk (bicubic) when the dataset was built; None: they were not.
        quality: the JPEG quality with which shrunk images were stored.
        grey_bits: how many bits its images of 16-bit grey use.
        dataset: its name, and the fingerprint of the images that it was built from.
        method: what tables call the method.
        commit: of the code; None outside a checkout.
        evaluated_on: the split of the figures.
        weights: for "last", and "selected" where val chose an epoch: "file", "epoch", "figures" (as in summary.json).
    """

    classes: list[str]
    train_counts: list[int]
    image_size: int
    eval_augment: str
    crop_share: float | None
    mean: list[float]
    std: list[float]
    shorter_side: int | None
    quality: int
    dataset: dict[str, Any]
    method: str
    commit: str | None
    evaluated_on: str
    weights: dict[str, dict[str, Any]]
    interpolation: str = "bilinear, antialiased (triangle filter)"
    grey_bits: int = 16


def save_model(network: Network, folder: Path | str) -> None:
    """Write `model.safetensors` (the state) and `model.json` (the network's spec) into `folder`.

    A cosine classifier is written as the plain linear layer that gives the same logits. The folder is made where it is
    missing. An earlier model goes first, with its selected weights: a kill leaves no model rather than a mixed one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "network": network.spec}
    with partial_folder(folder / ".model.partial") as temporary:
        _save_state(network, temporary / WEIGHTS_FILE)
        write_json(temporary / SPEC_FILE, content)
        for name in (SPEC_FILE, SELECTED_FILE):
            (folder / name).unlink(missing_ok=True)
        for name in (WEIGHTS_FILE, SPEC_FILE):
            os.replace(temporary / name, folder / name)


def save_selected_model(network: Network, folder: Path) -> None:
    """Write the selected weights beside the last ones; `describe_model` is to name them."""
    with partial_folder(folder / ".model.partial") as temporary:
        _save_state(network, temporary / SELECTED_FILE)
        os.replace(temporary / SELECTED_FILE, folder / SELECTED_FILE)


def describe_model(folder: Path, description: Description) -> None:
    """Add a description to the `model.json` that `save_model` wrote."""
    content = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
    write_json(folder / SPEC_FILE, {key: content[key] for key in ("format", "network")} | asdict(description))


def load_model(folder: Path | str, weights: str = "last") -> PlainNetwork | BilateralNetwork:
    """Return the network that `save_model` wrote into `folder`, on the CPU, in evaluation mode.

    Args:
        folder: a run's folder, or a copy of its model files.
        weights: "last" or "selected".

    Raises:
        UserError: a file is missing, damaged, or one does not fit the other; or of a newer format.
    """
    folder = Path(folder)
    network = build_network(**_network_spec(folder))
    load_weights(network, folder / FILES[weights])
    return network.eval()


def read_description(folder: Path | str) -> Description | None:
    """Return a model's description, or None where it was written before there were any.

    Raises:
        UserError: the file is missing, damaged or of a newer format.
    """
    content = _read_json(Path(folder))
    if "classes" not in content:
        return None
    names = {field.name for field in fields(Description)}
    try:
        return Description(**{key: value for key, value in content.items() if key in names})
    except TypeError as error:
        raise UserError(f"{Path(folder) / SPEC_FILE} is damaged ({error}); train the run again") from None


def choose_weights(folder: Path | str, asked: str | None) -> str:
    """Return which weights to use: those asked for, else the selected ones where val chose an epoch, else the last.

    Raises:
        UserError: selected weights are asked for and there are none.
    """
    has_selected = "selected" in _read_json(Path(folder)).get("weights", {})
    if asked == "selected" and not has_selected:
        raise UserError(
            f"{folder} has no selected weights: no val split chose an epoch, or they were not yet kept as a model when"
            " it was trained; use --weights last"
        )
    return asked or ("selected" if has_selected else "last")


def load_weights(network: nn.Module, path: Path | str, remedy: str | None = None) -> None:
    """Load a file that `save_model` wrote into a network of the same architecture, in place.

    Raises:
        UserError: the file is missing or damaged, or belongs to another architecture; `network` is
            unchanged then.
    """
    remedy = remedy or f"build the network that the {SPEC_FILE} beside it names"
    load_state(network, read_state(Path(path)), path, remedy)


def _save_state(network: nn.Module, path: Path) -> None:
    # safetensors refuses channels_last tensors. A file that it writes itself nobody else may read, and what goes wrong
    # there is no OSError.
    path.write_bytes(save({key: value.detach().cpu().contiguous() for key, value in folded_state(network).items()}))


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / SPEC_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} does not exist, so {folder} holds no trained model; give a finished run's folder"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train the run again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object); train the run again")
    if content.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path} is of format {content['format']!r}, this version reads {FORMAT}; use a newer tailstream"
        )
    return content


def _network_spec(folder: Path) -> dict[str, Any]:
    """Return the arguments of `build_network`; before there was a format, they were all of model.json."""
    content = _read_json(folder)
    spec = content.get("network") if "format" in content else content
    parameters = inspect.signature(build_network).parameters
    needed = {name for name, one in parameters.items() if one.default is one.empty}
    if not isinstance(spec, Mapping) or not needed <= spec.keys() <= parameters.keys() - {"weights"}:
        raise UserError(
            f"{folder / SPEC_FILE} must hold exactly kind, backbone and num_classes of the network; train the run again"
        )
    return dict(spec)
