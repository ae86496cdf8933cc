"""Gaussians over features, and features drawn from them for the tail: without a single covariance matrix.

The Adaptive Feature Generator of "GLAG" (gradual balanced loss and adaptive feature generation), section 4.2:

    features ─ Tukey ─ fit ─────────── means μ_c; the class-sorted features X_c stand for Σ_c
                        │
                   find_support ────── per parent x̂: its nearest larger classes S, their weights ω
                        │
                   generate ────────── x ~ N( (1−β)·x̂ + β·Σ_S ω_j μ_j ,  (1−β)²·Σ_c + β²·Σ_S ω_j Σ_j + γ )
                        │
                   inverse Tukey ───── features for the classifier

A class's covariance is never formed: for ε ~ N(0, I) of length n_c, X_cᵀ(ε−ε̄)/√(n_c−1) has covariance Σ_c
exactly (the noise is centred, so the features need not be). Generation goes chunk by chunk, with one matrix
product per class that the chunk draws noise from. All mathematics is float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shards.errors import UserError

# λ=0 is the logarithm of feature + LOG_SHIFT: features after a ReLU hold exact zeros.
LOG_SHIFT = 1e-6
# Candidates per parent whose distances are computed exactly. The matrix product that finds them may run in
# reduced precision (TF32), which loses the exact nearest ones but keeps them among the first 16.
SHORTLIST = 16
# Parents per block of `find_support`, and noise values drawn at once: bounds on memory.
PARENTS_PER_BLOCK = 1024
NOISE_VALUES = 2**25


def tukey(features: Tensor, lam: float = 0.5) -> Tensor:
    """Tukey's ladder of powers, elementwise: x^λ; log(x + 1e-6) at λ=0; x itself, of any sign, at λ=1.

    Args:
        features: any shape, floating point, finite, >= 0 unless λ=1.
        lam: λ >= 0; below 1 it makes a right-skewed distribution more Gaussian.

    Returns:
        The same shape, float32.

    Raises:
        UserError: λ, or a feature, out of range.
    """
    _check_lambda(lam)
    features = features.float()
    if not torch.isfinite(features).all():
        raise UserError("features hold nan or inf; look for a diverged run or damaged features, make them again")
    if lam == 1:
        return features
    if (features < 0).any():
        raise UserError(
            f"features hold negative values (least: {features.min():.4g}), for which Tukey's λ={lam:g} is undefined;"
            " use features taken after a ReLU, or λ=1"
        )
    return torch.log(features + LOG_SHIFT) if lam == 0 else features**lam


def inverse_tukey(features: Tensor, lam: float = 0.5) -> Tensor:
    """Undo `tukey`. Unless λ=1 the result is clamped at 0: a Gaussian sample may leave the map's range."""
    _check_lambda(lam)
    if lam == 1:
        return features
    if lam == 0:
        return (features.exp() - LOG_SHIFT).clamp(min=0)
    return features.clamp(min=0) ** (1 / lam)


def _check_lambda(lam: float) -> None:
    if not (math.isfinite(lam) and lam >= 0):
        raise UserError(f"Tukey's λ must be finite and >= 0, got {lam}; 0.5 is the usual choice")


@dataclass(frozen=True)
class ClassGaussians:
    """One Gaussian per class, held as its samples.

    Attributes:
        features_ND: Tukey-transformed features, float32; the rows of class 0, then those of class 1, and so on.
        labels_N: int64, ascending.
        counts_C: n_c >= 1, int64.
        starts_C: int64; `features_ND[starts_C[c] : starts_C[c] + counts_C[c]]` is X_c.
        means_CD: μ_c, float32 (GLAG Eq. 5).
        lam: Tukey's λ.
    """

    features_ND: Tensor
    labels_N: Tensor
    counts_C: Tensor
    starts_C: Tensor
    means_CD: Tensor
    lam: float


def fit(features_ND: Tensor, labels_N: Tensor, num_classes: int, lam: float = 0.5) -> ClassGaussians:
    """Fit one Gaussian per class to Tukey-transformed features. Results stay on the features' device.

    Args:
        features_ND: features of the training set, floating point, finite, >= 0 unless λ=1.
        labels_N: int64 in [0, num_classes), on the same device.
        num_classes: C.
        lam: Tukey's λ >= 0.

    Raises:
        UserError: λ or a feature out of range (see `tukey`), or a class without features.
    """
    assert features_ND.ndim == 2, features_ND.shape
    assert labels_N.shape == features_ND.shape[:1], (labels_N.shape, features_ND.shape)
    counts_C = torch.bincount(labels_N, minlength=num_classes)
    assert len(counts_C) == num_classes, f"labels up to {len(counts_C) - 1} for {num_classes} classes"
    if empty := (counts_C == 0).nonzero().flatten().tolist():
        raise UserError(
            f"class {empty[0]} has no features ({len(empty)} such classes);"
            " every class needs a training image: build the dataset without the empty ones"
        )
    labels_N, order_N = torch.sort(labels_N, stable=True)
    features_ND = tukey(features_ND[order_N], lam)
    return ClassGaussians(
        features_ND=features_ND,
        labels_N=labels_N,
        counts_C=counts_C,
        starts_C=counts_C.cumsum(0) - counts_C,
        means_CD=torch.segment_reduce(features_ND, "mean", lengths=counts_C),
        lam=lam,
    )


@dataclass(frozen=True)
class Support:
    """The classes that each sample, as a parent, borrows from.

    Attributes:
        classes_NK: int64; meaningless where the weight is 0.
        weights_NK: ω_j / Σω, float32: rows sum to 1, or to 0 where a parent borrows nothing.
        head_C: bool; head classes borrow nothing and are sampled around their mean.
    """

    classes_NK: Tensor
    weights_NK: Tensor
    head_C: Tensor


def find_support(gaussians: ClassGaussians, k: int = 2, head_C: Tensor | None = None) -> Support:
    """Find each parent's nearest classes among those with strictly more samples (GLAG Eq. 7 and 10).

    ω_j = n_j / max(d_ij, 1e-3·mean‖μ‖) with d_ij = ‖x̂_i − μ_j‖; the floor, which the paper lacks, keeps a
    parent on top of a mean from taking all. It depends neither on β nor on the epoch: once per run is enough.

    Args:
        gaussians: from `fit`.
        k: K >= 1, classes to borrow from (the paper: 2 or 3); fewer where fewer are larger.
        head_C: bool, on the features' device: classes that borrow nothing; None: no class is head.

    Raises:
        UserError: K < 1.
    """
    if k < 1:
        raise UserError(f"K, the number of classes to borrow from, must be at least 1, got {k}; 2 is usual")
    features_ND, labels_N, counts_C, means_CD = (
        gaussians.features_ND,
        gaussians.labels_N,
        gaussians.counts_C,
        gaussians.means_CD,
    )
    if head_C is None:
        head_C = torch.zeros_like(counts_C, dtype=torch.bool)
    # With the largest class first, the candidates of every class are a prefix.
    sorted_C = torch.argsort(counts_C, descending=True, stable=True)
    larger_C = len(counts_C) - torch.searchsorted(counts_C.sort().values, counts_C, right=True)
    sorted_means_CD = means_CD[sorted_C]
    half_squares_C = sorted_means_CD.square().sum(1) / 2
    # The second floor is for collapsed features, all zero.
    floor = (1e-3 * means_CD.norm(dim=1).mean()).clamp(min=1e-12)

    classes_NK = torch.zeros(len(labels_N), k, dtype=torch.int64, device=labels_N.device)
    weights_NK = torch.zeros(len(labels_N), k, device=labels_N.device)
    available_N = torch.where(head_C, 0, larger_C)[labels_N]
    parents_P = available_N.nonzero().flatten()
    # Parents with like prefixes share a block.
    parents_P = parents_P[torch.argsort(available_N[parents_P], stable=True)]
    for start in range(0, len(parents_P), PARENTS_PER_BLOCK):
        parents_B = parents_P[start : start + PARENTS_PER_BLOCK]
        features_BD, available_B1 = features_ND[parents_B], available_N[parents_B, None]
        prefix = int(available_B1.max())
        closeness_BL = features_BD @ sorted_means_CD[:prefix].T - half_squares_C[:prefix]
        beyond_BL = torch.arange(prefix, device=labels_N.device) >= available_B1
        shortlist_BS = closeness_BL.masked_fill(beyond_BL, -torch.inf).topk(min(prefix, max(k, SHORTLIST))).indices
        distances_BS = (features_BD[:, None] - sorted_means_CD[shortlist_BS]).norm(dim=2)
        distances_BS.masked_fill_(shortlist_BS >= available_B1, torch.inf)
        distances_BK, nearest_BK = distances_BS.topk(min(k, prefix), largest=False)
        found_BK = sorted_C[shortlist_BS.gather(1, nearest_BK)]
        omega_BK = counts_C[found_BK] / distances_BK.clamp(min=floor)
        classes_NK[parents_B, : found_BK.shape[1]] = found_BK
        weights_NK[parents_B, : found_BK.shape[1]] = omega_BK / omega_BK.sum(1, keepdim=True)
    return Support(classes_NK, weights_NK, head_C)


def generate(
    gaussians: ClassGaussians,
    support: Support,
    targets_C: Tensor,
    beta: float | Tensor,
    generator: torch.Generator,
    *,
    gamma: float = 0.0,
    gamma_kind: Literal["isotropic", "ones"] = "isotropic",
    space: Literal["feature", "tukey"] = "feature",
    chunk: int = 65536,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate features, shuffled over classes, in chunks (GLAG Eq. 8 and 9).

    A class's samples come from its parents in turn, from a random first one on. Head classes are sampled from
    their own N(μ_c, Σ_c). A parent with no larger class borrows nothing, as if β were 0.

    Args:
        gaussians: from `fit`.
        support: from `find_support` on the same gaussians.
        targets_C: int64 >= 0, how many features to generate per class.
        beta: β in [0, 1], the trust in borrowed knowledge; one for all, or shape (C,).
        generator: on any device; the same state gives the same features.
        gamma: γ >= 0, added to the covariance.
        gamma_kind: "isotropic" adds γ·I, "ones" adds γ to every entry (one shift for all dimensions).
        space: "feature" undoes Tukey's transformation, "tukey" leaves the samples in it.
        chunk: M, rows per chunk; each takes about 4·M·D bytes a few times over.

    Yields:
        features_MD, float32, and labels_M, int64; the last chunk may be shorter.

    Raises:
        UserError: β or γ out of range, or an unknown `gamma_kind` or `space`; before the first chunk.
    """
    counts_C = gaussians.counts_C
    beta_C = torch.as_tensor(beta, dtype=torch.float32, device=counts_C.device).broadcast_to(counts_C.shape)
    outside = beta_C[~((beta_C >= 0) & (beta_C <= 1))]
    if len(outside):
        raise UserError(f"β must lie in [0, 1], got {outside[0].item():g}; 0 borrows nothing, 1 everything")
    if not (math.isfinite(gamma) and gamma >= 0):
        raise UserError(f"γ must be finite and >= 0, got {gamma}; 0 adds no spread")
    if gamma_kind not in ("isotropic", "ones"):
        raise UserError(f"gamma_kind {gamma_kind!r} is unknown; choose isotropic or ones")
    if space not in ("feature", "tukey"):
        raise UserError(f"space {space!r} is unknown; choose feature or tukey")
    assert chunk >= 1, chunk
    assert targets_C.shape == counts_C.shape, targets_C
    assert (targets_C >= 0).all(), targets_C

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        parents_T = _parents(gaussians, targets_C, generator)
        for start in range(0, len(parents_T), chunk):
            parents_M = parents_T[start : start + chunk]
            samples_MD = _sample(gaussians, support, parents_M, beta_C, generator)
            if gamma:
                columns = 1 if gamma_kind == "ones" else samples_MD.shape[1]
                samples_MD += gamma**0.5 * _noise(len(parents_M), columns, generator, samples_MD.device)
            if space == "feature":
                samples_MD = inverse_tukey(samples_MD, gaussians.lam)
            yield samples_MD, gaussians.labels_N[parents_M]

    # Not a generator function itself: mistakes are told here, not at the first chunk.
    return chunks()


def _parents(gaussians: ClassGaussians, targets_C: Tensor, generator: torch.Generator) -> Tensor:
    """Return the parent (a row of the features) of every sample to generate, shuffled, shape (ΣT,)."""
    counts_C, device = gaussians.counts_C, gaussians.counts_C.device
    targets_C = targets_C.to(device)
    first_C = torch.rand(len(counts_C), generator=generator, device=generator.device).to(device) * counts_C
    classes_T = torch.repeat_interleave(targets_C)
    turn_T = torch.arange(len(classes_T), device=device) - (targets_C.cumsum(0) - targets_C)[classes_T]
    parents_T = gaussians.starts_C[classes_T] + (turn_T + first_C.long()[classes_T]) % counts_C[classes_T]
    return parents_T[torch.randperm(len(parents_T), generator=generator, device=generator.device).to(device)]


def _sample(
    gaussians: ClassGaussians, support: Support, parents_M: Tensor, beta_C: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw one sample per parent in Tukey space, without γ, shape (M, D)."""
    labels_M = gaussians.labels_N[parents_M]
    classes_MK, weights_MK = support.classes_NK[parents_M], support.weights_NK[parents_M]
    beta_M1 = torch.where(weights_MK.any(1), beta_C[labels_M], 0)[:, None]

    head_M1 = support.head_C[labels_M, None]
    samples_MD = torch.where(head_M1, gaussians.means_CD[labels_M], gaussians.features_ND[parents_M])
    samples_MD *= 1 - beta_M1
    for classes_M, weights_M1 in zip(classes_MK.unbind(1), weights_MK.split(1, dim=1), strict=True):
        samples_MD.addcmul_(beta_M1 * weights_M1, gaussians.means_CD[classes_M])

    # Every sample draws noise from its own class and its support: (sample, class, scale) triples.
    scales_MJ = torch.cat([1 - beta_M1, beta_M1 * weights_MK.sqrt()], dim=1)
    classes_MJ = torch.cat([labels_M[:, None], classes_MK], dim=1)
    # A single sample has no covariance.
    rows_P, columns_P = ((scales_MJ > 0) & (gaussians.counts_C[classes_MJ] > 1)).nonzero(as_tuple=True)
    classes_P, order_P = torch.sort(classes_MJ[rows_P, columns_P], stable=True)
    rows_P, scales_P = rows_P[order_P], scales_MJ[rows_P, columns_P][order_P]

    present, lengths = torch.unique_consecutive(classes_P, return_counts=True)
    counts, starts = gaussians.counts_C[present].tolist(), gaussians.starts_C[present].tolist()
    of_class = (rows_P.split(lengths.tolist()), scales_P.split(lengths.tolist()))
    for count, start, rows_Q, scales_Q in zip(counts, starts, *of_class, strict=True):
        features_cD = gaussians.features_ND[start : start + count]
        block = max(1, NOISE_VALUES // count)
        for rows_B, scales_B in zip(rows_Q.split(block), scales_Q.split(block), strict=True):
            offsets_BD = _offsets(_noise(len(rows_B), count, generator, rows_B.device), features_cD)
            # A row occurs once per class, so that this addition has one order on every device.
            samples_MD.index_add_(0, rows_B, offsets_BD * scales_B[:, None])
    return samples_MD


def _offsets(noise_Bn: Tensor, features_nD: Tensor) -> Tensor:
    """Map white noise to deviations from the class's mean: (ε−ε̄)·X/√(n−1), covariance Σ (GLAG Eq. 6)."""
    noise_Bn = noise_Bn - noise_Bn.mean(1, keepdim=True)
    return noise_Bn @ features_nD / (len(features_nD) - 1) ** 0.5


def _noise(rows: int, columns: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=generator, device=generator.device).to(device)
