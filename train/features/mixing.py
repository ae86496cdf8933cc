"""Epochs of features for a classifier: real ones and generated ones mixed, or real ones alone, balanced or not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from train.features.gaussians import ClassGaussians, Support, inverse_tukey_
from train.features.generation import check_memory, generate_chunks, generate_parts, take_turns

Batches = Iterator[tuple[Tensor, Tensor]]
Sampling = Literal["each-once", "oversampled"]


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
        views: how many of an image's features there are.
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
    views: int = 1

    def share(self, rows_T: Tensor) -> Tensor:
        """Return this rank's part of rows that all ranks drew alike; up to world_size − 1 are left out."""
        mine = rows_T[self.rank :: self.world_size][: len(rows_T) // self.world_size]
        return mine.to(self.features_ND.device)

    @property
    def train_counts(self) -> Tensor:
        """Training images per class, of which features are views; not all of them may have decoded."""
        return -(-self.gaussians.counts_C // self.views)

    def real(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return real features, float32, and their labels."""
        return self.features_ND[rows_B].float(), self.labels_N[rows_B]

    def workspace(self, betas: int) -> Tensor:
        """Return memory for one chunk, of one β or of the two parts that several need; see `generate_chunks`."""
        share = int(self.targets_C.sum()) // self.world_size
        rows = min(self.chunk, share) if betas == 1 else 2 * min(max(1, self.chunk // 2), share)
        check_memory(rows, self.gaussians.features_ND)
        return self.gaussians.features_ND.new_empty(rows, self.features_ND.shape[1])

    def generated(self, beta: float | Tensor, generator: torch.Generator, memory: Tensor | None = None) -> Batches:
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
            memory=memory,
        )

    def parts(self, generator: torch.Generator, memory: Tensor | None = None) -> Iterator[tuple[Tensor, ...]]:
        """Return the same for any number of β; see `generate_parts`."""
        return generate_parts(
            self.gaussians,
            self.support,
            self.targets_C,
            generator,
            gamma=self.gamma,
            chunk=self.chunk,
            rank=self.rank,
            world_size=self.world_size,
            memory=memory,
        )

    @property
    def unit(self) -> float:
        """The root mean square length of the real features: what a rate is measured by."""
        rows = torch.arange(len(self.labels_N), device=self.labels_N.device)
        squares = sum(self.real(rows_B)[0].square().sum().item() for rows_B in rows.split(16384))
        return max(1e-6, float(squares / len(rows)) ** 0.5)


def mixed_epoch(
    mixture: Mixture,
    betas: Sequence[float | Tensor],
    batch_size: int,
    generator: torch.Generator,
    memory: Tensor | None = None,
) -> Iterator[tuple[Iterator[Tensor], Tensor]]:
    """Yield one epoch's batches: every real feature once, and new generated ones, shuffled together.

    Generated features live for one chunk: each chunk meets an equal part of the real ones, and both are dealt out
    into batches of at most `batch_size` and nearly equal sizes. Several β share all that is drawn.

    Args:
        mixture: the real features and the generator.
        betas: each β a number, or one per class (C,).
        batch_size: features per batch on this rank.
        generator: in the same state on every rank; afterwards again.
        memory: from `Mixture.workspace`, to be used again in every epoch: fresh pages take long.

    Yields:
        An iterator over the batch's features_BD, float32, at each β: the memory is used again for every next one. And
        labels_B, int64.
    """
    share, several = int(mixture.targets_C.sum()) // mixture.world_size, len(betas) > 1
    made: Iterator[tuple[Tensor, ...]] = (
        mixture.parts(generator, memory) if several else mixture.generated(betas[0], generator, memory)
    )
    mine_N = mixture.share(torch.randperm(len(mixture.labels_N), generator=generator))
    nothing = (mixture.labels_N[:0],)
    rows = max(1, mixture.chunk // 2) if several else mixture.chunk
    most = min(batch_size, min(rows, share) + len(mine_N))
    space_BD = mixture.gaussians.features_ND.new_empty(most, mixture.features_ND.shape[1])
    for mine_R in mine_N.tensor_split(max(1, -(-share // rows))):
        *parts, labels_M = next(made, nothing)
        done = 0
        for rows_B in _batches(len(labels_M) + len(mine_R), batch_size, generator, mine_R.device):
            old_B = rows_B[rows_B >= len(labels_M)] - len(labels_M)
            # Generated rows come shuffled: the next so many are as good as any, and need not be gathered.
            next_rows = slice(done, done := done + len(rows_B) - len(old_B))
            real_BD, real_labels_B = mixture.real(mine_R[old_B])
            labels_B = labels_M[next_rows]
            yield (
                _views(mixture, betas, [part[next_rows] for part in parts], labels_B, real_BD, space_BD),
                torch.cat([labels_B, real_labels_B]),
            )
        del parts  # before the next chunk is made


def _views(
    mixture: Mixture,
    betas: Sequence[float | Tensor],
    parts: list[Tensor],
    labels_B: Tensor,
    real_BD: Tensor,
    space_BD: Tensor,
) -> Iterator[Tensor]:
    """Yield generated and then real features, at each β, in the same memory."""
    batch_BD = space_BD[: len(labels_B) + len(real_BD)]
    new_BD = batch_BD[: len(labels_B)]
    batch_BD[len(labels_B) :] = real_BD
    for beta in betas:
        if len(parts) == 2:
            own_BD, lent_BD = parts
            if isinstance(beta, Tensor):
                torch.lerp(own_BD, lent_BD, beta[labels_B, None], out=new_BD)
            else:
                torch.lerp(own_BD, lent_BD, beta, out=new_BD)
            inverse_tukey_(new_BD, mixture.gaussians.lam)
        elif parts:
            new_BD.copy_(parts[0])
        yield batch_BD


def real_epoch(mixture: Mixture, sampling: Sampling, batch_size: int, generator: torch.Generator) -> Batches:
    """Yield one epoch's batches of real features alone.

    Args:
        mixture: the real features; nothing is generated.
        sampling: "each-once"; or "oversampled", every class n_max times, its features in turn, which is what the
            class-aware sampler of Kang et al. (ICLR 2020) draws in an epoch.
        batch_size: features per batch on this rank.
        generator: in the same state on every rank; afterwards again.

    Yields:
        features_BD, float32, and labels_B, int64.
    """
    gaussians = mixture.gaussians
    number = len(mixture.labels_N)
    if sampling == "each-once":
        rows_T = torch.arange(number)
    else:
        rows_T = take_turns(gaussians, gaussians.counts_C.max().expand_as(gaussians.counts_C), generator).cpu()
    mine_T = mixture.share(rows_T[torch.randperm(len(rows_T), generator=generator)])
    for rows_B in _batches(len(mine_T), batch_size, generator, mine_T.device):
        yield mixture.real(mine_T[rows_B])


def _batches(number: int, batch_size: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
    """Deal out `number` rows, shuffled, into batches of nearly equal sizes; none where there are no rows."""
    order = torch.randperm(number, generator=generator).to(device)
    return order.tensor_split(-(-number // batch_size)) if number else ()
