"""How far second stages fall behind the best classifier that one could have taken: reads finished runs of train/afg.py.

    python scripts/compare_stages.py runs/digits/*-afg-* runs/fashion/*-afg-* --json FILE

Every run measured all of train/features/candidates.py on its test split, which chose nothing. Runs on the same dataset
with the same title are seeds of one experiment. *Best* is the candidate with the largest mean over seeds
of balanced accuracy: it is picked by test, so it flatters itself, and falling a little behind it is no fault. Beside it
stand the classifier that each run selected on val, and AFG; differences are paired, seed by seed, and their standard
error is that over seeds, or with a single seed unknown.
"""

import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from analysis.runs import Run, read_runs
from bench.common import OneLineParser, header, write_results
from shards.errors import UserError, user_errors_exit_2


def figures(run: Run) -> dict[str, float]:
    """Return the balanced test accuracy of every candidate of a run, and of what it selected."""
    rows = {row["name"]: row["balanced_accuracy"] for row in run.baselines}
    if not rows:
        raise UserError(
            f"{run.path} measured no other classifiers; name runs of train afg without --method.baselines false"
        )
    rows["AFG"] = run.last["balanced_accuracy"]
    if run.summary["selected"]:
        rows["selected"] = run.summary["selected"]["balanced_accuracy"]
    return rows


def behind(seeds: list[dict[str, float]], name: str, best: str) -> dict[str, float | None]:
    """Return a classifier's mean, how far it lies behind the best, and the standard error of that."""
    differences = [rows[best] - rows[name] for rows in seeds]
    error = statistics.stdev(differences) / math.sqrt(len(seeds)) if len(seeds) > 1 else None
    return {
        "mean": statistics.mean(rows[name] for rows in seeds),
        "behind_best": statistics.mean(differences),
        "standard_error": error,
    }


def experiment(runs: list[Run]) -> dict[str, Any]:
    """Compare the classifiers of an experiment's seeds."""
    seeds = [figures(run) for run in runs]
    common = set.intersection(*(set(rows) for rows in seeds))
    best = max(common - {"selected"}, key=lambda name: statistics.mean(rows[name] for rows in seeds))
    names = Counter(run.summary["selected"]["name"] for run in runs if run.summary["selected"])
    return {
        "seeds": [run.summary["seed"] for run in runs],
        "commits": sorted({str(run.summary["environment"].get("commit")) for run in runs}),
        "best": best,
        "selected_names": dict(names),
        "rows": {name: behind(seeds, name, best) for name in sorted(common)},
    }


def line(name: str, found: dict[str, Any]) -> str:
    """Return a row of the Markdown table."""

    def shown(key: str) -> str:
        row = found["rows"].get(key)
        if row is None:
            return "none | –"
        error = "?" if row["standard_error"] is None else f"{100 * row['standard_error']:.1f}"
        return f"{100 * row['mean']:.1f} | {100 * row['behind_best']:.1f} ± {error}"

    names = ", ".join(f"{key} {count}×" for key, count in found["selected_names"].items())
    best = f"{found['best']} {100 * found['rows'][found['best']]['mean']:.1f}"
    return f"| {name} | {len(found['seeds'])} | {best} | {names} | {shown('selected')} | {shown('AFG')} |"


def main() -> None:
    """Read the runs and print the table."""
    parser = OneLineParser("scripts/compare_stages.py", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of train/afg.py")
    parser.add_argument("--json", type=Path, help="keep all figures there")
    asked = parser.parse_args()
    with user_errors_exit_2("scripts/compare_stages.py"):
        groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
        for run in read_runs(asked.runs):
            groups[run.dataset, run.title].append(run)
        first = Counter((dataset, title.rpartition(" + ")[0]) for dataset, title in groups)
        found = {}
        for (dataset, title), runs in groups.items():
            stage_one = title.rpartition(" + ")[0]
            # Named by the whole title where a stage one was followed by several kinds of AFG.
            found[f"{dataset}, {stage_one if first[dataset, stage_one] == 1 else title}"] = experiment(runs)
        print(
            "| stage one | seeds | best by test | selected | its accuracy | behind the best | AFG | behind the best |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name, of in found.items():
            print(line(name, of))
        if asked.json:
            write_results(asked.json, header() | {"experiments": found})


if __name__ == "__main__":
    main()
