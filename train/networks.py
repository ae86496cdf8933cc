"""Plain and bilateral networks, and how they are stored.

Every network takes images_BHWC, uint8, RGB, as the loaders hand them over; normalising is its first layer.

              plain                                     bilateral (BBN, Figure 3)

    images ─ trunk ─ branch ─ pool ─ W·f+b    images_c ─ trunk ─ conventional ─ pool ─ 2α·f_c ────┐
                                                           ‖ (one trunk, one pass)                ├─ W·[;]+b
                                              images_r ─ trunk ─ rebalancing ── pool ─ 2(1−α)·f_r ┘

The trunk is a ResNet up to its last residual block, and a branch is that last block
(Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning", 2020, section 4.2).
"""

import copy
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from shards.errors import UserError
from train.batch_norm import split_statistics, use_stream_batch_norm
from train.runs import partial_folder

WEIGHTS_FILE = "model.safetensors"
SPEC_FILE = "model.json"

CIFAR_MEAN_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Weights of the trunk for each value in a stream's images. One pass reads the weights once; two keep smaller maps in
# a CPU's caches. The first counts for ResNet-50 on a few images (200 weights a value: 1.1 to 1.2 times as fast), the
# second for ResNet-32 on a batch of 64 (2 weights a value: 0.9 times); see analysis/results/benchmarks.md.
CPU_WEIGHTS_PER_VALUE = 16


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


@dataclass(frozen=True)
class Backbone:
    """A ResNet cut before its last residual block. One backbone serves one network.

    Attributes:
        name: as in `make_backbone`.
        normalize: the first layer.
        trunk: normalised images_BCHW -> maps, everything up to the last block.
        make_branch: returns a new last block at each call: initialised on its own, or a copy of the
            pretrained block where weights were given.
        feature_dim: D, channels of the branch's output.
    """

    name: str
    normalize: Normalize
    trunk: nn.Sequential
    make_branch: Callable[[], nn.Module]
    feature_dim: int


def make_backbone(name: str, weights: str | None = None) -> Backbone:
    """Build a backbone by name.

    Args:
        name: "resnet32" (the CIFAR network of He et al., "Deep Residual Learning for Image Recognition",
            2015, section 4.2), "resnet10" (one basic block in each of the four stages, as Liu et al., "Large-Scale
            Long-Tailed Recognition in an Open World", 2019, train on ImageNet-LT), or any torchvision ResNet such
            as "resnet50" or "resnext50_32x4d".
        weights: None for a random start; a name that torchvision has for this backbone ("DEFAULT",
            "IMAGENET1K_V2", downloaded on first use); or the path of a .safetensors or .pth file with a state dict
            of the whole ResNet, in torchvision's names. Its classifier (`fc.*` or `linear.*`) is left out.

    Raises:
        UserError: unknown backbone, or weights that are unknown, unreadable or of another backbone.
    """
    if name in _OWN_RESNETS:
        net, owner = _OWN_RESNETS[name](), "a"
    elif name in _torchvision_resnets():
        net, owner = torchvision.models.get_model(name, weights=None), "torchvision's"
    else:
        choices = ", ".join([*_OWN_RESNETS, *_torchvision_resnets()])
        raise UserError(f"backbone {name!r} is unknown; choose one of: {choices}")
    stages = OrderedDict((key, child) for key, child in net.named_children() if key not in ("avgpool", "fc"))
    if weights is not None:
        state = {
            key: value for key, value in _pretrained(name, weights).items() if not key.startswith(("fc.", "linear."))
        }
        layers = ", ".join(key for key, stage in stages.items() if stage.state_dict())
        _load_state(nn.Sequential(stages), state, weights, f"give the state dict of {owner} {name} ({layers})")
    last_stage = next(reversed(stages))
    *first_blocks, last_block = stages[last_stage].children()
    stages[last_stage] = nn.Sequential(*first_blocks)
    *_, last_norm = (module for module in last_block.modules() if isinstance(module, nn.BatchNorm2d))

    def make_branch() -> nn.Module:
        branch = copy.deepcopy(last_block)
        return branch if weights else branch.apply(_he_initialise)

    normalize = Normalize(CIFAR_MEAN_STD if name == "resnet32" else IMAGENET_MEAN_STD)
    return Backbone(name, normalize, nn.Sequential(stages), make_branch, last_norm.num_features)


def _torchvision_resnets() -> list[str]:
    models = torchvision.models
    return [
        name
        for name in models.list_models(module=models)
        if models.get_model_builder(name).__module__ == "torchvision.models.resnet"
    ]


def _pretrained(backbone: str, weights: str) -> dict[str, Tensor]:
    named = {} if backbone in _OWN_RESNETS else torchvision.models.get_model_weights(backbone).__members__
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
            f"weights {weights!r} are neither a file nor one of torchvision's names for {backbone}: {names}"
        )
    return _read_state(Path(weights))


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


_OWN_RESNETS: dict[str, Callable[[], nn.Module]] = {
    "resnet32": _resnet32,
    "resnet10": lambda: ResNet(BasicBlock, [1, 1, 1, 1]),
}


class Network(nn.Module):
    """What every kind of network offers.

    Attributes:
        kind: the kind's name in `build_network`.
        spec: {"kind", "backbone", "num_classes"}: `build_network(**spec)` builds the same architecture.
        classifier: the last layer; `predict(images) == classifier(features(images))` exactly.
    """

    kind: ClassVar[str]

    def __init__(self, backbone: Backbone, num_classes: int, classifier_inputs: int) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {"kind": self.kind, "backbone": backbone.name, "num_classes": num_classes}
        self.normalize = backbone.normalize
        self.trunk = backbone.trunk
        self.classifier = nn.Linear(classifier_inputs, num_classes)

    def features(self, images_BHWC: Tensor) -> Tensor:
        """Return what the classifier sees: shape (B, classifier.in_features), float32, >= 0."""
        raise NotImplementedError

    def predict(self, images_BHWC: Tensor) -> Tensor:
        """Return logits_BC, float32, for one batch of images, uint8."""
        return self.classify(self.features(images_BHWC))

    def classify(self, features_BD: Tensor) -> Tensor:
        """Return logits_BC, float32 also under autocast: bfloat16 has so few steps that classes tie.

        Of 8,142 classes the two best tie on one image in forty, and a tie goes to the first of them: to the head.
        """
        with torch.autocast("cuda" if features_BD.is_cuda else "cpu", enabled=False):
            return self.classifier(features_BD.float())

    def _trunk_maps(self, images_BHWC: Tensor) -> Tensor:
        return self.trunk(self.normalize(images_BHWC))


def _pool(maps_BDHW: Tensor) -> Tensor:
    """Global average pooling to features_BD; float32 also where autocast made the maps bfloat16."""
    return maps_BDHW.mean((2, 3), dtype=torch.float32)


class PlainNetwork(Network):
    """A ResNet with one branch. `classifier` maps D features to C logits."""

    kind = "plain"

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone, num_classes, backbone.feature_dim)
        self.branch = backbone.make_branch()

    def features(self, images_BHWC: Tensor) -> Tensor:
        """Return features_BD, float32, >= 0, of images_BHWC, uint8."""
        return _pool(self.branch(self._trunk_maps(images_BHWC)))

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Return logits_BC of images_BHWC, uint8."""
        return self.predict(images_BHWC)


class BilateralNetwork(Network):
    """A shared trunk and two branches (BBN section 4.2). `classifier` maps 2D features to C logits."""

    kind = "bilateral"

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone, num_classes, 2 * backbone.feature_dim)
        use_stream_batch_norm(self.trunk)
        self._trunk_weights = sum(weights.numel() for weights in self.trunk.parameters())
        self.conventional = backbone.make_branch()
        self.rebalancing = backbone.make_branch()

    def forward(self, images_c_BHWC: Tensor, images_r_BHWC: Tensor, alpha: float) -> Tensor:
        """Mix the two streams: z = W·[2α·f_c ; 2(1−α)·f_r] + b (BBN Eq. 1).

        The factor 2 keeps the scale of a single branch, and the bias is the authors' code's. In training each
        stream has its own batch statistics, and both update the running ones, the reversed one last. All in one
        forward, as distributed training demands.

        Args:
            images_c_BHWC: the conventional (instance-balanced) stream, uint8.
            images_r_BHWC: the re-balancing (reversed) stream, uint8; the same shape.
            alpha: α in [0, 1], the conventional branch's share (BBN Eq. 5).

        Returns:
            logits_BC.
        """
        assert 0 <= alpha <= 1, alpha
        assert images_c_BHWC.shape == images_r_BHWC.shape, (images_c_BHWC.shape, images_r_BHWC.shape)
        if images_c_BHWC.is_cpu and self._trunk_weights < CPU_WEIGHTS_PER_VALUE * images_c_BHWC.numel():
            maps_c_BDHW, maps_r_BDHW = self._trunk_maps(images_c_BHWC), self._trunk_maps(images_r_BHWC)
        else:
            with split_statistics(self.trunk, 2):
                maps_c_BDHW, maps_r_BDHW = self._trunk_maps(torch.cat([images_c_BHWC, images_r_BHWC])).chunk(2)
        features_c_BD = _pool(self.conventional(maps_c_BDHW))
        features_r_BD = _pool(self.rebalancing(maps_r_BDHW))
        return self.classify(torch.cat([2 * alpha * features_c_BD, 2 * (1 - alpha) * features_r_BD], dim=1))

    def features(self, images_BHWC: Tensor) -> Tensor:
        """Return [f_c ; f_r] of the same images, shape (B, 2D), float32, >= 0.

        `predict` is therefore `forward` with both streams alike and α = 1/2 (BBN section 4.4).
        """
        maps_BDHW = self._trunk_maps(images_BHWC)
        return torch.cat([_pool(self.conventional(maps_BDHW)), _pool(self.rebalancing(maps_BDHW))], dim=1)


_KINDS: dict[str, type[PlainNetwork] | type[BilateralNetwork]] = {
    network.kind: network for network in (PlainNetwork, BilateralNetwork)
}


def build_network(
    kind: Literal["plain", "bilateral"], backbone: str, num_classes: int, weights: str | None = None
) -> PlainNetwork | BilateralNetwork:
    """Build a network by name; `backbone` and `weights` as in `make_backbone`.

    Raises:
        UserError: an unknown kind or backbone, fewer than one class, or weights that do not fit.
    """
    if kind not in _KINDS:
        raise UserError(f"network kind {kind!r} is unknown; choose one of: {', '.join(_KINDS)}")
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"a network needs at least one class, got num_classes={num_classes!r}")
    return _KINDS[kind](make_backbone(backbone, weights), num_classes)


def save_model(network: Network, folder: Path | str) -> None:
    """Write `model.safetensors` (the state) and `model.json` (the spec) into `folder`.

    Each file appears whole or not at all. The folder is made where it is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses channels_last tensors.
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
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
    if not isinstance(spec, dict) or spec.keys() != {"kind", "backbone", "num_classes"}:
        raise UserError(f"{path} must hold exactly kind, backbone and num_classes; train the run again")
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
    _load_state(network, _read_state(Path(path)), path, remedy)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the file of a trained model") from None
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); replace the damaged file") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no plain state dict; save model.state_dict() and give that file")
    return state


def _load_state(module: nn.Module, state: dict[str, Tensor], source: Path | str, remedy: str) -> None:
    """Load `state` into `module` if all names and shapes agree, else name the first that does not."""
    own = module.state_dict()
    for key in [*own, *(key for key in state if key not in own)]:
        # Old files lack this counter, which batch norm with a momentum never reads.
        if key.endswith("num_batches_tracked"):
            continue
        here, there = (str(tuple(side[key].shape)) if key in side else "absent" for side in (own, state))
        if here != there:
            raise UserError(f"{source} is of another model: {key} is {there} in it and {here} here; {remedy}")
    module.load_state_dict(state, strict=False)
