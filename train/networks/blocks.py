"""What may be done to a network's residual blocks, in place: drop path, and checkpointing of gradients.

                                       ┌─ drop path: in training, left out for some of the images ─┐
    maps ─┬─ convolutions or attention ┴───────────────────────────────────────────────────────────┴─(+)─ maps
          └──────────────────────────────────── shortcut ─────────────────────────────────────────────┘

    checkpointing: of each block only its input is kept for the backward pass, which computes the rest again

Neither changes the names in a state dict.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from shards.errors import UserError
from train.networks.batch_norm import StreamBatchNorm2d
from train.networks.networks import Network

# Where timm's blocks have their drop path; torchvision's and our own have none, and end with one of these norms.
DROP_PATHS = ("drop_path", "drop_path1", "drop_path2")
LAST_NORMS = ("bn3", "bn2")


def use_drop_path(network: Network, rate: float) -> None:
    """Leave out blocks at random while training: image by image, the first never, the last with probability `rate`.

    Between them the probability rises linearly with depth. What is not left out is divided by the probability of that
    (Huang et al., "Deep Networks with Stochastic Depth", 2016, section 3). Draws come from torch's generator.

    Raises:
        UserError: the network has no residual blocks that are known here.
    """
    from torchvision.ops import StochasticDepth, stochastic_depth

    def drop(one: float, norm: nn.Module, _: Any, maps_BDHW: Tensor) -> Tensor:
        return stochastic_depth(maps_BDHW, one, "row", norm.training)

    _, *layers = network.layers
    found = 0
    for number, blocks in enumerate(layers):
        one = rate * number / max(1, len(layers) - 1)
        for block in blocks:
            own = [(module, name) for module in block.modules() for name in DROP_PATHS if hasattr(module, name)]
            for module, name in own:
                setattr(module, name, StochasticDepth(one, "row"))
            norms = [] if own else [getattr(block, name) for name in LAST_NORMS if hasattr(block, name)]
            for norm in norms[:1]:
                norm.register_forward_hook(partial(drop, one))
            found += len(own) + len(norms)
    if not found:
        raise UserError(
            f"model.drop_path={rate:g}: {network.spec['backbone']} has no residual blocks whose path could be dropped;"
            " leave it out"
        )


def checkpoint_blocks(network: Network) -> None:
    """Keep no more of each block than its input for the backward pass, which computes the block again.

    Gradients, batch norm's statistics and what is drawn at random are the same as without; a step costs about a third
    more time.
    """
    for blocks in network.layers[1:]:
        for block in blocks:
            vars(block)["forward"] = partial(_checkpointed, block, type(block).forward)


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(block, *inputs, **options)
    norms = _streams(block.modules())

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _again(norms)

    return checkpoint(partial(forward, block), *inputs, use_reentrant=False, context_fn=contexts, **options)


@contextmanager
def _again(norms: dict[_BatchNorm, int]) -> Iterator[None]:
    """Let batch norm compute as it did, in as many streams, and leave the running statistics as they are."""

    def put(track: bool, streams: dict[_BatchNorm, int]) -> None:
        for norm in norms:
            norm.track_running_stats = track
            if isinstance(norm, StreamBatchNorm2d):
                norm.streams = streams[norm]

    now = _streams(norms)
    put(False, norms)
    try:
        yield
    finally:
        put(True, now)


def _streams(norms: Iterable[nn.Module]) -> dict[_BatchNorm, int]:
    """Return those that keep running statistics, and how many streams each takes apart."""
    return {
        norm: norm.streams if isinstance(norm, StreamBatchNorm2d) else 1
        for norm in norms
        if isinstance(norm, _BatchNorm) and norm.track_running_stats
    }
