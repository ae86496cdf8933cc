"""Backbones: a network cut before its last residual block, and the layer that normalises pictures.

torchvision is imported where it is needed: that takes longer than all else that a command line's --help waits for.
"""

import copy
import difflib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shards.errors import UserError
from train.networks.adapters import ADAPTED
from train.networks.timm_models import PREFIX, make_parts, nearest
from train.networks.weights import load_state, read_own, read_state

CIFAR_MEAN_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """Grey levels to normalised channels: (x / 255 − mean) / std, in float32 whatever autocast says.

    Takes images_BHWC, uint8 in 0..255 (a mixture of images may be floating point in the same range).
    Returns images_BCHW, float32, in channels_last memory, where the permutation copies nothing, or contiguous.
    """

    channels_last: bool = True
    mean: Tensor
    std: Tensor

    def __init__(self, mean_std: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET_MEAN_STD) -> None:
        super().__init__()
        mean_C, std_C = mean_std
        self.register_buffer("mean", torch.tensor(mean_C).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std_C).view(-1, 1, 1))

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """See the class."""
        images_BCHW = (images_BHWC.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return images_BCHW if self.channels_last else images_BCHW.contiguous()


class Stages(nn.Sequential):
    """A ResNet's stem and stages, one after the other.

    Attributes:
        recomputes: whether each residual block is computed again in the backward pass: gradient checkpointing.
    """

    recomputes: bool = False

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """See the class."""
        for name, stage in self.named_children():
            if self.recomputes and self.training and name.startswith("layer"):
                for block in stage.children():
                    maps_BCHW = checkpoint(block, maps_BCHW, use_reentrant=False)
            else:
                maps_BCHW = stage(maps_BCHW)
        return maps_BCHW


@dataclass(frozen=True)
class Backbone:
    """A network cut before its last block. One backbone serves one network.

    Attributes:
        name: as in `make_backbone`.
        normalize: the first layer.
        trunk: normalised images_BCHW -> maps or tokens, everything up to the last block.
        make_branch: returns a new last block at each call: initialised on its own, or a copy of the
            pretrained block where weights were given. It gives maps (B, D, H, W), or features (B, D) where pooling,
            and a norm at the end, are parts of it.
        feature_dim: D, channels of the branch's output.
        spec: what else `make_backbone` needs to build the same again.
        groups: patterns that group parameters by depth, as timm has them: {"stem": …, "blocks": …}.
        block: what the last block is called in a network that is not cut, where the branch does not have the name.
        is_cut: False where the trunk is empty, and the branch is the whole network.
    """

    name: str
    normalize: Normalize
    trunk: nn.Module
    make_branch: Callable[[], nn.Module]
    feature_dim: int
    spec: dict[str, Any] = field(default_factory=dict)
    groups: Any = field(default_factory=dict)
    block: str = ""
    is_cut: bool = True


def make_backbone(
    name: str, weights: str | None = None, image_size: int | None = None, drop_path: float = 0.0
) -> Backbone:
    """Build a backbone by name.

    Args:
        name: "resnet32" (the CIFAR network of He et al., "Deep Residual Learning for Image Recognition",
            2015, section 4.2), "resnet10" (one basic block in each of the four stages, as Liu et al., "Large-Scale
            Long-Tailed Recognition in an Open World", 2019, train on ImageNet-LT), any torchvision ResNet such
            as "resnet50" or "resnext50_32x4d", or "timm/NAME" for one of timm's classification models.
        weights: None for a random start; "default" for those that torchvision or timm have (downloaded on first use),
            or another of torchvision's names, such as "IMAGENET1K_V2"; or the path of a .safetensors or .pth file with
            a state dict of the whole network, in torchvision's names or timm's; or the folder of a finished run (its
            selected weights, where it has some), or one of its model files. The classifier is left out.
        image_size: of the pictures to come, which vision transformers have to know; None: the model's own.
        drop_path: the rate of stochastic depth at the last block: how probably training leaves a block out for an
            image (Huang et al., "Deep Networks with Stochastic Depth", 2016). It rises linearly from 0 at the first
            block. Draws come from torch's generator.

    Raises:
        UserError: unknown backbone; weights that are unknown, unreadable or of another backbone; what the model cannot
            be built for.
    """
    by_name = weights is None or weights.lower() == "default"  # also where a folder has this name
    if not by_name and (state := read_own(Path(str(weights)))) is not None:
        return _started_from(make_backbone(name, None, image_size, drop_path), state, str(weights))
    if name.startswith(PREFIX):
        parts = make_parts(name, weights, image_size, drop_path)
        return Backbone(
            name,
            Normalize((parts.view.mean, parts.view.std)),
            parts.trunk,
            parts.make_branch,
            parts.feature_dim,
            {"image_size": image_size or parts.view.image_size},
            parts.groups,
            is_cut=parts.is_cut,
        )
    if name in _OWN_RESNETS:
        net, owner = _OWN_RESNETS[name](), "a"
    elif name in _torchvision_resnets():
        from torchvision.models import get_model

        net, owner = get_model(name, weights=None), "torchvision's"
    else:
        choices = [*_OWN_RESNETS, *_torchvision_resnets()]
        near = difflib.get_close_matches(name, choices, 1, 0.8)
        guess = f"; did you mean {near[0]}?" if near else nearest(name)
        raise UserError(f"backbone {name!r} is unknown{guess}; choose one of: {', '.join(choices)}, or timm/NAME")
    stages = OrderedDict((key, child) for key, child in net.named_children() if key not in ("avgpool", "fc"))
    if weights is not None:
        state = {
            key: value for key, value in _pretrained(name, weights).items() if not key.startswith(("fc.", "linear."))
        }
        layers = ", ".join(key for key, stage in stages.items() if stage.state_dict())
        load_state(nn.Sequential(stages), state, weights, f"give the state dict of {owner} {name} ({layers})")
    if drop_path:
        staged = (stage.children() for key, stage in stages.items() if key.startswith("layer"))
        _use_drop_path([block for blocks in staged for block in blocks], drop_path)
    last_stage = next(reversed(stages))
    *first_blocks, last_block = stages[last_stage].children()
    stages[last_stage] = nn.Sequential(*first_blocks)
    *_, last_norm = (module for module in last_block.modules() if isinstance(module, nn.BatchNorm2d))

    def make_branch() -> nn.Module:
        branch = copy.deepcopy(last_block)
        return branch if weights else branch.apply(_he_initialise)

    normalize = Normalize(CIFAR_MEAN_STD if name == "resnet32" else IMAGENET_MEAN_STD)
    return Backbone(
        name,
        normalize,
        Stages(stages),
        make_branch,
        last_norm.num_features,
        groups={"stem": r"^(?:conv1|bn1)", "blocks": r"^layer(\d+)\.(\d+)"},
        block=f"{last_stage}.{len(first_blocks)}.",
    )


def _started_from(backbone: Backbone, state: dict[str, Tensor], source: str) -> Backbone:
    """Return a backbone with the trunk and the last block of a model of our own."""
    remedy = f"name a run whose backbone is {backbone.name}, shown pictures of the same size"
    trunk, last_block = (_inside(state, prefix) for prefix in ("trunk.", "branch."))
    if any(key.endswith(ADAPTED) for key in trunk.keys() - backbone.trunk.state_dict().keys()):
        raise UserError(
            f"{source} trained adapters (model.adapt), which are no part of {backbone.name}; name the weights that it"
            " started from"
        )
    load_state(backbone.trunk, trunk, f"{source} (its trunk)", remedy)
    block = backbone.make_branch()
    load_state(block, last_block or _inside(state, "conventional."), f"{source} (its last block)", remedy)
    shown = _inside(state, "normalize.")
    if any(
        key in shown and not torch.allclose(shown[key], value.to(shown[key]))
        for key, value in backbone.normalize.state_dict().items()
    ):
        raise UserError(
            f"{source} was shown pictures that are normalised otherwise than {backbone.name}'s; name the backbone that"
            " it began with, tag included"
        )
    return replace(backbone, make_branch=lambda: copy.deepcopy(block))


def _inside(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _use_drop_path(blocks: list[nn.Module], rate: float) -> None:
    """Let ResNets' blocks drop what is to be added to their shortcut, which ends with a norm; see `make_backbone`."""
    from torchvision.ops import stochastic_depth

    def drop(of_block: float, norm: nn.Module, _: Any, maps_BDHW: Tensor) -> Tensor:
        return stochastic_depth(maps_BDHW, of_block, "row", norm.training)

    for number, block in enumerate(blocks):
        norm = block.get_submodule("bn3" if hasattr(block, "bn3") else "bn2")
        norm.register_forward_hook(partial(drop, rate * number / (len(blocks) - 1)))


def _torchvision_resnets() -> list[str]:
    from torchvision import models

    return [
        name
        for name in models.list_models(module=models)
        if models.get_model_builder(name).__module__ == "torchvision.models.resnet"
    ]


def _pretrained(backbone: str, weights: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    named = {} if backbone in _OWN_RESNETS else get_model_weights(backbone).__members__
    if weights.lower() == "default" and named:
        weights = "DEFAULT"
    if weights in named:
        try:
            return named[weights].get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"weights {weights!r} of {backbone} cannot be downloaded ({type(error).__name__});"
                f" get {named[weights].url} another way and give the path of the file"
            ) from None
    if not Path(weights).is_file():
        names = ", ".join(named) or "none"
        raise UserError(
            f"weights {weights!r} are neither a file, a run nor one of torchvision's names for {backbone}: {names}"
        )
    return read_state(Path(weights))


def _he_initialise(module: nn.Module) -> None:
    """Initialise a convolution as torchvision's ResNets do; in ResNet-32's last block both fans are the same."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class CifarBlock(nn.Module):
    """Two 3×3 convolutions and a parameter-free shortcut (He et al. 2015, option A).

    Maps (B, in_channels, H, W) to (B, channels, ⌈H/stride⌉, ⌈W/stride⌉); where the shape changes, the shortcut
    takes every second pixel and pads the channels with zeros on both sides.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """See the class."""
        out_BCHW = F.relu(self.bn1(self.conv1(maps_BCHW)))
        out_BCHW = self.bn2(self.conv2(out_BCHW))
        if self.padding:
            maps_BCHW = maps_BCHW[:, :, :: self.stride, :: self.stride]
            maps_BCHW = F.pad(maps_BCHW, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out_BCHW + maps_BCHW)


def _resnet32() -> nn.Module:
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight)
    return nn.Sequential(
        OrderedDict(
            conv1=stem,
            bn1=nn.BatchNorm2d(16),
            relu=nn.ReLU(inplace=True),
            layer1=nn.Sequential(*(CifarBlock(16, 16) for _ in range(5))),
            layer2=nn.Sequential(CifarBlock(16, 32, stride=2), *(CifarBlock(32, 32) for _ in range(4))),
            layer3=nn.Sequential(CifarBlock(32, 64, stride=2), *(CifarBlock(64, 64) for _ in range(4))),
        )
    )


def _resnet10() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    network: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1])
    return network


_OWN_RESNETS: dict[str, Callable[[], nn.Module]] = {"resnet32": _resnet32, "resnet10": _resnet10}
