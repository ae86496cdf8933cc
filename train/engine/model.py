"""The network's settings, and how a pretrained one wants to be shown pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jsonargparse.typing import ClosedUnitInterval

from train.engine.calls import make_settings, split_call, unknown


@dataclass
class Model:
    """The network.

    Attributes:
        backbone: resnet32 (for small images), resnet10, a torchvision ResNet such as resnet50, resnet152 or
            resnext50_32x4d, or one of timm's models, such as timm/convnextv2_tiny.fcmae_ft_in22k_in1k.
        weights: pretrained weights: default (those of torchvision or timm, downloaded on first use), another of
            torchvision's names, a local file (.safetensors, .pth), or the folder of a run of the same backbone.
        adapt: of a vision transformer, train small layers beside its own, which keep their pretrained weights:
            adaptformer or lora, such as "adaptformer(dim=16)" or "lora(rank=8)".
        drop_path: with which probability training leaves out the last block for an image; earlier ones less often.
    """

    backbone: str = "resnet32"
    weights: str | None = None
    adapt: str | None = None
    drop_path: ClosedUnitInterval = 0.0

    def network(self) -> dict[str, Any]:
        """Return what `train.networks.networks.build_network` takes of these."""
        return {**vars(self), "adapt": make_adapter(self.adapt) if self.adapt else None}


def make_adapter(text: str) -> dict[str, Any]:
    """Return what `train.networks.adapters.adapt` takes, from "name" or "name(setting=value, …)".

    Raises:
        UserError: an unknown name, a setting that the adapter does not have, or a value that it cannot have.
    """
    from train.networks.adapters import KINDS

    name, given = split_call("model.adapt", text, "adaptformer or adaptformer(dim=16)")
    if name not in KINDS:
        raise unknown("model.adapt", name, KINDS)
    return {"kind": name, **vars(make_settings("model.adapt", text, name, KINDS[name], given))}


def with_own_view(defaults: Mapping[str, dict[str, Any]], backbone: str) -> dict[str, dict[str, Any]]:
    """Return a preset in which pictures have the size, centre and filter that one of timm's models was pretrained with.

    Args:
        defaults: {section: {key: value}}.
        backbone: its name; a preset for another kind of backbone is returned as it is.

    Raises:
        UserError: a name that timm does not know.
    """
    from train.networks.timm_models import PREFIX, own_view

    if not backbone.startswith(PREFIX):
        return dict(defaults)
    view, given = own_view(backbone), defaults.get("input", {})
    filter_ = "+bicubic" if view.interpolation == "bicubic" else ""
    own = {"image_size": view.image_size, "eval_augment": f"centre({view.crop_share:g}){filter_}"}
    if filter_ and filter_ not in given.get("augment", ""):
        own["augment"] = given.get("augment", "cifar") + filter_
    return {**defaults, "input": {**given, **own}}
