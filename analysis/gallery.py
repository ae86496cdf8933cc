"""Every figure by its name, drawn from the entries of one dataset: for the report, and alone as a file."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis import confusion, figures, inside
from analysis.compare import Entry, group_runs
from analysis.drawing import alone
from analysis.headline import best_entry
from analysis.page import MAX_ENTRIES, write_file
from analysis.predictions import Answers, answers
from analysis.runs import Run
from shards.errors import UserError

# What is drawn over the epochs: a caption, the key of an epoch's row (within "eval" for accuracies), and whether it is
# a fraction.
CURVES = {
    "loss": ("Training loss", "loss", False),
    "accuracy": ("Overall accuracy", "top1", True),
    "tail-accuracy": ("Tail accuracy", "few", True),
    "learning-rate": ("Learning rate", "lr", False),
    "alpha": ("Mixing weight α", "alpha", False),
}


def write_figure(name: str, runs: Sequence[Run], out: Path) -> Path:
    """Write one figure as a file and return where it lies.

    Args:
        name: one of `NAMES`.
        runs: at least one, all of one dataset.
        out: ends in .svg or .pdf.

    Raises:
        UserError: the file is of another kind or cannot be written, or the runs have nothing to draw.
    """
    if out.suffix.lower() not in (".svg", ".pdf"):
        raise UserError(f"{out} is neither SVG nor PDF; name a file such as --out {out.stem or 'figure'}.pdf")
    entries = group_runs(runs)
    if len({entry.dataset for entry in entries}) > 1:
        raise UserError(f"these runs are of {len({entry.dataset for entry in entries})} datasets; name those of one")
    check_colours(entries)
    figure = _FIGURES[name](entries)
    if figure is None:
        raise UserError(f"these runs have nothing to draw for {name}{_WANTED.get(name, '')}")
    titles = _LEGENDS[name](entries) if name in _LEGENDS else [entry.title for entry in entries]
    return write_file(out, alone(figure, titles, out.suffix[1:].lower()))


def check_colours(entries: Sequence[Entry]) -> None:
    """Refuse more entries than there are colours."""
    if len(entries) > MAX_ENTRIES:
        raise UserError(
            f"{len(entries)} titles on {entries[0].dataset} are too many for one figure; name runs of at most"
            f" {MAX_ENTRIES}, or tabulate all with: tailstream compare --format html"
        )


def class_counts(entries: Sequence[Entry]) -> Figure:
    """Draw the training images of each class."""
    return figures.class_count_curve(entries[0].runs[0].train_counts_C)


def groups(entries: Sequence[Entry]) -> Figure:
    """Draw the accuracy of head, middle and tail."""
    return figures.group_bars([entry.last for entry in entries])


def class_size(entries: Sequence[Entry]) -> Figure:
    """Draw the accuracy of each class against its size."""
    return figures.accuracy_by_class_size([(entry.runs[0].train_counts_C, recall(entry)) for entry in entries])


def curve(entries: Sequence[Entry], name: str) -> Figure | None:
    """Draw one of `CURVES`; None where no run logged it."""
    caption, key, fractions = CURVES[name]
    logs = [[evaluations(run) if fractions else run.epochs for run in entry.runs] for entry in entries]
    return figures.curve([_series(rows, key) for rows in logs], caption, fractions=fractions)


def reliability(entries: Sequence[Entry]) -> Figure | None:
    """Draw how far confidences can be believed; None unless all entries kept predictions."""
    return reliability_of([answers(entry) for entry in entries])


def reliability_of(answered: Sequence[Answers | None]) -> Figure | None:
    """Draw the same of answers that were read already."""
    known = [of for of in answered if of is not None and len(of.labels)]
    # A picture of some entries alone would have the colours of others.
    return confusion.reliability(known) if len(known) == len(answered) else None


def heat_map(entries: Sequence[Entry]) -> Figure | None:
    """Draw the confusion matrix of the best entry; None without predictions, or for too many classes."""
    run = best_entry(entries).runs[0]
    answered: Answers | None = answers(best_entry(entries))
    if answered is None or not len(answered.labels):
        return None
    order_C = np.argsort(-run.train_counts_C, kind="stable")
    return confusion.heat_map(answered, order_C)


def weight_norms(entries: Sequence[Entry]) -> Figure | None:
    """Draw the lengths of the classifiers' rows; None where no run kept them."""
    return inside.by_class(inside.norm_lines(entries), "Length of each class's classifier weights")


def compactness(entries: Sequence[Entry]) -> Figure | None:
    """Draw how far the features of a class lie from their centroid; None where no run kept it."""
    return inside.by_class(inside.lines_of(entries, "distances"), "Distance of features from their class's centroid")


def beta(entries: Sequence[Entry]) -> Figure | None:
    """Draw β of each class; None where no run had several."""
    return inside.by_class(inside.lines_of(entries, "beta"), "β of each class")


def sampled(entries: Sequence[Entry]) -> tuple[Entry, inside.Sample] | None:
    """Return the best entry whose first run kept a sample of its features, and the sample."""
    found = {entry.title: inside.read_sample(entry.runs[0]) for entry in entries}
    having = [entry for entry in entries if found[entry.title] is not None]
    if not having:
        return None
    sample = found[best_entry(having).title]
    assert sample is not None
    return best_entry(having), sample


def embedding(entries: Sequence[Entry]) -> Figure | None:
    """Draw real and generated features of some classes; None where no run kept any."""
    chosen = sampled(entries)
    return None if chosen is None else inside.embedding(chosen[1])


def _sampled_classes(entries: Sequence[Entry]) -> list[str]:
    chosen = sampled(entries)
    return [] if chosen is None else [chosen[0].runs[0].classes[label] for label in chosen[1].classes]


_FIGURES: dict[str, Callable[[Sequence[Entry]], Figure | None]] = {
    "class-counts": class_counts,
    "groups": groups,
    "class-size": class_size,
    **{name: partial(curve, name=name) for name in CURVES},
    "reliability": reliability,
    "confusion": heat_map,
    "weight-norms": weight_norms,
    "compactness": compactness,
    "beta": beta,
    "features": embedding,
}
NAMES = tuple(_FIGURES)
# What the legend of a figure's colours names, where that is not the entries' titles.
_LEGENDS: dict[str, Callable[[Sequence[Entry]], list[str]]] = {
    "class-counts": lambda _: [],
    "confusion": lambda _: [],
    "features": _sampled_classes,
}
_WANTED = {
    "reliability": ": all of them need a predictions.npz of the same images",
    "confusion": f": it needs predictions.npz, and at most {confusion.DRAWN_UP_TO} classes",
    "weight-norms": f": it needs a {inside.DIAGNOSTICS}",
    "compactness": f": it needs a {inside.DIAGNOSTICS} of a first stage",
    "beta": ": only AFG with --method.beta adaptive has a β per class",
    "features": f": it needs a {inside.SAMPLE}, which AFG writes",
}


def recall(entry: Entry) -> NDArray[np.float64]:
    """Return the mean over an entry's seeds of each class's accuracy, shape (C,); nan where there are no images."""

    def of(run: Run) -> NDArray[np.float64]:
        return np.divide(run.correct_C, run.total_C, out=np.full(len(run.total_C), np.nan), where=run.total_C > 0)

    found = entry.over_seeds(of)
    assert found is not None  # runs of one entry have the same classes
    return found


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Return the evaluations that a run logged, each with its epoch."""
    return [row["eval"] | {"epoch": row["epoch"]} for row in run.epochs if isinstance(row.get("eval"), dict)]


def values(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Return one quantity over the epochs; nan where a row lacks it."""
    found = (row.get(key) for row in rows)
    return [float(value) if isinstance(value, int | float) else float("nan") for value in found]


def _series(runs: list[list[dict[str, Any]]], key: str) -> tuple[list[int], list[list[float]]]:
    """Return (epochs_E, values_NE) over the epochs for which all of an entry's runs have a row."""
    shared = set.intersection(*({row["epoch"] for row in rows} for rows in runs))
    return sorted(shared), [values([row for row in rows if row["epoch"] in shared], key) for rows in runs]
