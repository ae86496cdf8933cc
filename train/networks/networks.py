"""Plain and bilateral networks.

Every network takes images_BHWC, uint8, RGB, as the loaders hand them over; normalising is its first layer.

              plain                                     bilateral (BBN, Figure 3)

    images ─ trunk ─ branch ─ pool ─ W·f+b    images_c ─ trunk ─ conventional ─ pool ─ 2·W_c·f_c+b
                                                           ‖ (one trunk, one pass)
                                              images_r ─ trunk ─ rebalancing ── pool ─ 2·W_r·f_r+b

The trunk is a ResNet up to its last residual block, and a branch is that last block
(Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning", 2020, section 4.2).

With a cosine classifier every branch's features are of unit length. What is saved of such a network is a plain linear
classifier on features of unit length, so that second stages, prediction and export know nothing of cosines.
"""

from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import UserError
from train.networks.backbones import Backbone, make_backbone
from train.networks.batch_norm import split_statistics, use_stream_batch_norm
from train.networks.cosine import SCALE, CosineClassifier, plain_weight

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
        spec: {"kind", "backbone", "num_classes"}, and "unit_features": true where features are of unit length:
            `build_network(**spec)` builds the architecture that `save_model` saves.
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
        self._unit_features = unit_features or classifier == "cosine"
        if self._unit_features:
            self.spec["unit_features"] = True
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
        """Stages of the trunk after which maps can be mixed: depths are 0 … `depths`."""
        return sum(name.startswith("layer") for name, _ in self.trunk.named_children())

    @property
    def last_blocks(self) -> list[nn.Module]:
        """The branches, beside each other."""
        raise NotImplementedError

    @property
    def layers(self) -> list[list[nn.Module]]:
        """All below the classifier by depth: the stem, the trunk's blocks one by one, the branches."""
        stages = list(self.trunk.named_children())
        stem = [child for name, child in stages if not name.startswith("layer")]
        blocks = [block for name, stage in stages if name.startswith("layer") for block in stage.children()]
        return [stem, *([block] for block in blocks), self.last_blocks]

    def freeze_trunk(self) -> None:
        """Keep the trunk as it is from now on: without gradients, its batch norm as in evaluation.

        Nothing of it is kept for the backward pass then, because nothing in it needs a gradient.
        """
        self.trunk_is_frozen = True
        self.trunk.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Train or evaluate, as every module; a frozen trunk always evaluates."""
        super().train(mode)
        if self.trunk_is_frozen:
            self.trunk.eval()
        return self

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
        with full_precision(features_BD):
            return self.classifier(features_BD.float())

    def _trunk_maps(self, images_BHWC: Tensor) -> Tensor:
        return self.trunk(self.normalize(images_BHWC))

    def _pool(self, maps_BDHW: Tensor) -> Tensor:
        """Return features_BD of one branch: global average pooling, and unit length where the network has it.

        Float32 also where autocast made the maps bfloat16.
        """
        features_BD = maps_BDHW.mean((2, 3), dtype=torch.float32)
        return F.normalize(features_BD) if self._unit_features else features_BD


def full_precision(tensor: Tensor) -> torch.autocast:
    """Switch autocast off where the tensor is."""
    return torch.autocast("cuda" if tensor.is_cuda else "cpu", enabled=False)


class PlainNetwork(Network):
    """A ResNet with one branch. `classifier` maps D features to C logits."""

    kind = "plain"
    branches = 1

    def __init__(self, backbone: Backbone, num_classes: int, **head: Any) -> None:
        super().__init__(backbone, num_classes, **head)
        self.branch = backbone.make_branch()

    @property
    def last_blocks(self) -> list[nn.Module]:
        """The branch."""
        return [self.branch]

    def features(self, images_BHWC: Tensor) -> Tensor:
        """Return features_BD, float32, >= 0, of images_BHWC, uint8."""
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
        names = [name for name, _ in self.trunk.named_children()]
        cut = 0 if mix.depth == 0 else names.index(f"layer{mix.depth}") + 1
        below, above = self.trunk[:cut], self.trunk[cut:]
        maps_BDHW = below(self.normalize(images_BHWC))
        others_BDHW = maps_BDHW if others_BHWC is None else below(self.normalize(others_BHWC))
        partners_BDHW = others_BDHW.index_select(0, mix.partners_B)
        shares_B111 = mix.shares_B.to(maps_BDHW.dtype).view(-1, 1, 1, 1)
        mixed_BDHW = shares_B111 * maps_BDHW + (1 - shares_B111) * partners_BDHW
        return self.classify(self._pool(self.branch(above(mixed_BDHW))))


class BilateralNetwork(Network):
    """A shared trunk and two branches (BBN section 4.2). `classifier` maps 2D features to C logits."""

    kind = "bilateral"
    branches = 2

    def __init__(self, backbone: Backbone, num_classes: int, **head: Any) -> None:
        super().__init__(backbone, num_classes, **head)
        use_stream_batch_norm(self.trunk)
        self._trunk_weights = sum(weights.numel() for weights in self.trunk.parameters())
        self.conventional = backbone.make_branch()
        self.rebalancing = backbone.make_branch()

    @property
    def last_blocks(self) -> list[nn.Module]:
        """The conventional and the re-balancing branch."""
        return [self.conventional, self.rebalancing]

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
        if images_c_BHWC.is_cpu and self._trunk_weights < CPU_WEIGHTS_PER_VALUE * images_c_BHWC.numel():
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
        """Return [f_c ; f_r] of the same images, shape (B, 2D), float32, >= 0.

        `predict` is therefore the mean of both branches' logits: α = 1/2 (BBN section 4.4).
        """
        maps_BDHW = self._trunk_maps(images_BHWC)
        return torch.cat([self._pool(self.conventional(maps_BDHW)), self._pool(self.rebalancing(maps_BDHW))], dim=1)

    def single(self, branch: Literal["conventional", "rebalancing"]) -> "PlainNetwork":
        """Return one branch as a plain network, whose logits are that branch's: z_c or z_r (BBN, Table 5).

        The layers are shared with this network and not copied.
        """
        plain = PlainNetwork(
            make_backbone(self.spec["backbone"]), self.spec["num_classes"], unit_features=self._unit_features
        )
        plain.normalize, plain.trunk, plain.branch = self.normalize, self.trunk, getattr(self, branch)
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

    Raises:
        UserError: an unknown kind or backbone, fewer than one class, or weights that do not fit.
    """
    if kind not in _KINDS:
        raise UserError(f"network kind {kind!r} is unknown; choose one of: {', '.join(_KINDS)}")
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"a network needs at least one class, got num_classes={num_classes!r}")
    head = {"classifier": classifier, "scale": scale, "unit_features": unit_features}
    return _KINDS[kind](make_backbone(backbone, weights), num_classes, **head)
