"""Cutting one of timm's models before its last block, by one rule.

    stem ─ blocks ─ … ─┬─ last block ─ norm ─ pool ─> features_BD       ResNet, ConvNeXt: the last block of the last
          trunk        └─ its own copy of all that ──> features_BD      stage; vision transformer: the last block

Trunk and branch are the same timm model, each with the other's parts replaced by nothing, so that parameters keep
timm's names, and the model's own code connects what is left. Features are what timm's classifier would see.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import UserError

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
# Stages that call their blocks one after the other, as nn.Sequential does.
STAGES = ("RegStage",)
# Parts without parameters that trunk and branch both need: rotary position embeddings.
SHARED = ("rope",)


class Nothing(nn.Module):
    """In the place of a part that is elsewhere: returns what it is given, without what only that part needs."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """See the class."""
        return hidden


class Trunk(nn.Module):
    """A timm model up to its last block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # of timm, which has no types

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


def full_precision(tensor: Tensor) -> torch.autocast:
    """Switch autocast off where the tensor is."""
    return torch.autocast("cuda" if tensor.is_cuda else "cpu", enabled=False)


class Branch(nn.Module):
    """A timm model from its last block on, less its classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # of timm, which has no types

    def forward(self, hidden: Tensor) -> Tensor:
        """Return features_BD, float32: pooling, and a norm that follows it, are float32 also under autocast."""
        maps = self.model.forward_features(hidden)
        with full_precision(hidden):
            whole = maps.float() if isinstance(maps, Tensor) else [one.float() for one in maps]  # some have several
            features_BD: Tensor = self.model.forward_head(whole, pre_logits=True)
        return features_BD


def can_be_cut(model: nn.Module) -> bool:
    """Return whether the rule holds for a model."""
    shared = [module for name, module in model.named_children() if name in SHARED]
    return type(model).__name__ in CUT and not any(list(module.parameters()) for module in shared)


def cut(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the trunk, and the rest of the model from the last block on; the model becomes the trunk."""
    path = last_block(model)
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


def last_block(model: Any) -> list[str]:
    """Return the path of the last block: where the last stage ends."""
    path = str(model.feature_info[-1]["module"]).split(".")
    while True:
        module = model.get_submodule(".".join(path))
        if isinstance(module, nn.Sequential) or type(module).__name__ in STAGES:
            path.append([name for name, _ in module.named_children()][-1])
        elif isinstance(getattr(module, "blocks", None), nn.Sequential):
            path.append("blocks")
        else:
            return path


def drawn_anew(branch: nn.Module) -> nn.Module:
    """Draw every matrix and kernel again, with the spread that it has: timm's initialisation, on the branch's own.

    Gains and scales, which begin as a constant, keep it.
    """
    with torch.no_grad():
        for parameter in branch.parameters():
            if parameter.ndim > 1 and parameter.min() < parameter.max():
                parameter.normal_(std=parameter.std().item())
    return branch
