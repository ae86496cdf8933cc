"""Models from timm: by name, with their weights, checked and cut in two (`train.networks.cutting`).

timm is imported where it is needed: it takes seconds.
"""

import contextlib
import copy
import difflib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import UserError
from train.networks.cutting import Branch, can_be_cut, cut, drawn_anew
from train.networks.weights import check_state, read_state

PREFIX = "timm/"
# What models call their classifiers.
CLASSIFIERS = ("head.fc", "head", "fc", "classifier", "head_dist")


@dataclass(frozen=True)
class View:
    """How a model was shown pictures when it was pretrained.

    Attributes:
        image_size: S of S×S pixels.
        crop_share: the centre square shown in evaluation, as a share of the shorter side.
        interpolation: bilinear, bicubic, …
        mean, std: of the channels R, G, B in [0, 1].
    """

    image_size: int
    crop_share: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Parts:
    """A timm model in parts.

    Attributes:
        trunk: normalised images_BCHW -> what the last block takes.
        make_branch: returns a new branch at each call, what the trunk gives -> features_BD; see `make_parts`.
        feature_dim: D.
        view: the model's own.
        groups: timm's patterns that group parameters by depth: {"stem": …, "blocks": …}.
        is_cut: False for a model to which the rule does not apply: the trunk passes pictures on, the branch is the
            whole model.
    """

    trunk: nn.Module
    make_branch: Callable[[], nn.Module]
    feature_dim: int
    view: View
    groups: Any
    is_cut: bool


def own_view(name: str) -> View:
    """Return how "timm/NAME" was shown pictures, without building it.

    Raises:
        UserError: an unknown name.
    """
    return _view(_config(name))


def make_parts(name: str, weights: str | None, image_size: int | None, drop_path: float) -> Parts:
    """Build a timm model and cut it.

    Args:
        name: "timm/NAME", where NAME may have one of timm's tags, such as "timm/convnext_tiny.fb_in1k".
        weights: None for a random start, with branches that are drawn each on their own; "default" for those that timm
            downloads; or a .safetensors or .pth file in timm's names, or in those that timm's own conversion knows.
        image_size: of the pictures to come; None: the model's own.
        drop_path: the rate of stochastic depth at the last block.

    Raises:
        UserError: an unknown name; weights that cannot be downloaded or are of another model; pictures of a size that
            the model cannot take; a model without features for a classifier.
    """
    config = _config(name)
    view = _view(config)
    size = image_size or view.image_size
    model = _build(name, config, weights, size, drop_path)
    feature_dim = _check_features(name, model, size)
    groups = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else STAGED
    is_cut = can_be_cut(model)
    trunk, last = cut(model) if is_cut else (nn.Identity(), model)
    branch = Branch(last)

    def make_branch() -> nn.Module:
        made = copy.deepcopy(branch)
        # A model that is not cut has one branch, which is random as it is.
        return made if weights or not is_cut else drawn_anew(made)

    return Parts(trunk, make_branch, feature_dim, view, groups, is_cut)


# Depths of a model that does not say them itself, in the names that most have.
STAGED = {"stem": r"^stem", "blocks": r"^stages\.(\d+)(?:\.blocks\.(\d+))?"}


def _config(name: str) -> Any:
    """Return timm's configuration of the pretrained model."""
    import timm

    bare = name.removeprefix(PREFIX)
    architecture, _, tag = bare.partition(".")
    if timm.is_model(architecture):
        try:
            config = timm.get_pretrained_cfg(bare)
        except RuntimeError:
            tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", include_tags=True)]
            guess = difflib.get_close_matches(tag, tags, 1, 0.0)
            raise UserError(
                f"backbone {name!r}: {architecture} has no weights {tag!r};"
                + (f" did you mean {PREFIX}{architecture}.{guess[0]}?" if guess else "")
                + f" It has: {', '.join(tags) or 'none'}"
            ) from None
        if config is not None:
            return config
    raise UserError(f"backbone {name!r} is unknown to timm{nearest(architecture)}")


def nearest(architecture: str) -> str:
    """Return "; did you mean …?" with the models of timm whose names are spelt alike."""
    import timm

    near = difflib.get_close_matches(architecture, timm.list_models(), 3, 0.6)
    return f"; did you mean {' or '.join(PREFIX + name for name in near)}?" if near else ""


def _view(config: Any) -> View:
    return View(config.input_size[-1], config.crop_pct, config.interpolation, tuple(config.mean), tuple(config.std))


def _build(name: str, config: Any, weights: str | None, size: int, drop_path: float) -> Any:
    import timm

    given: dict[str, Any] = {"num_classes": 0}
    if config.fixed_input_size:
        given["img_size"] = size
    if timm.models.model_entrypoint(config.architecture).__module__ == "timm.models.eva":
        given |= {"img_size": size, "dynamic_img_size": False}  # where a branch needs no maps' height and width
    if drop_path:
        given["drop_path_rate"] = drop_path
    default = weights is not None and weights.lower() == "default"
    if default and not config.has_weights:
        raise UserError(f"timm has no weights for {name}; give a file with --model.weights, or leave it out")
    timm.models.set_pretrained_download_progress(True)
    bare = name.removeprefix(PREFIX)
    try:
        with _quiet_retries():
            model: nn.Module = timm.create_model(bare, pretrained=default, **given)
    except Exception as error:  # of timm, of the hub's client, of HTTP: whatever stands between here and the file
        if default and _can_be_built(bare, given):
            raise UserError(
                f"the weights of {name} cannot be downloaded ({type(error).__name__}); {_where(config)}"
            ) from None
        if drop_path and "drop_path_rate" in str(error):
            raise UserError(f"{name} has no stochastic depth; set --model.drop_path 0") from None
        raise UserError(
            f"{name} cannot be built for pictures of {size}×{size} pixels ({_line(error)}); give"
            f" --input.image_size {config.input_size[-1]}, its own"
        ) from None
    if not drop_path:
        for module in model.modules():
            if isinstance(module, timm.layers.DropPath):
                module.drop_prob = 0.0  # some of timm's models have a rate of their own
    if weights is not None and not default:
        _load(name, config, model, weights)
    return model


@contextlib.contextmanager
def _quiet_retries() -> Iterator[None]:
    """Keep the hub's client from reporting each of its ten attempts where there is no network; one line does it."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


def _can_be_built(bare: str, given: dict[str, Any]) -> bool:
    import timm

    try:
        timm.create_model(bare, **given)
    except Exception:
        return False
    return True


def _where(config: Any) -> str:
    """Say where the weights' file is, and what to do with it."""
    if config.hf_hub_id:
        file = config.hf_hub_filename or "model.safetensors"
        place = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}"
    else:
        place = str(config.url)
    return (
        f"download {place} where there is a network, copy {place.rpartition('/')[2]} to this machine and give"
        " --model.weights PATH of it"
    )


def _load(name: str, config: Any, model: nn.Module, weights: str) -> None:
    """Load a file into a model without a classifier; whatever the file has of one is left out."""
    if not Path(weights).is_file():
        raise UserError(f"weights {weights!r} are no file; give one, or --model.weights default to have timm's")
    state = read_state(Path(weights))
    own = model.state_dict()
    if not own.keys() <= state.keys() or any(state[key].shape != value.shape for key, value in own.items()):
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        with contextlib.suppress(Exception):  # made for states of this architecture, it may fail anywhere on others
            state = convert(state, model) if convert else state
    named = config.classifier or ()
    classifiers = {*CLASSIFIERS, *((named,) if isinstance(named, str) else named)}
    # With whatever lies beside the classifier in its module: heads may be several layers.
    heads = tuple({f"{classifier.partition('.')[0]}." for classifier in classifiers})
    state = {key: value for key, value in state.items() if key in own or not key.startswith(heads)}
    check_state(own, state, weights, f"give the state dict of timm's {name.removeprefix(PREFIX)}")
    model.load_state_dict(state, strict=False)


@torch.no_grad()
def _check_features(name: str, model: Any, size: int) -> int:
    """Return D, found by showing the model pictures that have a size and no contents."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise UserError(f"{name} has no features for a classifier; choose another of timm's models")
    was_training = model.training
    model.eval()

    def shape_of(images_BCHW: Tensor) -> tuple[int, ...]:
        return tuple(model.forward_head(model.forward_features(images_BCHW), pre_logits=True).shape)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            shape = shape_of(fake.from_tensor(torch.zeros(2, 3, size, size)))
    except Exception:  # some models look at the values
        try:
            shape = shape_of(torch.zeros(2, 3, size, size))
        except Exception as error:
            raise UserError(_cannot_take(name, model, size, error)) from None
    finally:
        model.train(was_training)
    if len(shape) != 2:
        raise UserError(
            f"{name} has no features for a classifier (it gives {len(shape) - 1} dimensions an image, and not one);"
            " choose another of timm's models"
        )
    return int(shape[1])


def _cannot_take(name: str, model: nn.Module, size: int, error: Exception) -> str:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch and size % patch[0]:
        below = size // patch[0] * patch[0]
        near = " or ".join(str(s) for s in (below, below + patch[0]) if s)
        return f"{name} cuts pictures into patches of {patch[0]} pixels, and {size} is no multiple; give {near}"
    return f"{name} cannot take pictures of {size}×{size} pixels ({_line(error)}); give another --input.image_size"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:120] or type(error).__name__
