"""Which second stage a run selects: the simplest that is not measurably worse than the best on the held-out split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from train.features.classifiers import FEATURES_PER_BLOCK

RESAMPLES = 2000


@dataclass(frozen=True)
class Selection:
    """What was selected, and against what.

    Attributes:
        index: of the selected candidate.
        best: of the one of the highest balanced accuracy.
        behind: per candidate, how much its balanced accuracy lies behind the best one's, in [−1, 1].
        errors: the standard error of each of these differences.
    """

    index: int
    best: int
    behind: list[float]
    errors: list[float]

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return them ready for JSON."""
        return [
            {"name": name, "behind_best": behind, "standard_error": error}
            for name, behind, error in zip(names, self.behind, self.errors, strict=True)
        ]


def select(linears: Sequence[nn.Linear], bank: tuple[Tensor, Tensor], seed: int = 0) -> Selection:
    """Select the first of some classifiers, ordered from simple to complex, that is within an error of the best.

    The error is of the paired difference of balanced accuracies: images are resampled with replacement within each
    class (a stratified bootstrap), the same ones for both classifiers.

    Args:
        linears: from simple to complex.
        bank: held-out features (N, D) and labels (N,).
        seed: of the resampling.
    """
    right_NF = np.stack([correct(linear, bank) for linear in linears], axis=1)
    labels_N = bank[1].cpu().numpy()
    present = np.unique(labels_N)
    accuracies_F = np.mean([right_NF[labels_N == c].mean(0) for c in present], axis=0)
    best = int(accuracies_F.argmax())  # the simplest of those that tie
    differences_NF = right_NF[:, best : best + 1].astype(np.float64) - right_NF
    generator = np.random.default_rng(seed)
    resampled_RF = np.zeros((RESAMPLES, len(linears)))
    for c in present:
        of_class_nF = differences_NF[labels_N == c]
        n = len(of_class_nF)
        resampled_RF += generator.multinomial(n, np.full(n, 1 / n), RESAMPLES) @ of_class_nF / (n * len(present))
    errors_F = resampled_RF.std(0)
    behind_F = accuracies_F[best] - accuracies_F
    index = int(np.flatnonzero(behind_F <= errors_F + 1e-12)[0])
    return Selection(index, best, behind_F.tolist(), errors_F.tolist())


@torch.no_grad()
def correct(linear: nn.Linear, bank: tuple[Tensor, Tensor]) -> NDArray[np.bool_]:
    """Return which features' top class is their own, shape (N,)."""
    parts = zip(*(part.split(FEATURES_PER_BLOCK) for part in bank), strict=True)
    return torch.cat([linear(x.float()).argmax(1) == y for x, y in parts]).cpu().numpy()
