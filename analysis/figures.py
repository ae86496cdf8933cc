"""Figures of the data, of accuracies and of training."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from analysis.compare import Spread
from analysis.drawing import PERCENT_TOP, canvas, log_ticks, percent_axis, shade_groups, styled, thousands
from analysis.metrics import percent
from analysis.page import LIGHT
from shards.groups import GROUPS, class_groups

_FEW_POINTS = 30  # a curve of at most this many points shows each of them
_DOTS_UP_TO = 200  # classes that may each have a dot


def class_count_curve(train_counts_C: ArrayLike) -> Figure:
    """Draw n_j from the largest class to the smallest, shaded by group; log y."""
    counts = np.sort(np.asarray(train_counts_C))[::-1]
    # A bar for each class of a few hundred; of more, every k-th: the sorted curve loses nothing that shows.
    ranks = np.unique(np.linspace(0, len(counts) - 1, 300).round().astype(int))
    edges = np.append(ranks, len(counts)) + 0.5
    groups = class_groups(counts)
    with styled():
        figure, ax = canvas(5.0, 2.9, "Training images of each class, sorted")
        ax.set_yscale("log")
        floor, top = 0.7, max(counts[0], 10) * 1.4
        for group in GROUPS:
            mine = groups[ranks] == group
            if mine.any():
                first, last = np.flatnonzero(mine)[[0, -1]]
                heights = np.maximum(counts[ranks[first : last + 1]], floor)
                ax.stairs(heights, edges[first : last + 2], baseline=floor, fill=True, color=LIGHT[group], linewidth=0)
        ax.set_xlim(0.5, len(counts) + 0.5)
        ax.set_ylim(floor, top)
        ax.set_xlabel("class, from the largest to the smallest")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        ax.xaxis.set_major_formatter(FuncFormatter(thousands))
        log_ticks(ax.yaxis, floor, top)
        return figure


def group_bars(evaluations: Sequence[Spread]) -> Figure:
    """Draw each entry's mean accuracy overall and by group, ± its standard deviation; entry i in colour i."""
    bars = {"overall": "top1", **{group: group for group in GROUPS}}
    width = 0.8 / len(evaluations)
    with styled():
        figure, ax = canvas(5.0, 2.9, "Accuracy overall and by group")
        for i, figures in enumerate(evaluations):
            for x, key in enumerate(bars.values()):
                mean, std = figures.mean[key], figures.std[key]
                if mean is None:
                    continue
                middle, top = x - 0.4 + (i + 0.5) * width, 100 * mean
                ax.bar(middle, top, 0.92 * width, color=LIGHT[f"entry{i}"])
                if std is not None:
                    ax.errorbar(middle, top, 100 * std, ecolor=LIGHT["ink"], elinewidth=0.9, capsize=2, capthick=0.9)
                    top = min(top + 100 * std, PERCENT_TOP)
                if len(evaluations) <= 4:
                    ax.annotate(
                        percent(mean).replace("100.0", "100"),  # three "100.0" side by side touch
                        (middle, top),
                        xytext=(0, 2),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8 if len(evaluations) <= 3 else 6.5,
                        color=LIGHT["ink"],
                        gid="value",
                    )
        # A group of which nothing was evaluated keeps its place, marked, so that the picture reads alike everywhere.
        for x, key in enumerate(bars.values()):
            if all(figures.mean[key] is None for figures in evaluations):
                ax.text(x, 2, "no images", ha="center", color=LIGHT["muted"])
        ax.set_xticks(range(len(bars)), bars)
        ax.set_xlim(-0.5, len(bars) - 0.5)
        ax.tick_params(axis="x", length=0)
        percent_axis(ax)
        return figure


def accuracy_by_class_size(entries: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]]) -> Figure:
    """Draw each class's accuracy against its number of training images; entry i in colour i.

    Args:
        entries: per entry (train_counts_C, recall_C), recall in [0, 1] or nan. A line joins the mean accuracy of
            classes of like size: of equal size for up to 20 classes, else of one of twelve ranges of equal ratio.
            Up to 200 classes also have a faint dot each.
    """
    with styled():
        figure, ax = canvas(5.0, 2.9, "Accuracy of the classes against their number of training images")
        ax.set_xscale("log")
        smallest, largest = np.inf, 1.0
        for i, (counts_C, recall_C) in enumerate(entries):
            known = np.isfinite(recall_C) & (counts_C > 0)
            if not known.any():
                continue
            sizes, recall = counts_C[known].astype(float), 100 * recall_C[known]
            smallest, largest = min(smallest, sizes.min()), max(largest, sizes.max())
            x, y = means_by_size(sizes, recall)
            colour = LIGHT[f"entry{i}"]
            if len(sizes) <= _DOTS_UP_TO:
                ax.plot(sizes, recall, "o", color=colour, alpha=0.3, markeredgewidth=0, clip_on=False)
            ax.plot(x, y, "o-", color=colour, clip_on=False)
        low, high = min(smallest, largest / 2) / 1.25, largest * 1.25
        ax.set_xlim(low, high)
        percent_axis(ax)
        shade_groups(ax, low, high)
        ax.set_xlabel("training images of the class")
        log_ticks(ax.xaxis, low, high)
        return figure


def means_by_size(sizes_C: NDArray[np.float64], values_C: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Return sizes and mean values of classes of like size: of equal size for up to 20 classes, else of one of twelve
    ranges of equal ratio.
    """
    edges = np.unique(sizes_C if len(sizes_C) <= 20 else np.geomspace(sizes_C.min(), sizes_C.max(), 13)[:-1])
    bin_of = np.searchsorted(edges, sizes_C, side="right")
    bins = np.unique(bin_of)
    x = [float(np.exp(np.log(sizes_C[bin_of == b]).mean())) for b in bins]
    return x, [float(values_C[bin_of == b].mean()) for b in bins]


def curve(series: Sequence[tuple[ArrayLike, ArrayLike]], label: str, *, fractions: bool = False) -> Figure | None:
    """Draw one quantity over the epochs; entry i in colour i: the mean of its N runs and a band from min to max.

    Args:
        series: per entry (epochs_E, values_NE); E = 0 where it has none. Epochs at which a run's value is not
            finite leave a gap.
        label: what is drawn, for a screen reader.
        fractions: values are fractions, shown in percent.

    Returns:
        None where no entry has anything to draw.
    """
    drawn = False
    with styled():
        figure, ax = canvas(4.0, 2.4, label)
        for i, (epochs, values) in enumerate(series):
            x_E, y_NE = np.asarray(epochs, float), np.asarray(values, float) * (100 if fractions else 1)
            y_NE = np.where(np.isfinite(y_NE), y_NE, np.nan)
            mean_E, colour = y_NE.mean(axis=0), LIGHT[f"entry{i}"]
            if np.isnan(mean_E).all():
                continue
            drawn = True
            if len(y_NE) > 1:
                ax.fill_between(x_E, y_NE.min(axis=0), y_NE.max(axis=0), color=colour, alpha=0.2, linewidth=0)
            ax.plot(x_E, mean_E, "o-" if len(x_E) <= _FEW_POINTS else "-", color=colour, clip_on=False)
        steps = [1, 2, 5, 10]
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=steps, min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=steps))
        ax.set_xlabel("epoch")
        if fractions:
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        elif ax.dataLim.ymin >= 0:
            ax.set_ylim(bottom=0)
        return figure if drawn else None
