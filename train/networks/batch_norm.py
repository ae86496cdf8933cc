"""Batch norm for several streams in one batch: each is normalised by its own statistics.

    one pass       [ uniform | reversed ] ─ conv ─ norm ─ relu ─ …      norm: mean and variance of each part,
                      B images  B images                                running statistics: first part, then the second

So a trunk that runs once over both streams does what two passes would do, to rounding, and costs less: kernels are
started once, and weights are read once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.module_tracker import ModuleTracker

from shards.errors import UserError

IN_BACKWARD = ModuleTracker()


class StreamBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d`, with the same state dict, that in training takes `streams` batches one after the other.

    Maps (S·B, C, H, W) to the same shape. In evaluation, or with one stream, it is BatchNorm2d.

    Attributes:
        streams: S, of the batches to come; see `split_statistics`.
        synchronised: whether a stream's statistics are those of all ranks, which need the same B each. Works on
            every backend, unlike `torch.nn.SyncBatchNorm`.
        recomputes: whether it may be called again in the backward pass (gradient checkpointing), when running
            statistics must stay.
    """

    streams: int = 1
    synchronised: bool = False
    recomputes: bool = False
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        """See the class. A UserError where there is one value of a channel and stream alone."""
        maps_NCHW = self._normalized(maps_NCHW)
        for follows in self._modules.values():  # of timm's norms, which hold their activation
            maps_NCHW = cast(nn.Module, follows)(maps_NCHW)
        return maps_NCHW

    def _normalized(self, maps_NCHW: Tensor) -> Tensor:
        if self.training:
            assert len(maps_NCHW) % self.streams == 0, (len(maps_NCHW), self.streams)
            again = self.recomputes and IN_BACKWARD.is_bw
            if self.synchronised and dist.is_initialized() and dist.get_world_size() > 1:
                return self._over_ranks(maps_NCHW, again)
            if maps_NCHW.numel() // (self.streams * self.num_features) < 2:
                # The kernel below would leave a variance that is no number, and say nothing.
                raise UserError(
                    f"a part of one image, whose maps are {maps_NCHW.shape[2]}x{maps_NCHW.shape[3]} here, has no"
                    " variance to normalise by; use a larger input.batch_size or input.image_size, fewer processes, or"
                    " a smaller optim.accumulate"
                )
            if again:
                # A momentum of 0 leaves them as they are; without them autograd would miss what it saved before.
                running = self.running_mean, self.running_var
                return F.batch_norm(maps_NCHW, *running, self.weight, self.bias, True, 0.0, self.eps)
            if self.streams > 1 and torch.compiler.is_compiling():
                # The compiler fuses the copy, and cannot see through results that are written in place.
                parts = maps_NCHW.chunk(self.streams)
                return torch.cat([super(StreamBatchNorm2d, self).forward(part) for part in parts])
            if self.streams > 1:
                self.num_batches_tracked += self.streams
                return cast(
                    Tensor,
                    _NormalizeParts.apply(
                        maps_NCHW,
                        self.weight,
                        self.bias,
                        self.running_mean,
                        self.running_var,
                        self.momentum,
                        self.eps,
                        self.streams,
                    ),
                )
        return super().forward(maps_NCHW)

    def _over_ranks(self, maps_NCHW: Tensor, again: bool) -> Tensor:
        parts_SBCHW = maps_NCHW.float().unflatten(0, (self.streams, -1))
        var_SC, mean_SC = torch.var_mean(parts_SBCHW, dim=(1, 3, 4), correction=0)
        mean_RSC, var_RSC = _gather_over_ranks(torch.stack([mean_SC, var_SC])).unbind(1)
        mean_SC = mean_RSC.mean(0)
        var_SC = (var_RSC + (mean_RSC - mean_SC) ** 2).mean(0)
        scale_SC = self.weight * torch.rsqrt(var_SC + self.eps)
        offset_SC = self.bias - mean_SC * scale_SC
        pixels = dist.get_world_size() * parts_SBCHW.numel() // (self.streams * self.num_features)
        with torch.no_grad():
            for mean, var in () if again else zip(mean_SC, var_SC * (pixels / (pixels - 1)), strict=True):
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
            self.num_batches_tracked += 0 if again else self.streams
        normal_SBCHW = torch.addcmul(offset_SC[:, None, :, None, None], parts_SBCHW, scale_SC[:, None, :, None, None])
        return normal_SBCHW.flatten(0, 1).to(maps_NCHW.dtype)


class _NormalizeParts(torch.autograd.Function):
    """Normalises each part of a batch into its place in the result: no part is copied, as `cat` would do."""

    @staticmethod
    def forward(
        context: Any,
        maps_NCHW: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        running_mean_C: Tensor,
        running_var_C: Tensor,
        momentum: float,
        eps: float,
        streams: int,
    ) -> Tensor:
        out_NCHW = torch.empty_like(maps_NCHW)
        mean_SC, inverse_std_SC = weight_C.new_empty((2, streams, len(weight_C)))
        for part, out, mean, inverse_std in zip(
            maps_NCHW.chunk(streams), out_NCHW.chunk(streams), mean_SC, inverse_std_SC, strict=True
        ):
            torch.native_batch_norm(
                part,
                weight_C,
                bias_C,
                running_mean_C,
                running_var_C,
                True,
                momentum,
                eps,
                out=(out, mean, inverse_std),
            )
        context.save_for_backward(maps_NCHW, weight_C, mean_SC, inverse_std_SC)
        context.eps = eps
        return out_NCHW

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        maps_NCHW, weight_C, mean_SC, inverse_std_SC = context.saved_tensors
        streams = len(mean_SC)
        grad_maps_NCHW = torch.empty_like(maps_NCHW)
        grad_weight_C, grad_bias_C = torch.zeros_like(weight_C), torch.zeros_like(weight_C)
        for part, gradient, grad_part, mean, inverse_std in zip(
            maps_NCHW.chunk(streams),
            gradients[0].chunk(streams),
            grad_maps_NCHW.chunk(streams),
            mean_SC,
            inverse_std_SC,
            strict=True,
        ):
            maps, weight, bias = torch.ops.aten.native_batch_norm_backward(
                gradient, part, weight_C, None, None, mean, inverse_std, True, context.eps, [True, True, True]
            )
            grad_part.copy_(maps)
            grad_weight_C += weight
            grad_bias_C += bias
        return grad_maps_NCHW, grad_weight_C, grad_bias_C, None, None, None, None, None


def _gather_over_ranks(values: Tensor) -> Tensor:
    """Return all ranks' values, a row each: the sum of tables in which every rank fills its own row."""
    rows = [torch.zeros_like(values)] * dist.get_world_size()
    rows[dist.get_rank()] = values
    return cast(Tensor, _SumOverRanks.apply(torch.stack(rows)))


class _SumOverRanks(torch.autograd.Function):
    """Σ over ranks; every rank's loss depends on it, so its gradient is their gradients' sum."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def use_stream_batch_norm(network: nn.Module, synchronised: bool | None = None) -> None:
    """Put a `StreamBatchNorm2d` with the same parameters and buffers in the place of every BatchNorm2d.

    Args:
        network: changed in place.
        synchronised: see the class; None leaves those that are there already as they are.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if not isinstance(child, nn.BatchNorm2d):
                continue
            if not isinstance(child, StreamBatchNorm2d):
                norm = StreamBatchNorm2d(child.num_features, child.eps, child.momentum)
                norm._parameters, norm._buffers = child._parameters, child._buffers
                norm._modules, norm._forward_hooks = child._modules, child._forward_hooks
                norm.train(child.training)
                setattr(module, name, norm)
                child = norm
            if synchronised is not None:
                child.synchronised = synchronised


def can_split_statistics(network: nn.Module) -> bool:
    """Return whether `split_statistics` reaches every batch norm: there is none over other than maps."""
    return all(
        isinstance(module, StreamBatchNorm2d)
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    )


@contextmanager
def split_statistics(network: nn.Module, streams: int) -> Iterator[None]:
    """Tell every `StreamBatchNorm2d` of a network that batches of so many streams are coming."""
    norms = [module for module in network.modules() if isinstance(module, StreamBatchNorm2d)]
    for norm in norms:
        norm.streams = streams
    try:
        yield
    finally:
        for norm in norms:
            norm.streams = 1
