"""RESULTS.md says what the kept results say, and README's figures are its."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "analysis/results"
LINES = (RESULTS / "RESULTS.md").read_text(encoding="utf-8").splitlines()
CIFAR = json.loads((RESULTS / "results_cifar10.json").read_text(encoding="utf-8"))["rows"]
OTHERS = [
    {row["title"]: row for row in json.loads((RESULTS / f"methods_{name}.json").read_text(encoding="utf-8"))}
    for name in ("fashion", "digits")
]


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def test_every_row_is_in_the_table():
    assert [name for name in CIFAR if f"| {name} |" in "\n".join(LINES)] == list(CIFAR)


@pytest.mark.parametrize("name", CIFAR)
def test_a_row_has_the_kept_figures(name):
    (run,) = CIFAR[name]["runs"].values()
    last, best, paper = run["last"], run["best_by_test"], CIFAR[name]["paper"]
    cells = [percent(last["top1"]), percent(last["medium"]), percent(last["ece"])]
    cells.append(f"{percent(best['top1'])} ({best['epoch']})" if best else "–")
    cells.append(f"{paper:.1f}" if paper else "–")
    for kept in OTHERS:
        row = kept[name]
        cells.append(f"{percent(row['mean']['balanced_accuracy'])} ± {percent(row['std']['balanced_accuracy'])}")
    assert f"| {name} | {' | '.join(cells)} |" in LINES


@pytest.mark.parametrize("name", ["CE", "LDAM-DRW", "BBN", "CE + AFG"])
def test_readme_has_its_first_rows(name):
    (run,) = CIFAR[name]["runs"].values()
    assert f"{name} {percent(run['last']['top1'])}" in (ROOT / "README.md").read_text(encoding="utf-8")
