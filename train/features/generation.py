"""Features drawn from calibrated Gaussians, exactly and without a covariance: every sample is a sum of real features.

The second half of the Adaptive Feature Generator of "GLAG", section 4.2, after `train.features.gaussians`. A parent x̂
of class c with its support S and weights ω (summing to 1) gives (Eq. 8 and 9)

    x ~ N( (1−β)·x̂ + β·Σ_S ω_j μ_j ,  (1−β)²·Σ_c + β²·Σ_S ω_j Σ_j + γ )

For ε ~ N(0, I) of length n_j, X_jᵀ(ε−ε̄)/√(n_j−1) has covariance Σ_j exactly (the noise is centred, so the features need
not be), and μ_j = X_jᵀ1/n_j. So a sample is a weighted sum of the features of 1 + K classes, and a chunk of samples is
one matrix product per class:

    weights (samples that use class j, n_j)  @  X_j (n_j, D)   ──> added to the rows of those samples

Where n_j > D, noise of length D meets the factor R_j instead. All mathematics is float32.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.budget import free_memory
from shards.errors import UserError
from shards.groups import MANY_ABOVE
from train.features.gaussians import ClassGaussians, Support, find_support, fit, head_classes, inverse_tukey_

# Numbers in one block of weights and of products: bounds on memory.
BLOCK_VALUES = 2**24


def generate_chunks(
    gaussians: ClassGaussians,
    support: Support,
    targets_C: Tensor,
    beta: float | Tensor,
    generator: torch.Generator,
    *,
    gamma: float = 0.0,
    chunk: int = 65536,
    rank: int = 0,
    world_size: int = 1,
    memory: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate features, shuffled over classes, in chunks; nothing is kept (GLAG Eq. 8 and 9).

    A class's samples come from its parents in turn, from a random first one on. Head classes are sampled from
    their own N(μ_c, Σ_c). A parent with no larger class borrows nothing, as if β were 0.

    Ranks share the samples: rank r takes every `world_size`-th of the same shuffled list, so that all have equally
    many (up to world_size − 1 samples of the list are left out), and draws noise of its own. A generator in the same
    state on every rank is in one same state again afterwards.

    Args:
        gaussians: from `fit`.
        support: from `find_support` on the same gaussians.
        targets_C: int64 >= 0, how many features to generate per class, over all ranks.
        beta: β in [0, 1], the trust in borrowed knowledge; one for all, or shape (C,).
        generator: on any device; the same state and world size give the same features on the same kind of device.
        gamma: γ >= 0; γ·I is added to the covariance.
        chunk: M >= 1, rows per chunk; each takes 4·M·D bytes, and a new one is made beside one still held. The larger,
            the more samples share a product: thousands of classes want tens of thousands of rows.
        rank: this process's number.
        world_size: how many processes share the samples.
        memory: (M, D), float32, in which every chunk lies, so that the one before it is lost; None: new for each.

    Yields:
        features_MD, float32, and labels_M, int64; the last chunk may be shorter.

    Raises:
        UserError: β, γ or `chunk` out of range, or too little memory for a chunk; before the first chunk.
    """
    counts_C = gaussians.counts_C
    beta_C = torch.as_tensor(beta, dtype=torch.float32, device=counts_C.device).broadcast_to(counts_C.shape)
    outside = beta_C[~((beta_C >= 0) & (beta_C <= 1))]
    if len(outside):
        raise UserError(f"β must lie in [0, 1], got {outside[0].item():g}; 0 borrows nothing, 1 everything")
    if not (math.isfinite(gamma) and gamma >= 0):
        raise UserError(f"γ must be finite and >= 0, got {gamma}; 0 adds no spread")
    if chunk < 1:
        raise UserError(f"a chunk must have at least 1 row, got {chunk}; 65536 is usual")
    assert 0 <= rank < world_size, (rank, world_size)
    assert targets_C.shape == counts_C.shape, targets_C
    assert (targets_C >= 0).all(), targets_C
    if memory is None:
        check_memory(min(chunk, int(targets_C.sum()) // world_size), gaussians.features_ND)

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for parents_M, noise in _parents(gaussians, targets_C, generator, chunk, rank, world_size):
            place = None if memory is None else memory[: len(parents_M)]
            samples_MD = _sample(gaussians, support, parents_M, beta_C, noise, place)
            _add_noise(samples_MD, gamma, noise)
            inverse_tukey_(samples_MD, gaussians.lam)
            yield samples_MD, gaussians.labels_N[parents_M]
            del samples_MD  # before the next one is made

    # Not a generator function itself: mistakes are reported here, not at the first chunk.
    return chunks()


def generate_parts(
    gaussians: ClassGaussians,
    support: Support,
    targets_C: Tensor,
    generator: torch.Generator,
    *,
    gamma: float = 0.0,
    chunk: int = 65536,
    rank: int = 0,
    world_size: int = 1,
    memory: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Generate as `generate_chunks` does, from the same parents, but for any number of β at once.

    The sample at β is inverse_tukey((1−β)·own + β·lent): one noise serves every β, which are compared by pairs.

    Args: as those of `generate_chunks`; memory has room for both parts.

    Yields:
        own_MD and lent_MD (what is borrowed; the own part again in rows that borrow nothing), float32, in Tukey space,
        γ's noise in both; and labels_M, int64. A chunk has half as many rows, for two parts; the next one takes
        the same memory.
    """
    rows = max(1, chunk // 2)
    if memory is None:
        check_memory(2 * min(rows, int(targets_C.sum()) // world_size), gaussians.features_ND)
    for parents_M, noise in _parents(gaussians, targets_C, generator, rows, rank, world_size):
        if memory is None:  # the first chunk is the largest
            memory = gaussians.features_ND.new_empty(2 * len(parents_M), gaussians.features_ND.shape[1])
        parts_PD = _sample(gaussians, support, parents_M, None, noise, memory[: 2 * len(parents_M)])
        own_MD, lent_MD = parts_PD.chunk(2)
        alone_R = (~support.weights_NK[parents_M].any(1)).nonzero().flatten()
        lent_MD[alone_R] = own_MD[alone_R]
        if gamma:
            added_MD = _noise(len(parents_M), own_MD.shape[1], noise).mul_(gamma**0.5)
            own_MD += added_MD
            lent_MD += added_MD
            del added_MD
        yield own_MD, lent_MD, gaussians.labels_N[parents_M]


def _parents(
    gaussians: ClassGaussians, targets_C: Tensor, generator: torch.Generator, chunk: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, torch.Generator]]:
    """Yield each chunk's parents, and the generator of this rank's noise."""
    parents_T = _shuffled(take_turns(gaussians, targets_C, generator), generator)
    share = len(parents_T) // world_size
    seeds = torch.randint(2**62, (world_size,), generator=generator, device=generator.device)
    noise = torch.Generator(parents_T.device).manual_seed(int(seeds[rank]))
    for parents_M in parents_T[rank::world_size][:share].split(chunk) if share else ():
        yield parents_M, noise


def _add_noise(samples_MD: Tensor, gamma: float, generator: torch.Generator) -> None:
    """Add √γ·ε in place."""
    if gamma:
        samples_MD += _noise(len(samples_MD), samples_MD.shape[1], generator).mul_(gamma**0.5)


def check_memory(rows: int, features_ND: Tensor) -> None:
    """Refuse a chunk that would not fit, and a block of work beside it."""
    values = rows * features_ND.shape[1]
    needed, free = 4 * (values + 2 * min(BLOCK_VALUES, values)), _free_memory(features_ND.device)
    if needed > free:
        raise UserError(
            f"a chunk of {rows:,} features of {features_ND.shape[1]:,} dimensions needs {needed / 1e9:.1f} GB of"
            f" memory, and {free / 1e9:.1f} GB are free; lower method.chunk"
        )


def _free_memory(device: torch.device) -> int:
    """Return what this process may use of a device's free bytes, with those that torch keeps for itself on a GPU."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free_memory(device) + kept
    return free_memory(device) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this machine, all at once


def take_turns(gaussians: ClassGaussians, numbers_C: Tensor, generator: torch.Generator) -> Tensor:
    """Return so many rows of the features per class, in turn from a random first one on, shape (Σ numbers,)."""
    counts_C, device = gaussians.counts_C, gaussians.counts_C.device
    numbers_C = numbers_C.to(device)
    first_C = torch.rand(len(counts_C), generator=generator, device=generator.device).to(device) * counts_C
    classes_T = torch.repeat_interleave(numbers_C)
    turn_T = torch.arange(len(classes_T), device=device) - (numbers_C.cumsum(0) - numbers_C)[classes_T]
    return gaussians.starts_C[classes_T] + (turn_T + first_C.long()[classes_T]) % counts_C[classes_T]


def _shuffled(rows_T: Tensor, generator: torch.Generator) -> Tensor:
    return rows_T[torch.randperm(len(rows_T), generator=generator, device=generator.device).to(rows_T.device)]


def _sample(
    gaussians: ClassGaussians,
    support: Support,
    parents_M: Tensor,
    beta_C: Tensor | None,
    generator: torch.Generator,
    memory: Tensor | None = None,
) -> Tensor:
    """Draw one sample per parent in Tukey space, without γ, shape (M, D); without β two parts, into `memory` (2·M, D).

    A sample is (1−β)·own + β·borrowed, so that the parts, the own ones before the borrowed ones, serve any β.
    """
    labels_M, weights_MK = gaussians.labels_N[parents_M], support.weights_NK[parents_M]
    head_M1 = support.head_C[labels_M, None]
    number = len(parents_M)
    if beta_C is None:
        own_M1, borrowed_M1 = torch.ones_like(weights_MK[:, :1]), torch.ones_like(weights_MK[:, :1])
    else:
        borrowed_M1 = torch.where(weights_MK.any(1), beta_C[labels_M], 0)[:, None]
        own_M1 = 1 - borrowed_M1

    # The parent itself; head classes are sampled around their mean.
    if memory is None:
        memory = gaussians.features_ND.new_empty(number, gaussians.features_ND.shape[1])
    samples_MD = memory
    torch.index_select(gaussians.features_ND, 0, parents_M, out=samples_MD[:number])
    samples_MD[:number] *= torch.where(head_M1, 0, own_M1)
    samples_MD[number:] = 0

    # Then noise and mean of its own class (J=0) and of its support.
    classes_MJ = torch.cat([labels_M[:, None], support.classes_NK[parents_M]], dim=1)
    spread_MJ = torch.cat([own_M1, borrowed_M1 * weights_MK.sqrt()], dim=1)
    mean_MJ = torch.cat([head_M1.float(), borrowed_M1 * weights_MK], dim=1)
    rows_P, columns_P = (spread_MJ > 0).nonzero(as_tuple=True)
    classes_P, order_P = torch.sort(classes_MJ[rows_P, columns_P], stable=True)
    rows_P, columns_P = rows_P[order_P], columns_P[order_P]
    # Divided here and not per class: with thousands of classes such small steps take as long as the products.
    counts_P = gaussians.counts_C[classes_P]
    spread_P = spread_MJ[rows_P, columns_P] * gaussians.noise_scales_C[classes_P]
    mean_P = mean_MJ[rows_P, columns_P] / counts_P
    if beta_C is None:
        rows_P = rows_P + number * (columns_P > 0)
    present, lengths = torch.unique_consecutive(classes_P, return_counts=True)
    parts = [part_P.split(lengths.tolist()) for part_P in (rows_P, spread_P[:, None], mean_P[:, None])]
    for c, *of_class in zip(present.tolist(), *parts, strict=True):
        length = noise_length(gaussians, c)
        block = max(1, BLOCK_VALUES // max(length, samples_MD.shape[1]))
        for rows_B, spread_B1, mean_B1 in zip(*(part.split(block) for part in of_class), strict=True):
            noise_Bn = _noise(len(rows_B), length, generator)
            # A row occurs once per class, so that this addition has one order on every device.
            samples_MD.index_add_(0, rows_B, combine(gaussians, c, noise_Bn, spread_B1, mean_B1))
    return samples_MD


def noise_length(gaussians: ClassGaussians, c: int) -> int:
    """Return how much white noise a sample of class c needs: n_c, or D where that is less."""
    count, dimensions = gaussians.by_class[c].shape
    return dimensions if c in gaussians.factors else count


def combine(gaussians: ClassGaussians, c: int, noise_Bn: Tensor, spread_B1: Tensor, mean_B1: Tensor) -> Tensor:
    """Return spread·L_cᵀε + mean·μ_c for each row, shape (B, D), where L_c L_cᵀ = Σ_c (GLAG Eq. 6).

    Args:
        gaussians: from `fit`.
        c: a class. One with a single sample has no covariance: its noise has no effect.
        noise_Bn: ε, white noise of `noise_length(gaussians, c)`, float32; it is overwritten.
        spread_B1: factors of the noise times `gaussians.noise_scales_C[c]`, float32.
        mean_B1: factors of the class's mean, divided by n_c, float32.
    """
    noise_Bn *= spread_B1
    if c in gaussians.factors:
        offsets_BD = (mean_B1 * len(gaussians.by_class[c])) * gaussians.means_CD[c]
        return offsets_BD.addmm_(noise_Bn, gaussians.factors[c])
    noise_Bn += mean_B1 - noise_Bn.mean(1, keepdim=True)
    return noise_Bn @ gaussians.by_class[c]


def _noise(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, device=generator.device)


def generate(
    features_ND: NDArray[Any] | Tensor,
    labels_N: NDArray[Any] | Tensor,
    *,
    targets_C: NDArray[Any] | Tensor | None = None,
    beta: float = 0.4,
    k: int = 2,
    lam: float = 0.5,
    gamma: float = 0.0,
    head_above: int = MANY_ABOVE,
    seed: int = 0,
) -> tuple[NDArray[Any], NDArray[Any]] | tuple[Tensor, Tensor]:
    """Generate features for the tail from plain arrays: no run, no trainer.

        features_MD, labels_M = generate(features_ND, labels_N)     # then train on both together

    Args:
        features_ND: shape (N, D), floating point, finite, >= 0 unless λ=1: what a network makes of the training
            images, say after its last ReLU and pooling. A NumPy array, or a tensor on any device.
        labels_N: shape (N,), integers in [0, C); every class occurs.
        targets_C: shape (C,), integers >= 0: how many to generate per class; None: n_max − n_c, which balances them.
        beta: β in [0, 1], the trust in what larger classes lend; 0 keeps to a class's own Gaussian.
        k: K >= 1, the larger classes that a feature borrows from.
        lam: Tukey's λ >= 0; 0 is the logarithm.
        gamma: γ >= 0; γ·I is added to the covariance.
        head_above: classes with more samples are head and borrow nothing.
        seed: the same seed gives the same features.

    Returns:
        features_MD, float32, and labels_M, int64, M = Σ targets, shuffled; of the kind that `features_ND` is. All in
        memory at once: `generate_chunks` streams.

    Raises:
        UserError: shapes that do not fit each other, labels out of range, or as `fit`, `find_support` and
            `generate_chunks` do.
    """
    features, labels = torch.as_tensor(features_ND).detach(), torch.as_tensor(labels_N)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise UserError(
            f"features must have shape (N, D) and labels (N,), got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    whole = not labels.is_floating_point()
    labels = labels.to(features.device, torch.int64) if whole else labels  # torch has no minimum of unsigned ones
    if not len(labels) or not whole or labels.min() < 0:
        least = labels.min().item() if len(labels) else "none"
        raise UserError(f"labels must be integers from 0 on, at least one, got {labels.dtype} with least {least}")
    gaussians = fit(features, labels, int(labels.max()) + 1, lam)
    counts_C = gaussians.counts_C
    targets = counts_C.max() - counts_C if targets_C is None else torch.as_tensor(targets_C)
    targets = targets if targets.is_floating_point() else targets.to(counts_C.device, torch.int64)
    if targets.shape != counts_C.shape or targets.is_floating_point() or (targets < 0).any():
        raise UserError(f"targets must be {len(counts_C)} integers >= 0, one per class, got {targets.tolist()}")
    support = find_support(gaussians, k, head_classes(counts_C, head_above))
    generator = torch.Generator().manual_seed(seed)
    empty = (features.new_empty(0, features.shape[1], dtype=torch.float32), labels[:0])
    chunks = [empty, *generate_chunks(gaussians, support, targets, beta, generator, gamma=gamma)]
    features_MD, labels_M = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return (features_MD, labels_M) if isinstance(features_ND, Tensor) else (features_MD.numpy(), labels_M.numpy())
