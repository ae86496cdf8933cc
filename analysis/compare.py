"""Runs by experiment: each one's mean and spread over its seeds."""

import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.runs import METRICS, Run
from analysis.settings import Experiment, experiment
from analysis.titles import distinct_titles


@dataclass(frozen=True)
class Spread:
    """Figures over the seeds of an entry.

    Attributes:
        mean: fractions in [0, 1] for each of `METRICS`; None where no run has the figure.
        std: their sample standard deviations (divisor n − 1); None for fewer than two seeds. Runs that repeat a seed
            count as one, with their mean.
    """

    mean: dict[str, float | None]
    std: dict[str, float | None]


@dataclass(frozen=True)
class Entry:
    """The runs of one experiment, that is its seeds: one line of a table.

    Attributes:
        dataset: the dataset's name.
        title: the method's, with what sets it apart from the other experiments compared.
        replicates: at least one run, by what distinguishes seeds: of a second stage, its own seed and stage one's.
        last: the figures after each run's last epoch.
        selected: those after the epochs that the runs selected; None where no run selected any.
        baselines: by name, what the runs measured themselves against, last figures only; often none.
    """

    dataset: str
    title: str
    replicates: dict[Hashable, list[Run]]
    last: Spread
    selected: Spread | None
    baselines: dict[str, Spread]

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for runs in self.replicates.values() for run in runs]

    @property
    def seeds(self) -> list[int]:
        """The seed of each run."""
        return [run.summary["seed"] for run in self.runs]

    def measured(self, baseline: str) -> int:
        """Return how many seeds measured themselves against this."""
        return sum(
            any(row["name"] == baseline for run in runs for row in run.baselines) for runs in self.replicates.values()
        )

    def over_seeds(self, of: Callable[[Run], NDArray[Any] | None]) -> NDArray[np.float64] | None:
        """Return the mean over seeds of an array of each run; None unless all runs have it, of one shape."""
        means = []
        for runs in self.replicates.values():
            found = [array for run in runs if (array := of(run)) is not None]
            if len(found) < len(runs) or len({array.shape for array in found}) > 1:
                return None
            means.append(np.mean(found, axis=0, dtype=np.float64))
        return np.mean(means, axis=0) if len({mean.shape for mean in means}) == 1 else None


def group_runs(runs: Sequence[Run]) -> list[Entry]:
    """Group runs by experiment (see `analysis.settings`), in the order in which datasets, then titles, first appear.

    Of a dataset stage one comes before stage two: the first entry is what the others are compared with, and a second
    stage that a shell happens to list first is no baseline.
    """
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    first_seen = list(dict.fromkeys((run.dataset, run.title) for run in runs))

    def place(run: Run) -> tuple[int, int, int]:
        return datasets.index(run.dataset), run.summary["stage"], first_seen.index((run.dataset, run.title))

    groups: dict[Hashable, list[tuple[Experiment, Run]]] = {}
    for run in sorted(runs, key=place):
        found = experiment(run)
        groups.setdefault(found.key, []).append((found, run))
    titles = distinct_titles([group[0][0] for group in groups.values()])
    return [_entry(title, group) for title, group in zip(titles, groups.values(), strict=True)]


def _entry(title: str, group: list[tuple[Experiment, Run]]) -> Entry:
    replicates: dict[Hashable, list[Run]] = {}
    several = len({found.images for found, _ in group} - {None}) > 1
    for found, run in group:
        # Draws of the data are replicates, too. Older runs do not say which one they have.
        replicates.setdefault((found.replicate, found.images if several else None), []).append(run)
    last = [[run.last for run in runs] for runs in replicates.values()]
    selected = [[run.summary["selected"] for run in runs if run.summary["selected"]] for runs in replicates.values()]
    names = dict.fromkeys(row["name"] for _, run in group for row in run.baselines)
    return Entry(
        dataset=group[0][1].dataset,
        title=title,
        replicates=replicates,
        last=_spread(last),
        selected=_spread(selected) if any(selected) else None,
        baselines={
            name: _spread(
                [[row for run in runs for row in run.baselines if row["name"] == name] for runs in replicates.values()]
            )
            for name in names
        },
    )


def _spread(evaluations: Sequence[Sequence[dict[str, float | None]]]) -> Spread:
    """Take each figure's mean over the runs of a seed, and over seeds their mean and standard deviation."""
    means: dict[str, list[float]] = {key: [] for key in METRICS}
    for rows in evaluations:
        for key, found in means.items():
            values = [value for row in rows if (value := row[key]) is not None]
            found += [statistics.fmean(values)] if values else []
    return Spread(
        mean={key: statistics.fmean(found) if found else None for key, found in means.items()},
        std={key: statistics.stdev(found) if len(found) > 1 else None for key, found in means.items()},
    )


def repeated_runs(entries: Sequence[Entry]) -> list[str]:
    """Say which seeds were run more than once: these runs show no spread over seeds."""
    notes = []
    for entry in entries:
        for runs in entry.replicates.values():
            if len(runs) > 1:
                times = {2: "twice"}.get(len(runs), f"{len(runs)} times")
                names = ", ".join(run.name for run in runs)
                notes.append(
                    f"{entry.title} on {entry.dataset}: seed {runs[0].summary['seed']} was run {times} ({names});"
                    " their mean counts as one seed"
                )
    return notes


def mismatches(runs: Sequence[Run]) -> list[str]:
    """Say where runs on one dataset, by its name, differ in the data: their figures are not directly comparable."""
    notes = []
    for dataset in dict.fromkeys(run.dataset for run in runs):
        mine = [run for run in runs if run.dataset == dataset]
        splits = sorted({str(run.summary["evaluated_on"]) for run in mine})
        differing: dict[str, set[Any]] = {
            "were trained on different class counts": {tuple(run.train_counts_C) for run in mine},
            # Shards count: what a run says of its images is of their files.
            "were trained on different images, or on the same in other shards": {experiment(run).images for run in mine}
            - {None},
            "have different classes, or the same ones in another order": {tuple(run.classes) for run in mine},
            f"were evaluated on {' and '.join(splits)}": set(splits),
        }
        if len(splits) == 1:
            differing["were evaluated on different numbers of images"] = {tuple(run.total_C) for run in mine}
        notes += [f"the runs on {dataset} {how}" for how, found in differing.items() if len(found) > 1]
    return notes


def evaluated_on(entries: Sequence[Entry]) -> str:
    """Return the split that figures are of: "test", or "test and val" where entries differ."""
    return " and ".join(sorted({str(entry.runs[0].summary["evaluated_on"]) for entry in entries}))
