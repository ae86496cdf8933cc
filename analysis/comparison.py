"""One self-contained HTML page that compares any number of methods: a table per dataset whose columns can be sorted."""

from collections.abc import Sequence
from typing import Any

from analysis.compare import Entry, evaluated_on, mismatches, repeated_runs
from analysis.headline import headline
from analysis.page import template
from analysis.predictions import Differences
from analysis.runs import METRICS
from analysis.settings import unknown_stage_ones
from analysis.tables import COMPARED, Block, blocks, bounds_text


def comparison(entries: Sequence[Entry], versus: Differences, baselines: bool = False) -> str:
    """Return the page.

    Args:
        entries: in the order in which they are shown; the first of a dataset is what its others are compared with.
        versus: differences from each dataset's first entry.
        baselines: whether what an entry's runs measured themselves against stands under it.
    """
    tables = blocks(entries, baselines, versus)
    return template("comparison.html.j2").render(
        sections=[_section(table, entries, versus) for table in tables],
        metrics=METRICS,
        compared=COMPARED,
        bounds=bounds_text,
    )


def _section(table: Block, entries: Sequence[Entry], versus: Differences) -> dict[str, Any]:
    mine = [entry for entry in entries if entry.dataset == table.dataset]
    runs = [run for entry in mine for run in entry.runs]
    split = evaluated_on(mine)
    best: dict[str, float | None] = {}
    for key in METRICS:
        found = [mean for row in table.rows if (mean := row.figures.mean[key]) is not None]
        best[key] = None if len(found) < 2 else min(found) if key == "ece" else max(found)
    return {
        "table": table,
        "entries": mine,
        "split": split,
        "best": best,
        "notes": unknown_stage_ones(runs) + repeated_runs(mine) + mismatches(runs),
        "headline": headline(
            mine, split, {entry.title: versus.get((table.dataset, entry.title), {}) for entry in mine}
        ),
    }
