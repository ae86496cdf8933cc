"""What predictions of each image show: confusion between classes, and calibration."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from analysis.drawing import canvas, percent_axis, styled
from analysis.metrics import BINS
from analysis.page import LIGHT
from analysis.predictions import Answers

HEAT_MAP_UP_TO = 20  # classes whose names fit beside a heat map
DRAWN_UP_TO = 100  # classes whose cells can be seen without names
_PAIRS = 12


@dataclass(frozen=True)
class Pair:
    """How often images of one class are taken for another.

    Attributes:
        true, predicted: the classes.
        shares: of the true class's images, for each entry, in [0, 1]; None where it has none.
    """

    true: int
    predicted: int
    shares: list[float | None]


def confusion_matrix(answers: Answers, num_classes: int) -> NDArray[np.float64]:
    """Return which share of each class's images was taken for which class, all runs together.

    Returns:
        Shape (C, C), rows by true class, in [0, 1]; nan for a class without images.
    """
    cells = sum(
        np.bincount(one.labels_N * num_classes + one.predicted, minlength=num_classes**2) for one in answers.runs
    )
    counts_CC = np.asarray(cells, np.float64).reshape(num_classes, num_classes)
    totals_C1 = counts_CC.sum(axis=1, keepdims=True)
    return np.divide(counts_CC, totals_C1, out=np.full_like(counts_CC, np.nan), where=totals_C1 > 0)


def confused_pairs(answers: Sequence[Answers], num_classes: int) -> list[Pair]:
    """Return the pairs of classes that the last of some entries confuses for the most images, with all entries' shares.

    Never makes a (C, C) matrix: of 8,142 classes it would have 66 million cells.
    """
    final = answers[-1]
    mistakes = np.concatenate([(one.labels_N * num_classes + one.predicted)[~one.correct] for one in final.runs])
    cells, counts = np.unique(mistakes, return_counts=True)
    found = []
    often = (counts > len(final.runs)).sum()  # one image, which every seed may mistake, is no pattern
    for cell in cells[np.argsort(-counts, kind="stable")[:_PAIRS]][:often]:
        true, predicted = divmod(int(cell), num_classes)
        shares: list[float | None] = []
        for entry in answers:
            mine = np.concatenate([one.predicted[one.labels_N == true] == predicted for one in entry.runs])
            shares.append(float(mine.mean()) if len(mine) else None)
        found.append(Pair(true, predicted, shares))
    return found


def heat_map(answers: Answers, order_C: NDArray[np.int64]) -> Figure | None:
    """Draw the confusion matrix with its classes in an order; None for more classes than can be seen."""
    num_classes = len(order_C)
    if num_classes > DRAWN_UP_TO:
        return None
    matrix_CC = confusion_matrix(answers, num_classes)[np.ix_(order_C, order_C)]
    with styled():
        figure, ax = canvas(4.2, 3.6, "Confusion of the classes")
        ax.grid(visible=False)
        edges = np.arange(num_classes + 1) + 0.5
        mesh = ax.pcolormesh(edges, edges, 100 * matrix_CC, cmap="Blues", vmin=0, vmax=100)
        ax.invert_yaxis()
        ax.set_aspect("equal")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
        ax.set_xlabel("predicted class, from the largest to the smallest")
        ax.set_ylabel("true class")
        figure.colorbar(mesh, ax=ax, label="% of the true class's images", shrink=0.8).outline.set_visible(False)
        return figure


def reliability(entries: Sequence[Answers]) -> Figure:
    """Draw how often predictions are right against how sure they were; entry i in colour i, all its runs together.

    A point for each of 15 bins of confidence that holds images (Guo et al., "On Calibration of Modern Neural Networks",
    2017, Fig. 1); on the diagonal, probabilities can be taken at their word.
    """
    with styled():
        figure, ax = canvas(4.0, 2.9, "Accuracy against confidence")
        ax.plot([0, 100], [0, 100], "--", color=LIGHT["muted"], linewidth=1)
        for i, entry in enumerate(entries):
            confidence = np.concatenate([one.confidence for one in entry.runs]).astype(np.float64)
            correct = np.concatenate([one.correct for one in entry.runs])
            bin_of = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
            images = np.bincount(bin_of, minlength=BINS)
            held = images > 0
            x, y = (np.bincount(bin_of, weights, BINS)[held] / images[held] for weights in (confidence, correct))
            ax.plot(100 * x, 100 * y, "o-", color=LIGHT[f"entry{i}"], clip_on=False)
        percent_axis(ax)
        ax.set_xlim(0, 100)
        ax.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
        ax.set_xlabel("confidence")
        return figure
