"""Adapters: small layers beside those of a vision transformer, which stay as they were pretrained.

    adaptformer    h + MLP(LN h) + s·W_up·ReLU(W_down·LN h)    Chen et al., "AdaptFormer", NeurIPS 2022, Eq. 3
    lora           W_q + s·B_q·A_q, and W_v likewise           Hu et al., "LoRA", ICLR 2022, section 4.1; s is their α/r

Both begin as the pretrained network itself (W_up and B are 0). With the logit-adjusted loss, AdaptFormer is what LIFT
trains (Shi et al., "Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts", ICML 2024), to better tail
classes than training all weights. Every branch of a network has adapters of its own.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from shards.errors import UserError


@dataclass(frozen=True)
class AdaptFormer:
    """A bottleneck beside each MLP.

    Attributes:
        dim: its width; None: LIFT's choice, the largest power of 2 up to C / 2L for C classes and L blocks, at least 4.
        scale: s.
    """

    kind: ClassVar[str] = "adaptformer"
    dim: PositiveInt | None = None
    scale: PositiveFloat = 0.1

    def resolved(self, num_classes: int, blocks: int) -> "AdaptFormer":
        """Return the same with the width that is meant."""
        if self.dim is not None:
            return self
        return AdaptFormer(max(4, 2 ** int(math.log2(max(1.0, num_classes / (2 * blocks))))), self.scale)

    def fits(self, block: nn.Module) -> bool:
        """Return whether a block of a vision transformer can have them."""
        return isinstance(getattr(block, "norm2", None), nn.LayerNorm) and hasattr(block, "mlp")

    def adapt(self, block: Any) -> None:
        """Put adapters into a block, in place."""
        assert self.dim is not None
        width = block.norm2.normalized_shape[0]
        block.mlp = AdaptedMlp(block.mlp, width, self.dim, self.scale)


@dataclass(frozen=True)
class LoRA:
    """Low-rank changes of the weights of queries and values.

    Attributes:
        rank: r.
        scale: s = α/r.
    """

    kind: ClassVar[str] = "lora"
    rank: PositiveInt = 8
    scale: PositiveFloat = 1.0

    def resolved(self, num_classes: int, blocks: int) -> "LoRA":
        """Return the same: nothing depends on the network."""
        return self

    def fits(self, block: nn.Module) -> bool:
        """Return whether a block of a vision transformer can have them."""
        attention = getattr(block, "attn", None)
        qkv, bias = getattr(attention, "qkv", None), getattr(attention, "q_bias", None)  # some keep the bias apart
        return isinstance(qkv, nn.Linear) and bias is None

    def adapt(self, block: Any) -> None:
        """Put adapters into a block, in place."""
        block.attn.qkv = LowRankQV(block.attn.qkv, self.rank, self.scale)


KINDS: dict[str, type[AdaptFormer] | type[LoRA]] = {one.kind: one for one in (AdaptFormer, LoRA)}


# How weights are called that only adapters have.
ADAPTED = ".mlp.up.weight", ".qkv.up_q.weight"


class AdaptedMlp(nn.Module):
    """An MLP with a bottleneck beside it: tokens_BND to the same shape.

    Where a block scales what its MLP gives (layer scale, as DINOv2 and DeiT III have it), it scales the bottleneck too.
    """

    def __init__(self, mlp: nn.Module, width: int, dim: int, scale: float) -> None:
        super().__init__()
        self.mlp, self.scale = mlp, scale
        self.down, self.up = nn.Linear(width, dim), nn.Linear(dim, width)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """See the class."""
        mixed: Tensor = self.mlp(tokens_BND) + self.scale * self.up(F.relu(self.down(tokens_BND)))
        return mixed


class LowRankQV(nn.Module):
    """A linear layer that gives [q k v], with low-rank changes of q and v: tokens_BND to (B, N, 3A)."""

    def __init__(self, qkv: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.qkv, self.scale = qkv, scale
        width, attention = qkv.in_features, qkv.out_features // 3
        self.down = nn.Linear(width, 2 * rank, bias=False)
        self.up_q, self.up_v = (nn.Linear(rank, attention, bias=False) for _ in range(2))
        for up in (self.up_q, self.up_v):
            nn.init.zeros_(up.weight)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """See the class."""
        qkv: Tensor = self.qkv(tokens_BND)
        down_q, down_v = self.down(tokens_BND).chunk(2, dim=-1)
        q, v = self.up_q(down_q), self.up_v(down_v)
        return qkv + self.scale * torch.cat([q, torch.zeros_like(q), v], dim=-1)


def adapt(network: nn.Module, backbone: str, num_classes: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Freeze a network but for its classifier, and put adapters into its blocks, in place.

    Args:
        network: with `trunk`, branches and `classifier`.
        backbone: its name, for messages.
        num_classes: C.
        settings: {"kind": a name of `KINDS`, and the settings of that class}.

    Returns:
        The settings with nothing left open: with them the same network is built again.

    Raises:
        UserError: the network has no blocks of the kind that adapters know.
    """
    adapter = KINDS[settings["kind"]](**{name: value for name, value in settings.items() if name != "kind"})
    inside = {name: [b for b in _blocks(part) if adapter.fits(b)] for name, part in network.named_children()}
    if not inside["trunk"]:
        raise UserError(
            f"model.adapt={adapter.kind} fits the blocks of vision transformers such as timm/vit_small_patch16_224, and"
            f" none of model.backbone={backbone}; choose another of {', '.join(KINDS)}, or leave model.adapt out"
        )
    adapter = adapter.resolved(num_classes, len(inside["trunk"]) + 1)
    network.requires_grad_(False)
    network.get_submodule("classifier").requires_grad_(True)
    for block in (block for blocks in inside.values() for block in blocks):
        adapter.adapt(block)
    return {"kind": adapter.kind, **asdict(adapter)}


def _blocks(part: nn.Module) -> Iterator[nn.Module]:
    """Return the blocks of a vision transformer: what `blocks` of trunk and branch hold."""
    blocks = getattr(getattr(part, "model", None), "blocks", ())
    return (block for block in blocks if hasattr(block, "attn"))
