"""Plain and bilateral networks.

Every network takes images_BHWC, uint8, RGB, as the loaders hand them over; normalising is its first layer.

              plain                                     bilateral (BBN, Figure 3)

    images ─ trunk ─ branch ─ pool ─ W·f+b    images_c ─ trunk ─ conventional ─ pool ─ 2·W_c·f_c+b
                                                           ‖ (one trunk, one pass)
                                              images_r ─ trunk ─ rebalancing ── pool ─ 2·W_r·f_r+b

The trunk is a network up to its last block, and a branch is that last block, with the norm and the pooling that follow
(Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning", 2020, section 4.2, for ResNets).

With a cosine classifier every branch's features are of unit length. What is saved of such a network is a plain linear
classifier on features of unit length, so that second stages, prediction and export know nothing of cosines.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import UserError
from train.networks.adapters import adapt as add_adapters
from train.networks.backbones import Backbone, Stages, make_backbone
from train.networks.batch_norm import (
    StreamBatchNorm2d,
    can_split_statistics,
    split_statistics,
    use_stream_batch_norm,
)
from train.networks.cosine import SCALE, CosineClassifier, plain_weight
from train.networks.cutting import Trunk, full_precision
from train.networks.depths import depth_key, numbered, part_of

# Weights of the trunk for each value in a stream's images. One pass reads the weights once; two keep smaller maps in
# a CPU's caches. The first counts for ResNet-50 on a few images (200 weights a value: 1.1 to 1.2 times as fast), the
# second for ResNet-32 on a batch of 64 (2 weights a value: 0.9 times); see analysis/results/benchmarks.md.
CPU_WEIGHTS_PER_VALUE = 16


Classifier = Literal["linear", "cosine"]


class HiddenMix(NamedTuple):
    """How hidden maps are mixed (manifold mixup): shares_B · h + (1 − shares_B) · h'[partners_B] at a depth.

    Attributes:
        depth: 0 for the normalised pictures, k for what stage k of the trunk gives; see `Network.depths`.
        partners_B: each image's partner, as a row of h', int64.
        shares_B: the weight of its own maps, 0 … 1, float32.
    """

    depth: int
    partners_B: Tensor
    shares_B: Tensor


class Network(nn.Module):
    """What every kind of network offers.

    Attributes:
        kind: the kind's name in `build_network`.
        branches: last blocks that it has, beside each other.
        trunk_is_frozen: whether training leaves the trunk as it is; see `freeze_trunk`.
        is_cut: False where the trunk is empty and the branch is the whole network.
        spec: {"kind", "backbone", "num_classes"}; "unit_features": true where features are of unit length; and
            "image_size" of one of timm's models, and "adapt" of one with adapters: `build_network(**spec)` builds the
            architecture that `save_model` saves.
        classifier: the last layer; `predict(images) == classifier(features(images))` exactly.
    """

    kind: ClassVar[str]
    branches: ClassVar[int]
    trunk_is_frozen: bool = False

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        classifier: Classifier = "linear",
        scale: float = SCALE,
        unit_features: bool = False,
    ) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {"kind": self.kind, "backbone": backbone.name, "num_classes": num_classes}
        self.spec |= backbone.spec
        self.is_cut = backbone.is_cut
        self._groups, self._block = backbone.groups, backbone.block
        self._unit_features = unit_features or classifier == "cosine"
        if self._unit_features:
            self.spec["unit_features"] = True
        self._recomputes = False
        self.normalize = backbone.normalize
        self.trunk = backbone.trunk
        inputs = self.branches * backbone.feature_dim
        self.classifier = (
            CosineClassifier(inputs, num_classes, self.branches, scale)
            if classifier == "cosine"
            else nn.Linear(inputs, num_classes)
        )

    @property
    def depths(self) -> int:
        """Stages of the trunk after which maps can be mixed: depths are 0 … `depths`; 0 of timm's models."""
        return sum(name.startswith("layer") for name, _ in self.trunk.named_children())

    def _need_trunk(self, setting: str) -> None:
        if not self.is_cut:
            raise UserError(f"{setting}: {self.spec['backbone']} is not cut, and has no trunk; leave it out")

    def freeze_trunk(self) -> None:
        """Keep the trunk as it is from now on: no gradients, no maps kept for them, batch norm as in evaluation."""
        self._need_trunk("optim.freeze=trunk")
        self.trunk_is_frozen = True
        self.trunk.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Train or evaluate, as every module; a frozen trunk always evaluates."""
        super().train(mode)
        if self.trunk_is_frozen:
            self.trunk.eval()
        return self

    def set_grad_checkpointing(self, on: bool = True) -> None:
        """Keep only what each block of the trunk takes, and compute the rest again in the backward pass.

        Memory for time: about a third of the maps' memory for a third more time. What is learnt is the same: batch norm
        leaves its running statistics alone when it computes again.

        Raises:
            UserError: no trunk, or blocks that cannot be computed again.
        """
        self._need_trunk("loop.grad_checkpointing")
        self._recomputes = on
        use_stream_batch_norm(self.trunk)
        for module in self.trunk.modules():
            if isinstance(module, StreamBatchNorm2d):
                module.recomputes = on
        if isinstance(self.trunk, Stages):
            self.trunk.recomputes = on
        elif isinstance(self.trunk, Trunk):
            self.trunk.set_grad_checkpointing(on)

    def parameter_depths(self) -> dict[str, int]:
        """Return how deep each parameter lies, by its name in `named_parameters`.

        0 is the stem's; each block of the trunk has a number more, the last block, with the norm that follows, one
        more in every branch, and the classifier one more still.
        """
        keys = {
            name: depth_key(self._groups, self._inner_name(name))
            for name, _ in self.named_parameters()
            if part_of(name) != "classifier"
        }
        order = numbered(set(keys.values()))
        last = max(order.values(), default=0)
        return {name: order.get(keys[name], last) if name in keys else last + 1 for name, _ in self.named_parameters()}

    def _inner_name(self, name: str) -> str:
        """Return what a parameter of trunk or branch is called in the network that was cut."""
        inner = name.partition(".")[2].removeprefix("model.")
        return inner if name.startswith("trunk.") else self._block + inner

    def features(self, images_BHWC: Tensor) -> Tensor:
        """Return what the classifier sees: shape (B, classifier.in_features), float32; >= 0 after a ReLU."""
        raise NotImplementedError

    def predict(self, images_BHWC: Tensor) -> Tensor:
        """Return logits_BC, float32, for one batch of images, uint8."""
        return self.classify(self.features(images_BHWC))

    def classify(self, features_BD: Tensor) -> Tensor:
        """Return logits_BC, float32 also under autocast: bfloat16 has so few steps that classes tie.

        Of 8,142 classes the two best tie on one image in forty, and a tie goes to the first of them: to the head.
        """
        with full_precision(features_BD):
            return self.classifier(features_BD.float())

    def _trunk_maps(self, images_BHWC: Tensor) -> Tensor:
        return self.trunk(self.normalize(images_BHWC))

    def _pool(self, branch_gave: Tensor) -> Tensor:
        """Return features_BD of one branch: global average pooling, and unit length where the network has it.

        Takes maps_BDHW, or features_BD of a branch that pools by itself. Float32 also where autocast made the maps
        bfloat16.
        """
        pooled = branch_gave.ndim == 2
        features_BD = branch_gave.float() if pooled else branch_gave.mean((2, 3), dtype=torch.float32)
        return F.normalize(features_BD) if self._unit_features else features_BD


class PlainNetwork(Network):
    """A network with one branch. `classifier` maps D features to C logits."""

    kind = "plain"
    branches = 1

    def __init__(self, backbone: Backbone, num_classes: int, **head: Any) -> None:
        super().__init__(backbone, num_classes, **head)
        self.branch = backbone.make_branch()

    def features(self, images_BHWC: Tensor) -> Tensor:
        """Return features_BD, float32, of images_BHWC, uint8; >= 0 after a ReLU."""
        return self._pool(self.branch(self._trunk_maps(images_BHWC)))

    def forward(self, images_BHWC: Tensor, mix: HiddenMix | None = None, others_BHWC: Tensor | None = None) -> Tensor:
        """Return logits_BC of images_BHWC, uint8.

        Args:
            images_BHWC: the images.
            mix: how their hidden maps are mixed; None: not at all.
            others_BHWC: the images whose maps are mixed in; None: the same. Up to the depth of the mixing the two have
                batch statistics of their own, as every stream has.
        """
        if mix is None:
            return self.predict(images_BHWC)
        assert 0 <= mix.depth <= self.depths, mix.depth
        below, above = self._trunk_cut(mix.depth)
        maps_BDHW = below(self.normalize(images_BHWC))
        others_BDHW = maps_BDHW if others_BHWC is None else below(self.normalize(others_BHWC))
        partners_BDHW = others_BDHW.index_select(0, mix.partners_B)
        shares_B111 = mix.shares_B.to(maps_BDHW.dtype).view(-1, 1, 1, 1)
        mixed_BDHW = shares_B111 * maps_BDHW + (1 - shares_B111) * partners_BDHW
        return self.classify(self._pool(self.branch(above(mixed_BDHW))))

    def _trunk_cut(self, depth: int) -> tuple[nn.Module, nn.Module]:
        """Return the trunk up to a depth, and the rest."""
        if depth == 0:
            return nn.Identity(), self.trunk
        names = [name for name, _ in self.trunk.named_children()]
        cut, stages = names.index(f"layer{depth}") + 1, cast(Stages, self.trunk)
        below, above = (cast(Stages, part) for part in (stages[:cut], stages[cut:]))
        below.recomputes = above.recomputes = stages.recomputes  # slices are new modules
        return below, above


class BilateralNetwork(Network):
    """A shared trunk and two branches (BBN section 4.2). `classifier` maps 2D features to C logits."""

    kind = "bilateral"
    branches = 2

    def __init__(self, backbone: Backbone, num_classes: int, **head: Any) -> None:
        if not backbone.is_cut:
            raise UserError(
                f"{backbone.name} cannot be cut before its last block, so that it has no branches; train it with"
                " train/erm.py, or choose a ResNet, a ConvNeXt or a vision transformer (vit_…)"
            )
        super().__init__(backbone, num_classes, **head)
        use_stream_batch_norm(self.trunk)
        self._splits = can_split_statistics(self.trunk)
        self._trunk_weights = sum(weights.numel() for weights in self.trunk.parameters())
        self.conventional = backbone.make_branch()
        self.rebalancing = backbone.make_branch()

    def forward(self, images_c_BHWC: Tensor, images_r_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Return each branch's logits, z_c = 2·W_c·f_c + b and z_r = 2·W_r·f_r + b, both (B, C), float32.

        W = [W_c W_r] and b are the one classifier's. The method mixes them: α·z_c + (1−α)·z_r is
        W·[2α·f_c ; 2(1−α)·f_r] + b (BBN Eq. 1, and the authors' code, whose are the bias and the factor 2 that keeps
        the scale of a single branch). With a cosine classifier a branch's logits are s·cos(w, f). In training each
        stream has its own batch statistics, and both update the running ones, the re-balancing one last. All in one
        forward, as distributed training demands.

        Args:
            images_c_BHWC: the conventional (instance-balanced) stream, uint8.
            images_r_BHWC: the re-balancing (reversed) stream, uint8; the same shape.
        """
        assert images_c_BHWC.shape == images_r_BHWC.shape, (images_c_BHWC.shape, images_r_BHWC.shape)
        small = images_c_BHWC.is_cpu and self._trunk_weights < CPU_WEIGHTS_PER_VALUE * images_c_BHWC.numel()
        # What is computed again in the backward pass does not know any more which streams it has.
        if small or self._recomputes or not self._splits:
            maps_c_BDHW, maps_r_BDHW = self._trunk_maps(images_c_BHWC), self._trunk_maps(images_r_BHWC)
        else:
            with split_statistics(self.trunk, 2):
                maps_c_BDHW, maps_r_BDHW = self._trunk_maps(torch.cat([images_c_BHWC, images_r_BHWC])).chunk(2)
        features_c_BD = self._pool(self.conventional(maps_c_BDHW))
        features_r_BD = self._pool(self.rebalancing(maps_r_BDHW))
        weight_c_CD, weight_r_CD = plain_weight(self.classifier).chunk(2, dim=1)
        with full_precision(features_c_BD):
            return (
                F.linear(2 * features_c_BD, weight_c_CD, self.classifier.bias),
                F.linear(2 * features_r_BD, weight_r_CD, self.classifier.bias),
            )

    def features(self, images_BHWC: Tensor) -> Tensor:
        """Return [f_c ; f_r] of the same images, shape (B, 2D), float32; >= 0 after a ReLU.

        `predict` is therefore the mean of both branches' logits: α = 1/2 (BBN section 4.4).
        """
        maps_BDHW = self._trunk_maps(images_BHWC)
        return torch.cat([self._pool(self.conventional(maps_BDHW)), self._pool(self.rebalancing(maps_BDHW))], dim=1)

    def single(self, branch: Literal["conventional", "rebalancing"]) -> "PlainNetwork":
        """Return one branch as a plain network, whose logits are that branch's: z_c or z_r (BBN, Table 5).

        The layers are shared with this network and not copied.
        """
        plain = PlainNetwork(
            make_backbone(self.spec["backbone"], image_size=self.spec.get("image_size")),
            self.spec["num_classes"],
            unit_features=self._unit_features,
        )
        plain.normalize, plain.trunk, plain.branch = self.normalize, self.trunk, getattr(self, branch)
        plain.spec |= {key: value for key, value in self.spec.items() if key == "adapt"}
        half = plain_weight(self.classifier).detach().chunk(2, dim=1)[branch == "rebalancing"]
        with torch.no_grad():
            plain.classifier.weight.copy_(2 * half)
            bias_C = self.classifier.bias
            plain.classifier.bias.copy_(torch.zeros(len(half)) if bias_C is None else bias_C)
        return plain.train(self.training)


_KINDS: dict[str, type[PlainNetwork] | type[BilateralNetwork]] = {
    network.kind: network for network in (PlainNetwork, BilateralNetwork)
}


def build_network(
    kind: Literal["plain", "bilateral"],
    backbone: str,
    num_classes: int,
    weights: str | None = None,
    classifier: Classifier = "linear",
    scale: float = SCALE,
    unit_features: bool = False,
    image_size: int | None = None,
    drop_path: float = 0.0,
    adapt: Mapping[str, Any] | None = None,
) -> PlainNetwork | BilateralNetwork:
    """Build a network by name.

    Args:
        kind: plain or bilateral.
        backbone: as in `make_backbone`.
        num_classes: C.
        weights: as in `make_backbone`.
        classifier: linear, or cosine (`train.networks.cosine`), whose features are of unit length.
        scale: what cosines are multiplied by.
        unit_features: whether a linear classifier's features are of unit length too, as a saved cosine network's are.
        image_size, drop_path: as in `make_backbone`.
        adapt: adapters beside frozen blocks, as in `train.networks.adapters.adapt`.

    Raises:
        UserError: an unknown kind or backbone, fewer than one class, or weights that do not fit.
    """
    if kind not in _KINDS:
        raise UserError(f"network kind {kind!r} is unknown; choose one of: {', '.join(_KINDS)}")
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"a network needs at least one class, got num_classes={num_classes!r}")
    head = {"classifier": classifier, "scale": scale, "unit_features": unit_features}
    network = _KINDS[kind](make_backbone(backbone, weights, image_size, drop_path), num_classes, **head)
    if adapt is not None:
        network.spec["adapt"] = add_adapters(network, backbone, num_classes, adapt)
    return network
