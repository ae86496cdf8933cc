"""Gaussians over features, one per class, without a single covariance matrix; and what each feature may borrow.

The first half of the Adaptive Feature Generator of "GLAG" (gradual balanced loss and adaptive feature generation),
section 4.2; `train.features.generation` is the second:

    features ─ Tukey ─ fit ─────────── means μ_c; the class-sorted features X_c stand for Σ_c
                        │
                   find_support ────── per parent x̂: its nearest larger classes S, their weights ω

Tukey's transform is for features that are never negative: those that a ReLU leaves, whose long tail to the right x^λ
with λ < 1 shortens. Features that a layer norm leaves have both signs and lie about evenly around 0, and there is no
such tail to shorten. The power that keeps signs, y = sign(x)·|x|^λ, would make them less Gaussian: with a density p
of x, that of y is

    f(y) = 1/λ · |y|^(1/λ − 1) · p(sign(y)·|y|^(1/λ))

which for every λ < 1 is 0 at y = 0, where p is largest: two humps in the place of one. So features with negative values
are taken as they are, λ = 1 (`fitting_lambda`), and what is generated from them is not clamped at 0.

A class with more samples than dimensions is held by a factor too: R with RᵀR = Σ_c, from a QR decomposition of its
centred features, so that no class needs more than D numbers of noise per sample.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from shards.errors import UserError

# λ=0 is the logarithm of feature + LOG_SHIFT: features after a ReLU hold exact zeros.
LOG_SHIFT = 1e-6
# Candidates per parent whose distances are computed exactly. The matrix product that finds them may run in
# reduced precision (TF32), which loses the exact nearest ones but keeps them among the first 16.
SHORTLIST = 16
# Features per block of `fit`, and parents per block of `find_support` for such a shortlist: bounds on memory.
FEATURES_PER_BLOCK = 16384
PARENTS_PER_BLOCK = 1024


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


def fitting_lambda(features_ND: Tensor, lam: float) -> float:
    """Return λ, or 1 where a feature is negative: Tukey's other powers are not defined there (see above).

    Args:
        features_ND: floating point; it may be memory-mapped: it is read in blocks.
        lam: λ >= 0.
    """
    signed = lam != 1 and any((block_BD < 0).any() for block_BD in features_ND.split(FEATURES_PER_BLOCK))
    return 1.0 if signed else lam


def inverse_tukey(features: Tensor, lam: float = 0.5) -> Tensor:
    """Undo `tukey`. Unless λ=1 the result is clamped at 0: a Gaussian sample may leave the map's range."""
    return inverse_tukey_(features.clone(), lam)


def inverse_tukey_(features: Tensor, lam: float) -> Tensor:
    """Do so in place: the pages of fresh memory would take longer than the mathematics."""
    _check_lambda(lam)
    if lam == 1:
        return features
    if lam == 0:
        return features.exp_().sub_(LOG_SHIFT).clamp_(min=0)
    return features.clamp_(min=0).pow_(1 / lam)


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
        factors: by class, for those with more than D samples: R of shape (D, D), float32, with RᵀR = Σ_c.
        by_class: X_c of every class, views of shape (n_c, D).
        noise_scales_C: float32, what centred noise is multiplied by: 1/√(n_c − 1), or 1 where there is a factor.
    """

    features_ND: Tensor
    labels_N: Tensor
    counts_C: Tensor
    starts_C: Tensor
    means_CD: Tensor
    lam: float
    factors: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def by_class(self) -> tuple[Tensor, ...]:  # noqa: D102
        return self.features_ND.split(self.counts_C.tolist())

    @cached_property
    def noise_scales_C(self) -> Tensor:  # noqa: D102, N802
        scales_C = (self.counts_C - 1).clamp(min=1).to(torch.float32).rsqrt()
        for c in self.factors:
            scales_C[c] = 1
        return scales_C


def fit(features_ND: Tensor, labels_N: Tensor, num_classes: int, lam: float = 0.5) -> ClassGaussians:
    """Fit one Gaussian per class to Tukey-transformed features. Results stay on the features' device.

    Args:
        features_ND: features of the training set, floating point (half precision is enough), finite, >= 0 unless
            λ=1. It may be memory-mapped: it is read in blocks, and a float32 copy is what is kept.
        labels_N: int64 in [0, num_classes), on the same device.
        num_classes: C.
        lam: Tukey's λ >= 0.

    Raises:
        UserError: λ or a feature out of range (see `tukey`), or a class without features.
    """
    assert features_ND.ndim == 2, features_ND.shape
    assert labels_N.shape == features_ND.shape[:1], (labels_N.shape, features_ND.shape)
    counts_C = _counted(labels_N, num_classes)
    labels_N, order_N = torch.sort(labels_N, stable=True)
    sorted_ND = torch.empty(features_ND.shape, device=features_ND.device)
    for rows_B, block_BD in zip(order_N.split(FEATURES_PER_BLOCK), sorted_ND.split(FEATURES_PER_BLOCK), strict=True):
        block_BD.copy_(tukey(features_ND[rows_B], lam))
    by_class = sorted_ND.split(counts_C.tolist())
    return ClassGaussians(
        features_ND=sorted_ND,
        labels_N=labels_N,
        counts_C=counts_C,
        starts_C=counts_C.cumsum(0) - counts_C,
        means_CD=torch.stack([features_nD.mean(0) for features_nD in by_class]),
        lam=lam,
        factors={c: _factor(X_nD) for c, X_nD in enumerate(by_class) if len(X_nD) > X_nD.shape[1]},
    )


def held(features_ND: Tensor, labels_N: Tensor, num_classes: int) -> ClassGaussians:
    """Return features in the place of Gaussians that nothing is drawn from: no copy, and neither means nor factors.

    Args:
        features_ND: of any floating dtype, sorted by class.
        labels_N: int64 in [0, num_classes), ascending.
        num_classes: C.

    Raises:
        UserError: a class without features.
    """
    counts_C = _counted(labels_N, num_classes)
    nothing_0D = torch.empty(0, features_ND.shape[1], device=features_ND.device)
    return ClassGaussians(features_ND, labels_N, counts_C, counts_C.cumsum(0) - counts_C, nothing_0D, lam=1.0)


def _counted(labels_N: Tensor, num_classes: int) -> Tensor:
    """Return n_c of every class, each at least 1."""
    counts_C = torch.bincount(labels_N, minlength=num_classes)
    assert len(counts_C) == num_classes, f"labels up to {len(counts_C) - 1} for {num_classes} classes"
    if empty := (counts_C == 0).nonzero().flatten().tolist():
        raise UserError(
            f"class {empty[0]} has no features ({len(empty)} such classes);"
            " every class needs a training image: build the dataset without the empty ones"
        )
    return counts_C


def _factor(features_nD: Tensor) -> Tensor:
    """Return R of shape (D, D), float32, with RᵀR the covariance (GLAG Eq. 6), for n > D."""
    features_nD = features_nD.double()
    centred_nD = features_nD - features_nD.mean(0)
    return (torch.linalg.qr(centred_nD, mode="r").R / (len(features_nD) - 1) ** 0.5).float()


def head_classes(counts_C: Tensor, head_above: int) -> Tensor:
    """Return which classes are head, bool (C,): more than `head_above` images, or the largest where none has."""
    head_C = counts_C > head_above
    return head_C if head_C.any() else counts_C == counts_C.max()


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


def no_support(labels_N: Tensor, head_C: Tensor) -> Support:
    """Return a support of nobody; head classes stay."""
    return Support(labels_N.new_empty(len(labels_N), 0), torch.empty(len(labels_N), 0, device=labels_N.device), head_C)


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
    block = max(1, PARENTS_PER_BLOCK * SHORTLIST // max(k, SHORTLIST))
    for parents_B in parents_P.split(block) if len(parents_P) else ():
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
