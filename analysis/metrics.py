"""How well a classifier does on a long-tailed test set: additive statistics and their summary.

Evaluation adds one `Tally` per batch, sums it over batches and ranks, and summarises once at the end:

    tally(logits, labels) + tally(logits, labels) + …  →  summarize(sum, train_counts)

so no rank ever keeps logits, and a batch of any size, even an empty one, may be added.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.groups import GROUPS, class_groups

BINS = 15  # equal-width confidence bins, as in Guo et al. 2017


@dataclass(frozen=True)
class Tally:
    """Statistics of some evaluated images; the sum of two tallies is the tally of their union.

    Attributes:
        correct_C: shape (C,), int64: images of class j whose top-1 prediction is j.
        total_C: shape (C,), int64: images of class j.
        bins_3K: shape (3, 15), float64: per confidence bin the number of images, the sum of their
            confidences (the highest softmax probability, in [0, 1]) and the number predicted correctly.
    """

    correct_C: NDArray[np.int64]
    total_C: NDArray[np.int64]
    bins_3K: NDArray[np.float64]

    @classmethod
    def zeros(cls, num_classes: int) -> Self:
        """Return the tally of no images at all."""
        return cls(np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64), np.zeros((3, BINS), np.float64))

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.correct_C + other.correct_C, self.total_C + other.total_C, self.bins_3K + other.bins_3K)

    def to_vector(self) -> NDArray[np.float64]:
        """Return shape (2C + 45,), float64: a flat copy for an all-reduce (exact up to 2^53 images)."""
        return np.concatenate([self.correct_C, self.total_C, self.bins_3K.ravel()]).astype(np.float64)

    @classmethod
    def from_vector(cls, vector: ArrayLike, num_classes: int) -> Self:
        """Undo `to_vector`; sums of vectors give sums of tallies."""
        vector = np.asarray(vector, np.float64)
        assert vector.shape == (2 * num_classes + 3 * BINS,), vector.shape
        correct, total, bins = np.split(vector, [num_classes, 2 * num_classes])
        return cls(correct.round().astype(np.int64), total.round().astype(np.int64), bins.reshape(3, BINS))


def tally(logits_BC: ArrayLike, labels_B: ArrayLike) -> Tally:
    """Count one batch: top-1 predictions per class and softmax confidences.

    Args:
        logits_BC: scores before the softmax, shape (B, C), finite; B may be 0. Equal scores: the lower
            class index is the prediction.
        labels_B: true classes, shape (B,), integers in [0, C).

    Raises:
        ValueError: a logit is not finite (a diverged model has no accuracy).
    """
    logits_BC = np.asarray(logits_BC, np.float32)
    labels_B = np.asarray(labels_B, np.int64)
    num_classes = logits_BC.shape[1]
    assert labels_B.shape == (len(logits_BC),), (labels_B.shape, logits_BC.shape)
    assert ((labels_B >= 0) & (labels_B < num_classes)).all(), "a label lies outside [0, C)"
    if not np.isfinite(logits_BC).all():
        raise ValueError("the model's logits hold nan or inf: training has diverged; lower optim.lr")

    # The top class's softmax probability: exp(0) over the sum of exp(logit - highest logit).
    predicted_B = logits_BC.argmax(axis=1)
    highest_B1 = logits_BC.max(axis=1, keepdims=True).astype(np.float64)
    confidence_B = 1.0 / np.exp(logits_BC - highest_B1).sum(axis=1)
    right_B = predicted_B == labels_B

    # Bin k holds confidences in (k/15, (k+1)/15].
    bin_B = np.clip(np.ceil(confidence_B * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return Tally(
        correct_C=np.bincount(labels_B[right_B], minlength=num_classes),
        total_C=np.bincount(labels_B, minlength=num_classes),
        bins_3K=np.stack(
            [np.bincount(bin_B, weights, BINS) for weights in (np.ones(len(bin_B)), confidence_B, right_B)]
        ),
    )


def summarize(total: Tally, train_counts_C: ArrayLike) -> dict[str, float | None]:
    """Condense a tally into the figures of `summary.json`.

    Args:
        total: the tally of the whole split.
        train_counts_C: n_j, training images of class j, shape (C,); decides many, medium and few.

    Returns:
        Fractions in [0, 1]; None where nothing was there to measure:
        `top1` over all images; `balanced_accuracy`, the mean recall over classes with evaluated images;
        `many`, `medium`, `few`, the same within one group; `ece`, the expected calibration error,
        Σ_k |correct_k − confidence_k| / B over 15 bins (Guo et al., "On Calibration of Modern Neural
        Networks", 2017, Eq. 3).
    """
    groups_C = class_groups(train_counts_C)
    assert groups_C.shape == total.total_C.shape, (groups_C.shape, total.total_C.shape)
    seen_C = total.total_C > 0
    recall_C = total.correct_C / np.maximum(total.total_C, 1)

    def mean_recall(chosen_C: NDArray[np.bool_]) -> float | None:
        return float(recall_C[chosen_C].mean()) if chosen_C.any() else None

    images = int(total.total_C.sum())
    _, confidence_K, correct_K = total.bins_3K
    return {
        "top1": float(total.correct_C.sum() / images) if images else None,
        "balanced_accuracy": mean_recall(seen_C),
        **{group: mean_recall(seen_C & (groups_C == group)) for group in GROUPS},
        "ece": float(np.abs(correct_K - confidence_K).sum() / images) if images else None,
    }


def percent(fraction: float | None) -> str:
    """Write a fraction as a percentage with one decimal; an en dash for None."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def points(difference: float) -> str:
    """Write a difference of fractions in percentage points, with one decimal and its sign; 0.0 has none."""
    rounded = round(100 * difference, 1)
    sign = "+" if rounded > 0 else "−" if rounded < 0 else ""  # ± is for spreads
    return f"{sign}{abs(rounded):.1f}"
