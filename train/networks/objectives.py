"""Objectives of a single branch: cross-entropy, and cross-entropy whose logits are shifted by the classes' frequencies.

    ce         −log softmax(z)_y
    adjusted   −log softmax(z + τ·log p)_y      logit-adjusted loss (Menon et al., ICLR 2021, Eq. 10); with τ = 1
                                                balanced softmax (Ren et al., NeurIPS 2020, Eq. 4)
    gradual    −log softmax(z + α(t)·log p)_y   gradual balanced loss, GraLoss (Zhang and Xiang 2022, Eq. 3 and 4)

p is the training images' share of each class. Plain logits z are what predicts.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Objective = Literal["ce", "adjusted", "gradual"]


def gradual_weight(epoch: int, epochs: int, scale: float, base: float) -> float:
    """Return α(t) = s·(c^t − 1), with t from 0 in the first epoch to 1 in the last (Zhang and Xiang 2022, Eq. 3).

    Args:
        epoch: T, from 1.
        epochs: T_max; of a single epoch t is 0.
        scale: s.
        base: c; 2 makes α rise to s. A base of 1 keeps it at 0, and one below 1 makes it negative.
    """
    return scale * (base ** ((epoch - 1) / max(1, epochs - 1)) - 1)


def log_prior(train_counts_C: NDArray[np.int64]) -> Tensor:
    """Return log p of each class from its training images (C,): float32 (C,), −∞ where a class has none."""
    counts_C = torch.from_numpy(train_counts_C).double()
    return (counts_C / counts_C.sum()).log().float()


def adjusted_cross_entropy(logits_BC: Tensor, labels_B: Tensor, log_prior_C: Tensor, tau: float) -> Tensor:
    """Return the mean of −log softmax(z + τ·log p)_y (Zhang and Xiang 2022, Eq. 2 and 4): a scalar.

    Args:
        logits_BC: z, of any floating dtype.
        labels_B: int64; of classes that have training images.
        log_prior_C: see `log_prior`.
        tau: τ, or α(t); at 0 this is cross-entropy over all classes.
    """
    if tau == 0:  # where 0·(−∞) would be no number
        return F.cross_entropy(logits_BC, labels_B)
    return F.cross_entropy(logits_BC + tau * log_prior_C, labels_B)
