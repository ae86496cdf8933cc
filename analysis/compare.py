"""Tables over runs: each method's mean and spread over its seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.runs import METRICS, Run


@dataclass(frozen=True)
class Row:
    """All runs of one method on one dataset, after their last epochs.

    Attributes:
        dataset: the dataset's name.
        title: the method's.
        seeds: the seed of each run.
        mean: fractions in [0, 1] for each of `METRICS`; None where no run has the figure.
        std: their standard deviations over the runs (divisor n − 1); None for fewer than two runs.
    """

    dataset: str
    title: str
    seeds: list[int]
    mean: dict[str, float | None]
    std: dict[str, float | None]


def compare_runs(runs: Sequence[Run]) -> list[Row]:
    """Group runs by (dataset, title); datasets and titles keep the order in which they first appear."""
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.dataset, {}).setdefault(run.title, []).append(run)
    return [_row(group) for titles in groups.values() for group in titles.values()]


def _row(runs: list[Run]) -> Row:
    values = {key: [value for run in runs if (value := run.last[key]) is not None] for key in METRICS}
    return Row(
        dataset=runs[0].dataset,
        title=runs[0].title,
        seeds=[run.summary["seed"] for run in runs],
        mean={key: statistics.fmean(found) if found else None for key, found in values.items()},
        std={key: statistics.stdev(found) if len(found) > 1 else None for key, found in values.items()},
    )


def mismatched_datasets(runs: Sequence[Run]) -> list[str]:
    """Name the datasets whose runs saw different class counts, such as two imbalance factors of one source."""
    seen: dict[str, set[tuple[int, ...]]] = {}
    for run in runs:
        seen.setdefault(run.dataset, set()).add(tuple(run.train_counts_C.tolist()))
    return [dataset for dataset, counts in seen.items() if len(counts) > 1]


def percent(fraction: float | None) -> str:
    """Write a fraction as a percentage with one decimal; an en dash for None."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def table(rows: Sequence[Row]) -> str:
    """Draw rows as plain text, a block per dataset; one method's line fits 80 columns up to a long title.

    digits: %, last epoch; ± standard deviation over n runs

                overall      many    medium       few  balanced       ECE  n
    CE         84.2±0.5  98.9±0.2  88.1±0.4  61.0±1.2  84.2±0.5   6.1±0.3  3
    BBN            86.0      98.1      89.3      70.4      86.0       5.0  1
    """
    blocks = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        mine = [row for row in rows if row.dataset == dataset]
        spread = any(len(row.seeds) > 1 for row in mine)
        columns = [["", *(row.title for row in mine)]]
        for key, heading in METRICS.items():
            spreads = ["" if row.std[key] is None else f"±{percent(row.std[key])}" for row in mine]
            width = max(map(len, spreads))
            cells = [percent(row.mean[key]) + s.ljust(width) for row, s in zip(mine, spreads, strict=True)]
            columns.append([heading, *cells])
        columns.append(["n", *(str(len(row.seeds)) for row in mine)])

        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip()
            for cells in zip(*columns, strict=True)
        ]
        note = "; ± standard deviation over n runs" if spread else ""
        blocks.append("\n".join([f"{dataset}: %, last epoch{note}", "", *lines]))
    return "\n\n".join(blocks)
