"""Tables over runs: each method's mean and spread over its seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from analysis.metrics import percent
from analysis.runs import METRICS, Run


@dataclass(frozen=True)
class Spread:
    """Figures over the runs of an entry.

    Attributes:
        mean: fractions in [0, 1] for each of `METRICS`; None where no run has the figure.
        std: their sample standard deviations (divisor n − 1); None for fewer than two figures.
    """

    mean: dict[str, float | None]
    std: dict[str, float | None]


@dataclass(frozen=True)
class Entry:
    """All runs of one dataset with one title, such as the seeds of a method: one line of a table.

    Attributes:
        dataset: the dataset's name.
        title: the method's.
        runs: at least one.
        last: the figures after each run's last epoch.
        selected: those after the epochs that the runs selected; None where no run selected any.
        baselines: by name, what the runs measured themselves against, last figures only; often none.
    """

    dataset: str
    title: str
    runs: list[Run]
    last: Spread
    selected: Spread | None
    baselines: dict[str, Spread]

    @property
    def seeds(self) -> list[int]:
        """The seed of each run."""
        return [run.summary["seed"] for run in self.runs]


def group_runs(runs: Sequence[Run]) -> list[Entry]:
    """Group runs by (dataset, title); datasets and titles keep the order in which they first appear."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.dataset, {}).setdefault(run.title, []).append(run)
    return [_entry(group) for titles in groups.values() for group in titles.values()]


def _entry(runs: list[Run]) -> Entry:
    selected = [run.summary["selected"] for run in runs if run.summary["selected"]]
    return Entry(
        dataset=runs[0].dataset,
        title=runs[0].title,
        runs=runs,
        last=_spread([run.last for run in runs]),
        selected=_spread(selected) if selected else None,
        baselines=_baselines(runs),
    )


def _baselines(runs: list[Run]) -> dict[str, Spread]:
    found: dict[str, list[dict[str, float | None]]] = {}
    for run in runs:
        for row in run.baselines:
            found.setdefault(row["name"], []).append(row)
    return {name: _spread(rows) for name, rows in found.items()}


def _spread(evaluations: Sequence[dict[str, float | None]]) -> Spread:
    values = {key: [value for row in evaluations if (value := row[key]) is not None] for key in METRICS}
    return Spread(
        mean={key: statistics.fmean(found) if found else None for key, found in values.items()},
        std={key: statistics.stdev(found) if len(found) > 1 else None for key, found in values.items()},
    )


def mismatched_datasets(runs: Sequence[Run]) -> list[str]:
    """Name the datasets whose runs saw different class counts, such as two imbalance factors of one source."""
    seen: dict[str, set[tuple[int, ...]]] = {}
    for run in runs:
        seen.setdefault(run.dataset, set()).add(tuple(run.train_counts_C.tolist()))
    return [dataset for dataset, counts in seen.items() if len(counts) > 1]


def json_row(entry: Entry) -> dict[str, Any]:
    """Return an entry ready for JSON: `mean` and `std` of its last figures, and of its `baselines` by name."""
    baselines = {name: asdict(figures) for name, figures in entry.baselines.items()}
    known = {"dataset": entry.dataset, "title": entry.title, "seeds": entry.seeds}
    return known | asdict(entry.last) | {"baselines": baselines}


def table(entries: Sequence[Entry], baselines: bool = False) -> str:
    """Draw entries as plain text, a block per dataset; one method's line fits 80 columns up to a long title.

    With `baselines`, what an entry's runs measured themselves against stands under it, indented.

    digits: %, last epoch; ± standard deviation over n runs

                overall      many    medium       few  balanced       ECE  n
    CE         84.2±0.5  98.9±0.2  88.1±0.4  61.0±1.2  84.2±0.5   6.1±0.3  3
    BBN            86.0      98.1      89.3      70.4      86.0       5.0  1
    """
    blocks = []
    for dataset in dict.fromkeys(entry.dataset for entry in entries):
        mine = [entry for entry in entries if entry.dataset == dataset]
        spread = any(len(entry.runs) > 1 for entry in mine)
        rows: list[tuple[str, Spread, int]] = []
        for entry in mine:
            rows.append((entry.title, entry.last, len(entry.runs)))
            if baselines:
                rows += [(f"  {name}", figures, len(entry.runs)) for name, figures in entry.baselines.items()]
        columns = [["", *(title for title, _, _ in rows)]]
        for key, heading in METRICS.items():
            spreads = ["" if figures.std[key] is None else f"±{percent(figures.std[key])}" for _, figures, _ in rows]
            width = max(map(len, spreads))
            means = [percent(figures.mean[key]) for _, figures, _ in rows]
            columns.append([heading, *(mean + s.ljust(width) for mean, s in zip(means, spreads, strict=True))])
        columns.append(["n", *(str(n) for _, _, n in rows)])

        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()
            for cells in zip(*columns, strict=True)
        ]
        note = "; ± standard deviation over n runs" if spread else ""
        blocks.append("\n".join([f"{dataset}: %, last epoch{note}", "", *lines]))
    return "\n\n".join(blocks)
