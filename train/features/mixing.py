"""Epochs of features for a classifier: real ones and generated ones mixed, or real ones alone, balanced or not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from train.features.gaussians import ClassGaussians, Support
from train.features.generation import generate_chunks, take_turns

Batches = Iterator[tuple[Tensor, Tensor]]
Sampling = Literal["each-once", "oversampled", "class-balanced"]


@dataclass(frozen=True)
class Mixture:
    """What classifiers are trained on, and how it is generated and shared.

    Attributes:
        features_ND, labels_N: the real features, of any floating dtype, sorted by class, and their classes.
        gaussians: the classes' Gaussians in Tukey space.
        support: what each feature borrows from.
        targets_C: features to generate per class and epoch, n_max − n_c.
        gamma, chunk: see `generate_chunks`.
        rank, world_size: each rank sees its own share of every epoch, all of the same size.
    """

    features_ND: Tensor
    labels_N: Tensor
    gaussians: ClassGaussians
    support: Support
    targets_C: Tensor
    gamma: float = 0.0
    chunk: int = 65536
    rank: int = 0
    world_size: int = 1

    def share(self, rows_T: Tensor) -> Tensor:
        """Return this rank's part of rows that all ranks drew alike; up to world_size − 1 are left out."""
        mine = rows_T[self.rank :: self.world_size][: len(rows_T) // self.world_size]
        return mine.to(self.features_ND.device)

    def real(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return real features, float32, and their labels."""
        return self.features_ND[rows_B].float(), self.labels_N[rows_B]

    def generated(self, beta: float | Tensor, generator: torch.Generator) -> Batches:
        """Return this rank's chunks of an epoch's generated features; see `generate_chunks`."""
        return generate_chunks(
            self.gaussians,
            self.support,
            self.targets_C,
            beta,
            generator,
            gamma=self.gamma,
            chunk=self.chunk,
            rank=self.rank,
            world_size=self.world_size,
        )


def mixed_epoch(mixture: Mixture, beta: float | Tensor, batch_size: int, generator: torch.Generator) -> Batches:
    """Yield one epoch's batches: every real feature once, and new generated ones, shuffled together.

    Generated features live for one chunk: each chunk meets an equal part of the real ones, and both are dealt out
    into batches of at most `batch_size` and nearly equal sizes.

    Args:
        mixture: the real features and the generator.
        beta: β, see `generate_chunks`.
        batch_size: features per batch on this rank.
        generator: in the same state on every rank; afterwards again.

    Yields:
        features_BD, float32, and labels_B, int64.
    """
    generated = mixture.generated(beta, generator)
    mine_N = mixture.share(torch.randperm(len(mixture.labels_N), generator=generator))
    chunks = max(1, -(-(int(mixture.targets_C.sum()) // mixture.world_size) // mixture.chunk))
    nothing = (mixture.gaussians.features_ND[:0], mixture.labels_N[:0])
    for mine_R in mine_N.tensor_split(chunks):
        features_MD, labels_M = next(generated, nothing)
        for rows_B in _batches(len(labels_M) + len(mine_R), batch_size, generator, mine_R.device):
            new_B, old_B = rows_B[rows_B < len(labels_M)], rows_B[rows_B >= len(labels_M)] - len(labels_M)
            real_BD, real_labels_B = mixture.real(mine_R[old_B])
            yield torch.cat([features_MD[new_B], real_BD]), torch.cat([labels_M[new_B], real_labels_B])
        del features_MD  # before the next chunk is made


def real_epoch(mixture: Mixture, sampling: Sampling, batch_size: int, generator: torch.Generator) -> Batches:
    """Yield one epoch's batches of real features alone.

    Args:
        mixture: the real features; nothing is generated.
        sampling: "each-once"; "oversampled", every class n_max times, its features in turn; or "class-balanced", as
            many as there are, drawn from the classes with equal probability (Kang et al., ICLR 2020, Eq. 1 with q=0).
        batch_size: features per batch on this rank.
        generator: in the same state on every rank; afterwards again.

    Yields:
        features_BD, float32, and labels_B, int64.
    """
    gaussians = mixture.gaussians
    number = len(mixture.labels_N)
    if sampling == "each-once":
        rows_T = torch.arange(number)
    elif sampling == "oversampled":
        rows_T = take_turns(gaussians, gaussians.counts_C.max().expand_as(gaussians.counts_C), generator).cpu()
    else:
        counts_C, starts_C = gaussians.counts_C.cpu(), gaussians.starts_C.cpu()
        classes_T = torch.randint(len(counts_C), (number,), generator=generator)
        within_T = torch.rand(number, generator=generator, dtype=torch.float64) * counts_C[classes_T]
        rows_T = starts_C[classes_T] + within_T.long()
    mine_T = mixture.share(rows_T[torch.randperm(len(rows_T), generator=generator)])
    for rows_B in _batches(len(mine_T), batch_size, generator, mine_T.device):
        yield mixture.real(mine_T[rows_B])


def _batches(number: int, batch_size: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
    """Deal out `number` rows, shuffled, into batches of nearly equal sizes; none where there are no rows."""
    order = torch.randperm(number, generator=generator).to(device)
    return order.tensor_split(-(-number // batch_size)) if number else ()
