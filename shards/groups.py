"""Many, medium and few: the one definition of head, middle and tail."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

GROUPS = ("many", "medium", "few")
MANY_ABOVE = 100
FEW_BELOW = 20


def class_groups(train_counts_C: ArrayLike) -> NDArray[np.str_]:
    """Name each class's group from its number of training images.

    Args:
        train_counts_C: n_j, training images of class j, shape (C,), integers >= 0.

    Returns:
        Shape (C,): "many" where n_j > 100, "few" where n_j < 20, else "medium"
        (the split of Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", 2019). "" where n_j = 0:
        nothing can be learnt of such a class, so it belongs to no group.
    """
    counts_C = np.asarray(train_counts_C)
    groups_C = np.where(counts_C > MANY_ABOVE, "many", np.where(counts_C < FEW_BELOW, "few", "medium"))
    return np.where(counts_C > 0, groups_C, "")


def imbalance_factor(train_counts_C: ArrayLike) -> float:
    """Return max n / min n over the classes that have training images (nan where none has)."""
    counts_C = np.asarray(train_counts_C)
    present = counts_C[counts_C > 0]
    return float(present.max() / present.min()) if present.size else float("nan")
