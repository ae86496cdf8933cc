"""Backbones from timm, cut before their last block by one rule.

    stem ─ blocks ─ … ─┬─ last block ─ norm ─ pool ─> features_BD       ResNet, ConvNeXt: the last block of the last
          trunk        └─ its own copy of all that ──> features_BD      stage; vision transformer: the last block

Trunk and branch are the same timm model, each with the other's parts replaced by identities, so that parameters keep
timm's names, and the model's own code connects what is left. Features are what timm's classifier would see.

timm is imported where it is needed: it takes seconds.
"""

import contextlib
import copy
import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import UserError
from train.networks.weights import check_state, read_state

PREFIX = "timm/"
# Classes of timm's for which the rule holds; tests compare each with the whole model. Others are not cut.
CUT = (
    "ConvNeXt",
    "EfficientNet",
    "Eva",
    "MaxxVit",
    "MetaFormer",
    "MetaNeXt",
    "MlpMixer",
    "MobileNetV3",
    "RegNet",
    "RepVit",
    "ResNet",
    "ResNetV2",
    "SwinTransformer",
    "VisionTransformer",
)
# Parts without parameters that trunk and branch both need: rotary position embeddings.
SHARED = ("rope",)
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


class Nothing(nn.Module):
    """In the place of a part that is elsewhere: returns what it is given, without what only that part needs."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """See the class."""
        return hidden


class Trunk(nn.Module):
    """A timm model up to its last block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return what the last block takes: maps (B, C, H, W), or tokens (B, N, C)."""
        hidden: Tensor = self.model.forward_features(images_BCHW)
        return hidden

    def set_grad_checkpointing(self, on: bool) -> None:
        """Have each block computed again in the backward pass.

        Raises:
            UserError: the model does not know how.
        """
        try:
            self.model.set_grad_checkpointing(on)
        except (AssertionError, AttributeError):
            raise UserError(
                f"{type(self.model).__name__} of timm's does not support gradient checkpointing; leave it out"
            ) from None


class Branch(nn.Module):
    """A timm model from its last block on, less its classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        """Return features_BD, float32: pooling, and a norm that follows it, are float32 also under autocast."""
        hidden = self.model.forward_features(hidden)
        with torch.autocast("cuda" if hidden.is_cuda else "cpu", enabled=False):
            features_BD: Tensor = self.model.forward_head(hidden.float(), pre_logits=True)
        return features_BD


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
    groups = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else {}
    is_cut = type(model).__name__ in CUT and not any(
        list(model.get_submodule(name).parameters()) for name, _ in model.named_children() if name in SHARED
    )
    trunk, last = _cut(model) if is_cut else (nn.Identity(), model)
    branch = Branch(last)

    def make_branch() -> nn.Module:
        made = copy.deepcopy(branch)
        return made if weights else _drawn_anew(made)

    return Parts(trunk, make_branch, feature_dim, view, groups, is_cut)


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


def _build(name: str, config: Any, weights: str | None, size: int, drop_path: float) -> nn.Module:
    import timm

    given: dict[str, Any] = {"num_classes": 0}
    if config.fixed_input_size:
        given["img_size"] = size
    if timm.models.model_entrypoint(config.architecture).__module__ == "timm.models.eva":
        given |= {"img_size": size, "dynamic_img_size": False}  # where a branch needs no maps' height and width
    if drop_path:
        given["drop_path_rate"] = drop_path
    bare = name.removeprefix(PREFIX)
    try:
        model: nn.Module = timm.create_model(bare, **given)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        what = "stochastic depth, or " if drop_path else ""
        raise UserError(
            f"{name} cannot be built for {what}pictures of {size}×{size} ({_line(error)}); give"
            f" --input.image_size {config.input_size[-1]}, its own"
        ) from None
    if weights is not None and weights.lower() == "default":
        _download(name, config, model)
    elif weights is not None:
        _load(name, config, model, weights)
    return model


def _download(name: str, config: Any, model: nn.Module) -> None:
    from timm.models import load_pretrained, set_pretrained_download_progress

    if not config.has_weights:
        raise UserError(f"timm has no weights for {name}; give a file with --model.weights, or leave it out")
    set_pretrained_download_progress(True)
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        load_pretrained(model, num_classes=0, filter_fn=filter_fn)
    except Exception as error:  # of timm, of the hub's client, of HTTP: whatever stands between here and the file
        if config.hf_hub_id:
            file = config.hf_hub_filename or "model.safetensors"
            place = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}"
        else:
            place = file = str(config.url)
        raise UserError(
            f"the weights of {name} cannot be downloaded ({type(error).__name__}); download {place} where there is a"
            f" network, copy {file.rpartition('/')[2]} to this machine and give --model.weights PATH of it"
        ) from None


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
    ends = tuple(f"{classifier}.{end}" for classifier in classifiers for end in ("weight", "bias"))
    state = {key: value for key, value in state.items() if key in own or key not in ends}
    check_state(own, state, weights, f"give the state dict of timm's {name.removeprefix(PREFIX)}")
    model.load_state_dict(state, strict=False)


@torch.no_grad()
def _check_features(name: str, model: nn.Module, size: int) -> int:
    """Return D, found by showing the model pictures that have a size and no contents."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise UserError(f"{name} has no features for a classifier; choose another of timm's models")
    was_training = model.training
    model.eval()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            images_BCHW = fake.from_tensor(torch.zeros(2, 3, size, size))
            features = model.forward_head(model.forward_features(images_BCHW), pre_logits=True)
            shape = tuple(features.shape)
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


def _cut(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return trunk and last block with what follows; the model becomes the trunk."""
    path = _last_block(model)
    before: list[nn.Module] = []
    after: list[tuple[nn.Module, str]] = []
    above, direct = model, list(model.named_parameters(recurse=False))
    for key in path:
        names = [name for name, _ in above.named_children()]
        place = names.index(key)
        before += [above.get_submodule(name) for name in names[:place] if name not in SHARED]
        after += [(above, name) for name in names[place + 1 :]]
        parent, above = above, above.get_submodule(key)
    # What the trunk keeps is not copied.
    memo: dict[int, Any] = {id(module): Nothing() for module in before}
    memo |= {id(parameter): nn.Parameter(torch.empty(0)) for _, parameter in direct}
    last = copy.deepcopy(model, memo)
    for name, _ in direct:
        last.register_parameter(name, None)
    for module, name in [*after, (parent, path[-1])]:
        setattr(module, name, Nothing())
    return Trunk(model), last


def _last_block(model: nn.Module) -> list[str]:
    """Return the path of the last block: where the last stage ends."""
    path = str(model.feature_info[-1]["module"]).split(".")
    while True:
        module = model.get_submodule(".".join(path))
        if isinstance(module, nn.Sequential):
            path.append([name for name, _ in module.named_children()][-1])
        elif isinstance(getattr(module, "blocks", None), nn.Sequential):
            path.append("blocks")
        else:
            return path


def _drawn_anew(branch: nn.Module) -> nn.Module:
    """Draw every matrix and kernel again, with the spread that it has: timm's initialisation, on the branch's own."""
    with torch.no_grad():
        for parameter in branch.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.std().item())
    return branch
