"""Which second stage a run selects: of those that accuracy on the held-out split cannot tell apart, the likeliest.

A held-out split of a hundred images measures balanced accuracy to two or three points, and classifiers that differ by
as much tie there. Their log-probabilities of the true classes tell them apart sooner: these differ on every image, and
not only where the top class does. On second stages of 39 digits runs (136 held-out images) the simplest classifier
within an error fell 1.2 points behind the best by test, the likeliest within an error 0.4
(analysis/results/second_stages.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

from train.features.classifiers import FEATURES_PER_BLOCK

TEMPERATURES = 1 / 50, 50.0
# A temperature is one number: of more images than these, so many tell it.
IMAGES_FOR_TEMPERATURE = 4096


@dataclass(frozen=True)
class Selection:
    """What was selected, and against what.

    Attributes:
        index: of the selected candidate.
        best: of the one of the highest balanced accuracy.
        behind: per candidate, how much its balanced accuracy lies behind the best one's, in [0, 1].
        errors: the standard error of each of these differences.
        losses: per candidate, its cross-entropy at its own temperature, the mean of classes' means, in nats.
    """

    index: int
    best: int
    behind: list[float]
    errors: list[float]
    losses: list[float]

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return them ready for JSON."""
        return [
            {"name": name, "behind_best": behind, "standard_error": error, "loss": loss}
            for name, behind, error, loss in zip(names, self.behind, self.errors, self.losses, strict=True)
        ]


def select(linears: Sequence[nn.Linear], bank: tuple[Tensor, Tensor]) -> Selection:
    """Select, of the classifiers within an error of the highest balanced accuracy, the one of the lowest loss.

    The error is of the paired difference of balanced accuracies, over images drawn anew within each class, the same
    ones for both classifiers. Before the loss each classifier's logits are divided by the temperature that suits it
    best there: one that is right and merely too sure is no worse for it.

    Args:
        linears: from simple to complex: the first of those that tie is taken.
        bank: held-out features (N, D) and labels (N,).
    """
    judged = [judge(linear, bank) for linear in linears]
    right_NF, losses_NF = (np.stack(parts, axis=1) for parts in zip(*judged, strict=True))
    labels_N = bank[1].cpu().numpy()
    present = np.unique(labels_N)
    accuracies_F, losses_F = (
        np.mean([of_NF[labels_N == c].mean(0) for c in present], axis=0) for of_NF in (right_NF, losses_NF)
    )
    best = int(accuracies_F.argmax())  # the simplest of those that tie
    errors_F = _standard_errors(right_NF[:, best : best + 1].astype(np.float64) - right_NF, labels_N)
    behind_F = accuracies_F[best] - accuracies_F
    within_F = behind_F <= errors_F + 1e-12
    index = int(np.where(within_F, losses_F, np.inf).argmin())
    return Selection(index, best, behind_F.tolist(), errors_F.tolist(), losses_F.tolist())


def _standard_errors(differences_NF: NDArray[np.float64], labels_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the standard errors of the means over classes of the classes' mean differences, shape (F,).

    A class of n images adds their variance s²/n. One of a single image says nothing of its variance by itself, and
    would add 0 though it moves the mean as much as any: such classes are drawn anew together.
    """
    order_N = labels_N.argsort(kind="stable")
    groups = np.split(order_N, np.flatnonzero(np.diff(labels_N[order_N])) + 1)
    single = np.array([rows[0] for rows in groups if len(rows) == 1], np.int64)
    variance_F = np.zeros(differences_NF.shape[1])
    for rows in groups:
        if len(rows) > 1:
            variance_F += differences_NF[rows].var(0, ddof=1) / len(rows)
    if len(single) > 1:
        variance_F += differences_NF[single].var(0, ddof=1) * len(single)
    return np.asarray(np.sqrt(variance_F) / len(groups))


@torch.no_grad()
def judge(linear: nn.Linear, bank: tuple[Tensor, Tensor]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return which features' top class is their own, and each one's cross-entropy at the temperature that suits them.

    Args:
        linear: the classifier.
        bank: features (N, D) and labels (N,).

    Returns:
        right_N, bool, and losses_N, in nats.
    """
    inverse = 1 / best_temperature(linear, bank)
    right, losses = [], []
    for features_BD, labels_B in zip(*(part.split(FEATURES_PER_BLOCK) for part in bank), strict=True):
        logits_BC = linear(features_BD.float())
        right.append(logits_BC.argmax(1) == labels_B)
        losses.append(F.cross_entropy(logits_BC.mul_(inverse), labels_B, reduction="none"))
    return torch.cat(right).cpu().numpy(), torch.cat(losses).double().cpu().numpy()


@torch.no_grad()
def best_temperature(linear: nn.Linear, bank: tuple[Tensor, Tensor]) -> float:
    """Return the T in [1/50, 50] of the lowest cross-entropy, classes in balance (Guo et al., 2017, section 4.2)."""
    rows = np.linspace(0, len(bank[1]) - 1, min(len(bank[1]), IMAGES_FOR_TEMPERATURE)).round().astype(int)
    rows_B = torch.from_numpy(rows).to(bank[1].device)
    labels_B = bank[1][rows_B]
    logits_BC = linear(bank[0][rows_B].float())
    weights_B = 1.0 / torch.bincount(labels_B)[labels_B]
    weights_B /= weights_B.sum()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits_BC / np.exp(log_temperature), labels_B, reduction="none") @ weights_B)

    return float(np.exp(minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded").x))
