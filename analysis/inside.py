"""What a run keeps of its classifier and its features: read, and drawn.

diagnostics.npz, any array of which may be missing:
    norms             (C,) the length of each class's row of the classifier's weights
    norms_conventional, norms_rebalancing    (C,) of the halves that see one branch's features
    distances         (C,) how far a class's test features, of unit length, lie from their centroid; nan where unknown
    beta              (C,) of a second stage with a β per class: how far its generated features trust larger classes
feature_sample.npz:
    features          (P, D) of some head and tail classes
    labels            (P,) int
    generated         (P,) bool: whether a feature was generated, or is that of a training image
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from analysis.compare import Entry
from analysis.drawing import canvas, log_ticks, shade_groups, shade_ranks, styled
from analysis.figures import means_by_size
from analysis.page import LIGHT
from analysis.runs import Run, damaged_arrays, read_arrays

DIAGNOSTICS, SAMPLE = "diagnostics.npz", "feature_sample.npz"
# What of diagnostics.npz is drawn with which line: BBN's branches beside the whole.
NORMS = {"norms": "-", "norms_conventional": "--", "norms_rebalancing": ":"}
_RANKED_UP_TO = 30  # classes that may stand side by side
_LEAST = 8  # features that make a picture
_PERPLEXITY = 30


def diagnostic(run: Run, name: str) -> NDArray[np.float64] | None:
    """Read one array of diagnostics.npz, shape (C,); None where the run kept none, or all of it is unknown.

    Raises:
        UserError: the file is damaged.
    """
    arrays = read_arrays(run, DIAGNOSTICS, [name])
    if not arrays:
        return None
    found_C = arrays[name]
    if found_C.shape != (len(run.classes),) or found_C.dtype.kind != "f":
        raise damaged_arrays(run, DIAGNOSTICS, f"{name} must hold a number for each of {len(run.classes)} classes")
    if np.isinf(found_C).any() or (found_C < 0).any():
        raise damaged_arrays(run, DIAGNOSTICS, f"{name} must be finite and not negative")
    return None if np.isnan(found_C).all() else found_C.astype(np.float64)


@dataclass(frozen=True)
class Line:
    """A value per class of one entry.

    Attributes:
        entry: the number of the entry, which decides the colour.
        style: of the line, as matplotlib writes it.
        counts_C: n_j, training images of the classes.
        values_C: in any unit, nan where unknown.
    """

    entry: int
    style: str
    counts_C: NDArray[np.int64]
    values_C: NDArray[np.float64]


def norm_lines(entries: Sequence[Entry]) -> list[Line]:
    """Return the lengths of the classifiers' rows, relative to each entry's mean row; see BBN, Figure 4."""
    lines = []
    for i, entry in enumerate(entries):
        whole_C = entry.over_seeds(partial(diagnostic, name="norms"))
        if whole_C is None or not np.nanmean(whole_C) > 0:
            continue
        for name, style in NORMS.items():
            found_C = entry.over_seeds(partial(diagnostic, name=name))
            if found_C is not None:
                lines.append(Line(i, style, entry.runs[0].train_counts_C, found_C / np.nanmean(whole_C)))
    return lines


def lines_of(entries: Sequence[Entry], name: str) -> list[Line]:
    """Return an array of diagnostics.npz of each entry that has it, the mean over its seeds."""
    found = [(i, entry, entry.over_seeds(partial(diagnostic, name=name))) for i, entry in enumerate(entries)]
    return [
        Line(i, "-", entry.runs[0].train_counts_C, values_C) for i, entry, values_C in found if values_C is not None
    ]


def by_class(lines: Sequence[Line], label: str) -> Figure | None:
    """Draw values of the classes; None where there are none.

    Up to 30 classes stand side by side, the largest first. More are drawn against their training images, where a line
    joins the means of classes of like size: a rank for each would squeeze the head into the margin.
    """
    if not lines:
        return None
    ranked = max(len(line.counts_C) for line in lines) <= _RANKED_UP_TO
    with styled():
        figure, ax = canvas(5.0, 2.9, label)
        for line in lines:
            colour = LIGHT[f"entry{line.entry}"]
            if ranked:
                y = line.values_C[np.argsort(-line.counts_C, kind="stable")]
                ax.plot(np.arange(1, len(y) + 1), y, line.style, marker="o", color=colour, clip_on=False)
                continue
            known_C = np.isfinite(line.values_C) & (line.counts_C > 0)
            if known_C.any():
                means = means_by_size(line.counts_C[known_C].astype(float), line.values_C[known_C])
                ax.plot(*means, line.style, marker="o", color=colour, clip_on=False)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        counts = np.concatenate([line.counts_C for line in lines])
        if ranked:
            ax.set_xlim(0.5, max(len(line.counts_C) for line in lines) + 0.5)
            if len({tuple(np.sort(line.counts_C)) for line in lines}) == 1:
                shade_ranks(ax, lines[0].counts_C)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
            ax.set_xlabel("class, from the largest to the smallest")
        else:
            ax.set_xscale("log")
            most = max(2, counts.max())
            low, high = min(max(1, counts.min()), most / 2) / 1.25, most * 1.25  # wide enough for a number
            ax.set_xlim(low, high)
            shade_groups(ax, low, high)
            log_ticks(ax.xaxis, low, high)
            ax.set_xlabel("training images of the class")
        return figure


@dataclass(frozen=True)
class Sample:
    """Features of a few classes.

    Attributes:
        features_PD: float32.
        labels_P: int64, in [0, C).
        generated_P: bool.
        classes: the labels that occur, from the largest class to the smallest.
    """

    features_PD: NDArray[np.float32]
    labels_P: NDArray[np.int64]
    generated_P: NDArray[np.bool_]
    classes: list[int]


def read_sample(run: Run) -> Sample | None:
    """Read feature_sample.npz; None where the run kept none, or too few features for a picture.

    Raises:
        UserError: the file is damaged.
    """
    arrays = read_arrays(run, SAMPLE)
    if arrays is None:
        return None
    if lacking := {"features", "labels", "generated"} - arrays.keys():
        raise damaged_arrays(run, SAMPLE, f"it lacks {min(lacking)}")
    features_PD, labels_P, generated_P = arrays["features"], arrays["labels"], arrays["generated"]
    if features_PD.ndim != 2 or not labels_P.shape == generated_P.shape == features_PD.shape[:1]:
        raise damaged_arrays(run, SAMPLE, "the shapes of its arrays disagree")
    if features_PD.dtype.kind != "f" or labels_P.dtype.kind not in "iu" or generated_P.dtype.kind != "b":
        raise damaged_arrays(run, SAMPLE, "its arrays are of the wrong type")
    if not np.isfinite(features_PD).all():
        raise damaged_arrays(run, SAMPLE, "a feature is not finite")
    if len(labels_P) and not 0 <= labels_P.min() <= labels_P.max() < len(run.classes):
        raise damaged_arrays(run, SAMPLE, f"a label lies outside its {len(run.classes)} classes")
    features_PD = features_PD.astype(np.float32)
    if len(labels_P) < _LEAST or not features_PD.std(axis=0).any():
        return None
    present = np.unique(labels_P).tolist()
    classes = sorted(present, key=lambda label: (-run.train_counts_C[label], label))
    colours = sum(name.startswith("entry") for name in LIGHT)
    if len(classes) > colours:
        return None
    return Sample(features_PD, labels_P.astype(np.int64), generated_P, classes)


def embedding(sample: Sample) -> Figure:
    """Draw features in two dimensions by t-SNE: class i in colour i, real ones as discs, generated ones as crosses."""
    from sklearn.manifold import TSNE  # loads slowly, and few pages need it

    perplexity = min(_PERPLEXITY, (len(sample.labels_P) - 1) / 3)
    points_P2 = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(sample.features_PD)
    with styled():
        figure, ax = canvas(5.6, 4.2, "Real and generated features by t-SNE")
        ax.set_axis_off()
        for generated, marker in ((True, "x"), (False, "o")):  # the real ones on top
            for i, label in enumerate(sample.classes):
                mine = (sample.labels_P == label) & (sample.generated_P == generated)
                style = {"s": 14, "linewidth": 0.9} if generated else {"s": 17, "linewidth": 0}
                ax.scatter(*points_P2[mine].T, marker=marker, color=LIGHT[f"entry{i}"], alpha=0.75, **style)
        return figure
