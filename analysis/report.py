"""One self-contained HTML page about runs: a section per dataset, its first entry the baseline.

An entry is all runs of one experiment; whatever the page shows of several seeds is their mean, with its spread.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis import confusion, gallery, inside, mistakes
from analysis.compare import Entry, Spread, evaluated_on, group_runs, mismatches, repeated_runs
from analysis.comparison import comparison
from analysis.drawing import inline_svg
from analysis.headline import and_join, best_entry, headline, seeds_text
from analysis.page import MAX_ENTRIES, template, write_file
from analysis.predictions import Answers, Interval, against_first, answers, differences, intervals
from analysis.runs import METRICS, Run
from analysis.settings import unknown_stage_ones
from analysis.tables import COMPARED, bounds_text
from shards.errors import UserError
from shards.groups import FEW_BELOW, GROUPS, MANY_ABOVE, class_groups, imbalance_factor

_CLASSES_TO_A_TABLE = 50  # of thousands, a browser lays out only the tables that are on the screen


def write_report(runs: Sequence[Run], out: Path | None = None) -> Path:
    """Write the page and return where it lies.

    Args:
        runs: at least one. The experiment of a dataset's first run of stage one is what the others are compared with.
        out: the file; default `report.html` in the folder of a single run, or in the folder that holds
            all of several runs.

    Raises:
        UserError: `out` cannot be written, or the runs do not fit on one page (see `render`).
    """
    if out is None:
        folders = [run.path.resolve() for run in runs]
        out = Path(os.path.commonpath([f if len(runs) == 1 else f.parent for f in folders])) / "report.html"
    return write_file(out, render(runs).encode("utf-8", "backslashreplace"))


def render(runs: Sequence[Run]) -> str:
    """Return the page; of more methods on a dataset than there are colours, the one that compares them in a table.

    Raises:
        UserError: runs of one dataset with different classes.
    """
    entries = group_runs(runs)
    datasets = Counter(entry.dataset for entry in entries)
    if max(datasets.values()) > MAX_ENTRIES:
        return comparison(entries, differences(entries)[0])
    sections = [_section([entry for entry in entries if entry.dataset == dataset]) for dataset in datasets]
    return template("report.html.j2").render(
        sections=sections,
        metrics=METRICS,
        groups=GROUPS,
        many_above=MANY_ABOVE,
        few_below=FEW_BELOW,
        compared=COMPARED,
        bounds=bounds_text,
    )


def _section(entries: list[Entry]) -> dict[str, Any]:
    """Gather what the template shows of one dataset's entries."""
    runs = [run for entry in entries for run in entry.runs]
    first = runs[0]
    for run in runs:
        if run.classes != first.classes:
            raise UserError(
                f"{run.path} and {first.path} both say {first.dataset} but differ in their classes;"
                " report them one at a time"
            )
    counts_C = first.train_counts_C
    groups_C = class_groups(counts_C)
    recalls_C = [gallery.recall(entry) for entry in entries]
    answered = {entry.title: answers(entry) for entry in entries}
    versus = against_first(entries, answered)
    split = evaluated_on(entries)
    views = [_view(entry, f"entry{i}") for i, entry in enumerate(entries)]
    return {
        "dataset": first.dataset,
        "heading": _heading([entry.title for entry in entries], first.dataset),
        "evaluated_on": split,
        "headline": headline(entries, split, versus),
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
        "class_tables": _class_tables(first, recalls_C),
        "count_curve": _inline(gallery.class_counts(entries)),
        "group_bars": _inline(gallery.groups(entries)),
        "by_size": _inline(gallery.class_size(entries)),
        "curves": _curves(entries),
        "sure": _sure(entries, answered, versus),
        "compared": bool(versus),
        "reliability": _drawn(gallery.reliability_of(list(answered.values()))),
        **_confusion(entries, answered),
        "mistakes": _mistakes(best_entry(entries), answered[best_entry(entries).title]),
        "norms": _norms(entries),
        "weight_norms": _drawn(gallery.weight_norms(entries)),
        "compactness": _drawn(gallery.compactness(entries)),
        "beta": _drawn(gallery.beta(entries)),
        "sample": _sample(entries),
    }


def _heading(titles: list[str], dataset: str) -> str:
    """Say what is compared with what; titles may hold commas, so more than two are counted and not listed."""
    if len(titles) > 2:
        return f"{len(titles)} methods on {dataset}, compared with {titles[0]}"
    return f"{' compared with '.join(reversed(titles))} on {dataset}"


def _inline(figure: Figure) -> Markup:
    return Markup(inline_svg(figure))


def _drawn(figure: Figure | None) -> Markup | None:
    return None if figure is None else _inline(figure)


def _sure(
    entries: list[Entry], answered: dict[str, Answers | None], versus: dict[str, dict[str, Interval]]
) -> list[tuple[int, str, dict[str, Interval], dict[str, Interval]]]:
    """Return (number, title, intervals of its figures, of its differences from the first) of entries with answers."""
    return [
        (i, entry.title, intervals(of.correct_N, of.labels, entry.runs[0].train_counts_C), versus.get(entry.title, {}))
        for i, entry in enumerate(entries)
        if (of := answered[entry.title]) is not None and len(of.labels)
    ]


def _confusion(entries: list[Entry], answered: dict[str, Answers | None]) -> dict[str, Any]:
    """Gather which classes the first and the best entry take for which: a matrix of few classes, pairs of many."""
    best = best_entry(entries)
    chosen = [entries[0]] if best is entries[0] else [entries[0], best]
    found = [of for entry in chosen if (of := answered[entry.title]) is not None and len(of.labels)]
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
        "chosen_weights": all(summary.get("from_weights") == "selected" for summary in summaries),
        "seeds": seeds_text(entry),
        "last": entry.last,
        "baselines": entry.baselines,
        "comparable": all(entry.measured(name) == len(entry.replicates) for name in entry.baselines),
        "chosen": all(summary["baselines"].get("selected_on") for summary in summaries if "baselines" in summary),
        "best": _best([entry.last, *entry.baselines.values()]),
        "epochs": _range([summary["epochs"] for summary in summaries], "–"),
        "selected": entry.selected,
        "selected_on": and_join(sorted({str(summary["selected_on"]) for summary in selected})),
        "selected_names": and_join(
            sorted({str(of["selected"]["name"]) for of in selected if of["selected"].get("name")})
        ),
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
    runs = [run for entry in entries for run in entry.runs]
    notes = [f"{note}." for note in unknown_stage_ones(runs) + repeated_runs(entries)]
    notes += [
        f"{note[0].upper()}{note[1:]}, so their figures are not directly comparable." for note in mismatches(runs)
    ]
    if len({tuple(run.train_counts_C) for run in runs}) > 1:
        notes.append(f"The class counts shown are those of {runs[0].name}.")
    for entry in entries:
        for run in entry.runs:
            bad = sum(not np.isfinite(loss) for loss in gallery.values(run.epochs, "loss"))
            if bad:
                label = entry.title if len(entry.runs) == 1 else f"{entry.title} ({run.name})"
                notes.append(f"{label}: the loss was not finite in {bad} of {len(run.epochs)} epochs.")
    return notes


def _class_tables(run: Run, recalls_C: list[NDArray[np.float64]]) -> list[list[tuple[str, int, list[float | None]]]]:
    """Return tables of (class name, n_j, each entry's accuracy), the largest class first."""
    rows = [
        (
            run.classes[j],
            int(run.train_counts_C[j]),
            [None if np.isnan(recall_C[j]) else float(recall_C[j]) for recall_C in recalls_C],
        )
        for j in np.argsort(-run.train_counts_C, kind="stable")
    ]
    return [rows[i : i + _CLASSES_TO_A_TABLE] for i in range(0, len(rows), _CLASSES_TO_A_TABLE)]


def _mistakes(entry: Entry, answered: Answers | None) -> dict[str, Any] | None:
    """Gather pictures of an entry's worst mistakes; None without answers or the dataset."""
    if answered is None or not len(answered.labels):
        return None
    run = entry.runs[0]
    group, worst = mistakes.worst_mistakes(answered, run.train_counts_C)
    split = mistakes.reachable_split(run, answered) if worst else None
    if split is None:
        return None
    pictures = [(mistakes.thumbnail(split, one.image), one) for one in worst]
    shown = [
        (uri, run.classes[one.true], run.classes[one.predicted], one.confidence, one.wrong)
        for uri, one in pictures
        if uri is not None
    ]
    return {"group": group, "title": entry.title, "runs": len(answered.runs), "shown": shown} if shown else None


def _norm(run: Run) -> NDArray[np.float64] | None:
    norms_C = inside.diagnostic(run, "norms")
    return None if norms_C is None else np.array([np.nanmean(norms_C), np.nanstd(norms_C)])


def _norms(entries: list[Entry]) -> list[tuple[int, str, float, float]]:
    """Return (number, title, mean, standard deviation) of the lengths of each entry's rows of weights."""
    found = []
    for i, entry in enumerate(entries):
        mean_and_std = entry.over_seeds(_norm)
        if mean_and_std is not None:
            found.append((i, entry.title, float(mean_and_std[0]), float(mean_and_std[1])))
    return found


def _sample(entries: list[Entry]) -> dict[str, Any] | None:
    """Draw real and generated features, and say which colour is which class."""
    if (chosen := gallery.sampled(entries)) is None:
        return None
    entry, sample = chosen
    run = entry.runs[0]
    legend = [(run.classes[label], int(run.train_counts_C[label])) for label in sample.classes]
    return {"title": entry.title, "picture": _inline(inside.embedding(sample)), "legend": legend}


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
