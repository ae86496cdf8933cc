"""Plain and bilateral networks.

Every network takes images_BHWC, uint8, RGB, as the loaders hand them over; normalising is its first layer.

              plain                                     bilateral (BBN, Figure 3)

    images ─ trunk ─ branch ─ pool ─ W·f+b    images_c ─ trunk ─ conventional ─ pool ─ 2·W_c·f_c+b
                                                           ‖ (one trunk, one pass)
                                              images_r ─ trunk ─ rebalancing ── pool ─ 2·W_r·f_r+b

The trunk is a ResNet up to its last residual block, and a branch is that last block
(Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning", 2020, section 4.2).
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import UserError
from train.networks.backbones import Backbone, make_backbone
from train.networks.batch_norm import split_statistics, use_stream_batch_norm

# Weights of the trunk for each value in a stream's images. One pass reads the weights once; two keep smaller maps in
# a CPU's caches. The first counts for ResNet-50 on a few images (200 weights a value: 1.1 to 1.2 times as fast), the
# second for ResNet-32 on a batch of 64 (2 weights a value: 0.9 times); see analysis/results/benchmarks.md.
CPU_WEIGHTS_PER_VALUE = 16


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
        with full_precision(features_BD):
            return self.classifier(features_BD.float())

    def _trunk_maps(self, images_BHWC: Tensor) -> Tensor:
        return self.trunk(self.normalize(images_BHWC))


def full_precision(tensor: Tensor) -> torch.autocast:
    """Switch autocast off where the tensor is."""
    return torch.autocast("cuda" if tensor.is_cuda else "cpu", enabled=False)


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

    def forward(self, images_c_BHWC: Tensor, images_r_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Return each branch's logits, z_c = 2·W_c·f_c + b and z_r = 2·W_r·f_r + b, both (B, C), float32.

        W = [W_c W_r] and b are the one classifier's. The method mixes them: α·z_c + (1−α)·z_r is
        W·[2α·f_c ; 2(1−α)·f_r] + b (BBN Eq. 1, and the authors' code, whose are the bias and the factor 2 that keeps
        the scale of a single branch). In training each stream has its own batch statistics, and both update the running
        ones, the re-balancing one last. All in one forward, as distributed training demands.

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
        features_c_BD = _pool(self.conventional(maps_c_BDHW))
        features_r_BD = _pool(self.rebalancing(maps_r_BDHW))
        weight_c_CD, weight_r_CD = self.classifier.weight.chunk(2, dim=1)
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
