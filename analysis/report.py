"""One self-contained HTML page about runs: a section per dataset, its first entry the baseline.

An entry is all runs of one experiment; whatever the page shows of several seeds is their mean, with its spread.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis import confusion, gallery
from analysis.compare import Entry, Spread, group_runs, mismatched_datasets, repeated_runs
from analysis.drawing import inline_svg
from analysis.headline import and_join, best_entry, headline, seeds_told
from analysis.page import template, write_file
from analysis.predictions import Answers, Interval, against_first, answers, intervals
from analysis.runs import METRICS, Run
from analysis.tables import COMPARED, bounds_told
from shards.errors import UserError
from shards.groups import FEW_BELOW, GROUPS, MANY_ABOVE, class_groups, imbalance_factor

_CLASS_TABLE_UP_TO = 100


def write_report(runs: Sequence[Run], out: Path | None = None) -> Path:
    """Write the page and return where it lies.

    Args:
        runs: at least one. The experiment of a dataset's first run is what the others are compared with.
        out: the file; default `report.html` in the folder of a single run, or in the folder that holds
            all of several runs.

    Raises:
        UserError: `out` cannot be written, or the runs do not fit on one page (see `render`).
    """
    if out is None:
        folders = [run.path.resolve() for run in runs]
        out = Path(os.path.commonpath([f if len(runs) == 1 else f.parent for f in folders])) / "report.html"
    return write_file(out, render(runs).encode("utf-8"))


def render(runs: Sequence[Run]) -> str:
    """Return the page.

    Raises:
        UserError: more titles on one dataset than there are colours, or runs of one dataset with different
            classes.
    """
    entries = group_runs(runs)
    datasets = dict.fromkeys(entry.dataset for entry in entries)
    sections = [_section([entry for entry in entries if entry.dataset == dataset]) for dataset in datasets]
    return template("report.html.j2").render(
        sections=sections,
        metrics=METRICS,
        groups=GROUPS,
        many_above=MANY_ABOVE,
        few_below=FEW_BELOW,
        compared=COMPARED,
        bounds=bounds_told,
    )


def _section(entries: list[Entry]) -> dict[str, Any]:
    """Gather what the template shows of one dataset's entries."""
    runs = [run for entry in entries for run in entry.runs]
    first = runs[0]
    gallery.check_colours(entries)
    for run in runs:
        if run.classes != first.classes:
            raise UserError(
                f"{run.path} and {first.path} both say {first.dataset} but differ in their classes;"
                " report them one at a time"
            )
    counts_C = first.train_counts_C
    groups_C = class_groups(counts_C)
    recalls_C = [gallery.recall(entry) for entry in entries]
    told = {entry.title: answers(entry) for entry in entries}
    versus = against_first(entries, told)
    views = [_view(entry, f"entry{i}") for i, entry in enumerate(entries)]
    return {
        "dataset": first.dataset,
        "evaluated_on": first.summary["evaluated_on"],
        "headline": headline(entries, first.summary["evaluated_on"], versus),
        "shown": views[entries.index(best_entry(entries))],
        "entries": views,
        "several": any(len(entry.replicates) > 1 for entry in entries),
        "stages": sorted({view["stage"] for view in views}),
        "best": _best([entry.last for entry in entries]),
        "classes": len(counts_C),
        "images": int(counts_C.sum()),
        "counts": counts_C,
        "imbalance_factor": imbalance_factor(counts_C),
        "group_sizes": {group: int((groups_C == group).sum()) for group in GROUPS},
        "notes": _notes(entries),
        "class_rows": _class_rows(first, recalls_C) if len(counts_C) <= _CLASS_TABLE_UP_TO else [],
        "count_curve": _inline(gallery.class_counts(entries)),
        "group_bars": _inline(gallery.groups(entries)),
        "by_size": _inline(gallery.class_size(entries)),
        "curves": _curves(entries),
        "sure": _sure(entries, told, versus),
        "compared": bool(versus),
        "reliability": None if (picture := gallery.reliability(entries)) is None else _inline(picture),
        **_confusion(entries, told),
    }


def _inline(figure: Figure) -> Markup:
    return Markup(inline_svg(figure))


def _sure(
    entries: list[Entry], told: dict[str, Answers | None], versus: dict[str, dict[str, Interval]]
) -> list[tuple[int, str, dict[str, Interval]]]:
    """Return (number, title, intervals) of the differences from the first entry, or of the only entry's own figures."""
    if len(entries) > 1:
        return [(i, entry.title, versus[entry.title]) for i, entry in enumerate(entries) if entry.title in versus]
    of = told[entries[0].title]
    if of is None or not len(of.labels):
        return []
    return [(0, entries[0].title, intervals(of.correct_N, of.labels, entries[0].runs[0].train_counts_C))]


def _confusion(entries: list[Entry], told: dict[str, Answers | None]) -> dict[str, Any]:
    """Gather which classes the first and the best entry take for which: a matrix of few classes, pairs of many."""
    best = best_entry(entries)
    chosen = [entries[0]] if best is entries[0] else [entries[0], best]
    found = [of for entry in chosen if (of := told[entry.title]) is not None and len(of.labels)]
    if len(found) < len(chosen):
        return {"heat": None, "pairs": []}
    shown = [(f"entry{entries.index(entry)}", entry.title) for entry in chosen]
    classes, counts_C = entries[0].runs[0].classes, entries[0].runs[0].train_counts_C
    if len(classes) > confusion.HEAT_MAP_UP_TO:
        pairs = [
            (
                classes[pair.true],
                classes[pair.predicted],
                int(counts_C[pair.true]),
                int(counts_C[pair.predicted]),
                pair.shares,
            )
            for pair in confusion.confused_pairs(found, len(classes))
        ]
        return {"heat": None, "pairs": pairs, "confused": shown}
    order_C = np.argsort(-counts_C, kind="stable")
    matrices = [confusion.confusion_matrix(of, len(classes))[np.ix_(order_C, order_C)] for of in found]
    names = [classes[j] for j in order_C]
    return {"heat": (names, [matrix.tolist() for matrix in matrices]), "pairs": [], "confused": shown}


def _view(entry: Entry, colour: str) -> dict[str, Any]:
    """Gather what the template shows of one entry."""
    summaries = [run.summary for run in entry.runs]
    selected = [summary for summary in summaries if summary["selected"]]
    return {
        "title": entry.title,
        "colour": colour,
        "runs": entry.runs,
        "stage": summaries[0]["stage"],
        "origins": sorted({summary["from"] for summary in summaries if summary["from"]}),
        "seeds": seeds_told(entry),
        "last": entry.last,
        "baselines": entry.baselines,
        "best": _best([entry.last, *entry.baselines.values()]),
        "epochs": _range([summary["epochs"] for summary in summaries], "–"),
        "selected": entry.selected,
        "selected_on": and_join(sorted({str(summary["selected_on"]) for summary in selected})),
        "selected_epochs": _range([summary["selected"]["epoch"] for summary in selected], "–"),
    }


def _range(numbers: list[int], to: str) -> str:
    return to.join(str(number) for number in sorted({min(numbers), max(numbers)})) if numbers else ""


def _best(rows: list[Spread]) -> dict[str, float | None]:
    """Return each figure's best mean over the rows of a table; a single row has none."""
    best: dict[str, float | None] = {}
    for key in METRICS:
        found = [mean for row in rows if (mean := row.mean[key]) is not None]
        best[key] = None if len(rows) < 2 or not found else min(found) if key == "ece" else max(found)
    return best


def _notes(entries: list[Entry]) -> list[str]:
    notes = [f"{note}." for note in repeated_runs(entries)]
    if mismatched_datasets([run for entry in entries for run in entry.runs]):
        notes.append(
            "These runs were trained on different class counts, so their figures are not directly"
            f" comparable; the class counts shown are those of {entries[0].runs[0].name}."
        )
    for entry in entries:
        for run in entry.runs:
            bad = sum(not np.isfinite(loss) for loss in gallery.values(run.epochs, "loss"))
            if bad:
                label = entry.title if len(entry.runs) == 1 else f"{entry.title} ({run.name})"
                notes.append(f"{label}: the loss was not finite in {bad} of {len(run.epochs)} epochs.")
    return notes


def _class_rows(run: Run, recalls_C: list[NDArray[np.float64]]) -> list[tuple[str, int, list[float | None]]]:
    """Return (class name, n_j, each entry's accuracy), the largest class first."""
    return [
        (
            run.classes[j],
            int(run.train_counts_C[j]),
            [None if np.isnan(recall_C[j]) else float(recall_C[j]) for recall_C in recalls_C],
        )
        for j in np.argsort(-run.train_counts_C, kind="stable")
    ]


def _curves(entries: list[Entry]) -> list[tuple[str, Markup]]:
    """Return (caption, picture) for each quantity that some entry logged."""
    logged = [row for entry in entries for run in entry.runs for row in gallery.evaluations(run)]
    on = " and ".join(sorted({str(row.get("split", "?")) for row in logged}))
    drawn = []
    for name, (caption, key, of_evaluation) in gallery.CURVES.items():
        if (figure := gallery.curve(entries, name)) is not None:
            of = f" ({on}{', few' if key == 'few' else ''})" if of_evaluation else ""
            drawn.append((caption + of, _inline(figure)))
    return drawn
