"""One self-contained HTML page about runs: a section per dataset, its first run the baseline."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from analysis import figures
from analysis.compare import Row, compare_runs, mismatched_datasets, percent
from analysis.runs import METRICS, Run
from shards.errors import UserError
from shards.groups import FEW_BELOW, GROUPS, MANY_ABOVE, class_groups, imbalance_factor

_PLACES = {"many": "head", "medium": "middle", "few": "tail"}
_CLASS_TABLE_UP_TO = 100


def write_report(runs: Sequence[Run], out: Path | None = None) -> Path:
    """Write the page and return where it lies.

    Args:
        runs: at least one. The first of a dataset's runs is what the others are compared with.
        out: the file; default `report.html` in the folder of a single run, or in the folder that holds
            all of several runs.

    Raises:
        UserError: `out` cannot be written, or the runs do not fit on one page (see `render`).
    """
    if out is None:
        folders = [run.path.resolve() for run in runs]
        out = Path(os.path.commonpath([f if len(runs) == 1 else f.parent for f in folders])) / "report.html"
    page = render(runs)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); name a file with --out") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return out


def render(runs: Sequence[Run]) -> str:
    """Return the page.

    Raises:
        UserError: more runs of one dataset than there are colours, or runs of one dataset with different
            classes.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": _points, "duration": _duration}
    datasets = dict.fromkeys(run.dataset for run in runs)
    sections = [_section([run for run in runs if run.dataset == dataset]) for dataset in datasets]
    page = environment.get_template("report.html.j2")
    return page.render(
        sections=sections,
        palette=figures.PALETTE,
        metrics=METRICS,
        groups=GROUPS,
        many_above=MANY_ABOVE,
        few_below=FEW_BELOW,
    )


def _section(runs: list[Run]) -> dict[str, Any]:
    """Gather what the template shows of one dataset's runs."""
    baseline = runs[0]
    if len(runs) > figures.MAX_RUNS:
        raise UserError(
            f"{len(runs)} runs on {baseline.dataset} are too many for one report; name at most"
            f" {figures.MAX_RUNS}, or tabulate all with: python -m analysis compare"
        )
    for run in runs:
        if run.classes != baseline.classes:
            raise UserError(
                f"{run.path} and {baseline.path} both say {baseline.dataset} but differ in their classes;"
                " report them one at a time"
            )
    counts_C = baseline.train_counts_C
    groups_C = class_groups(counts_C)
    rows = compare_runs(runs)
    return {
        "dataset": baseline.dataset,
        "titles": list(dict.fromkeys(run.title for run in runs)),
        "headline": _headline(rows, baseline.summary["evaluated_on"]),
        "rows": rows,
        "runs": [
            {"run": run, "label": label, "colour": f"run{i}", "summary": run.summary}
            for i, (run, label) in enumerate(zip(runs, _labels(runs), strict=True))
        ],
        "stages": sorted({run.summary["stage"] for run in runs}),
        "best": _best(runs),
        "classes": len(counts_C),
        "images": int(counts_C.sum()),
        "counts": counts_C,
        "imbalance_factor": imbalance_factor(counts_C),
        "group_sizes": {group: int((groups_C == group).sum()) for group in GROUPS},
        "notes": _notes(runs),
        "class_rows": _class_rows(runs) if len(counts_C) <= _CLASS_TABLE_UP_TO else [],
        "count_curve": Markup(figures.class_count_curve(counts_C)),
        "group_bars": Markup(figures.group_bars([run.last for run in runs])),
        "by_size": Markup(
            figures.accuracy_by_class_size([(run.train_counts_C, run.correct_C, run.total_C) for run in runs])
        ),
        "curves": _curves(runs),
    }


def _headline(rows: list[Row], split: str) -> str:
    first, last = rows[0], rows[-1]

    def mean_of(row: Row) -> str:
        return f" (mean of {len(row.seeds)} runs)" if len(row.seeds) > 1 else ""

    if last.mean["top1"] is None or first.mean["top1"] is None:
        return f"No {split} images were evaluated."
    overall = f"{last.title}{mean_of(last)} recognises {percent(last.mean['top1'])} % of the {split} images"
    if last is first:
        parts = [
            f"{percent(value)} % of the {_PLACES[group]} ({group})"
            for group in GROUPS
            if (value := last.mean[group]) is not None
        ]
        return f"{overall}. Averaged over classes, it recognises {_and(parts)}."
    gain = 100 * (last.mean["top1"] - first.mean["top1"])
    than = f"{abs(gain):.1f} points {'more' if gain > 0 else 'less'} than" if abs(gain) >= 0.05 else "level with"
    parts = []
    for group in GROUPS:
        before, after = first.mean[group], last.mean[group]
        if before is None or after is None:
            continue
        change = 100 * (after - before)
        verb = "gained" if change > 0 else "lost"
        change_told = f"{verb} {abs(change):.1f} points" if abs(change) >= 0.05 else "stayed level"
        parts.append(f"the {_PLACES[group]} ({group}) {change_told}")
    return f"{overall}, {than} {first.title}{mean_of(first)}. Averaged over classes, {_and(parts)}."


def _and(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def _labels(runs: list[Run]) -> list[str]:
    """Return the runs' titles; with the seed, and then the folder, where that is needed to tell runs apart."""
    labels = [run.title for run in runs]
    for detail in ("seed {run.summary[seed]}", "{run.name}"):
        labels = [
            f"{label} · {detail.format(run=run)}" if labels.count(label) > 1 else label
            for run, label in zip(runs, labels, strict=True)
        ]
    return labels


def _best(runs: list[Run]) -> dict[str, float | None]:
    """Return each figure's best value over several runs; a single run has none."""
    best: dict[str, float | None] = {}
    for key in METRICS:
        found = [value for run in runs if (value := run.last[key]) is not None]
        best[key] = None if len(runs) < 2 or not found else min(found) if key == "ece" else max(found)
    return best


def _notes(runs: list[Run]) -> list[str]:
    notes = []
    if mismatched_datasets(runs):
        notes.append(
            "These runs were trained on different class counts, so their figures are not directly"
            f" comparable; the class counts shown are those of {runs[0].name}."
        )
    for run, label in zip(runs, _labels(runs), strict=True):
        bad = sum(not np.isfinite(loss) for loss in _values(run.epochs, "loss"))
        if bad:
            notes.append(f"{label}: the loss was not finite in {bad} of {len(run.epochs)} epochs.")
    return notes


def _class_rows(runs: list[Run]) -> list[tuple[str, int, list[float | None]]]:
    """Return (class name, n_j, each run's accuracy), the largest class first."""
    counts_C = runs[0].train_counts_C
    return [
        (
            runs[0].classes[j],
            int(counts_C[j]),
            [float(run.correct_C[j] / run.total_C[j]) if run.total_C[j] else None for run in runs],
        )
        for j in np.argsort(-counts_C, kind="stable")
    ]


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Return one quantity over the epochs; nan where a row lacks it."""
    values = (row.get(key) for row in rows)
    return [float(value) if isinstance(value, int | float) else float("nan") for value in values]


def _curves(runs: list[Run]) -> list[tuple[str, Markup]]:
    """Return (caption, picture) for each quantity that some run logged."""
    evaluated = [[row for row in run.epochs if isinstance(row.get("eval"), dict)] for run in runs]
    splits = sorted({str(row["eval"].get("split", "?")) for rows in evaluated for row in rows})
    on = " and ".join(splits)

    drawn: list[tuple[str, str | None]] = []

    def draw(caption: str, key: str) -> None:
        series = [(_values(run.epochs, "epoch"), _values(run.epochs, key)) for run in runs]
        drawn.append((caption, figures.curve(series, caption.split(" (")[0])))

    def draw_accuracy(caption: str, key: str) -> None:
        series = [(_values(rows, "epoch"), _values([row["eval"] for row in rows], key)) for rows in evaluated]
        drawn.append((caption, figures.curve(series, caption.split(" (")[0], fractions=True)))

    draw("Training loss", "loss")
    draw_accuracy(f"Overall accuracy ({on})", "top1")
    draw_accuracy(f"Tail accuracy ({on}, few)", "few")
    draw("Learning rate", "lr")
    draw("Mixing weight α", "alpha")
    return [(caption, Markup(picture)) for caption, picture in drawn if picture]


def _points(value: float | None, baseline: float | None) -> str:
    """Write a change in percentage points with its sign; empty where there is none to tell."""
    if value is None or baseline is None:
        return ""
    points = round(100 * (value - baseline), 1)
    sign = "+" if points > 0 else "−" if points < 0 else "±"
    return f"{sign}{abs(points):.1f}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
