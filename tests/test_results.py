"""RESULTS.md says what the kept results say, and README's figures are its."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "analysis/results"
LINES = (RESULTS / "RESULTS.md").read_text(encoding="utf-8").splitlines()
CIFAR, HALF = (
    json.loads((RESULTS / f"results_cifar10{name}.json").read_text(encoding="utf-8"))["rows"]
    for name in ("", "_100_epochs")
)
OTHERS = [
    {row["title"]: row for row in json.loads((RESULTS / f"methods_{name}.json").read_text(encoding="utf-8"))}
    for name in ("fashion", "digits")
]


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_every_kept_result_can_be_read(path):
    assert json.loads(path.read_text(encoding="utf-8"))


def test_every_row_is_in_the_table():
    assert CIFAR.keys() <= HALF.keys()
    assert [name for name in HALF if f"| {name} |" in "\n".join(LINES)] == list(HALF)


@pytest.mark.parametrize("name", HALF)
def test_a_row_has_the_kept_figures(name):
    cells = ["–"] * 4
    if name in CIFAR:
        (run,) = CIFAR[name]["runs"].values()
        last, best = run["last"], run["best_by_test"]
        cells = [percent(last["top1"]), percent(last["medium"]), percent(last["ece"])]
        cells.append(f"{percent(best['top1'])} ({best['epoch']})" if best else "–")
    (half,) = HALF[name]["runs"].values()
    paper = HALF[name]["paper"]
    cells += [f"{paper:.1f}" if paper else "–", percent(half["last"]["top1"])]
    for kept in OTHERS:
        row = kept[name]
        cells.append(f"{percent(row['mean']['balanced_accuracy'])} ± {percent(row['std']['balanced_accuracy'])}")
    assert f"| {name} | {' | '.join(cells)} |" in LINES


@pytest.mark.parametrize("name", ["CE", "LDAM-DRW", "BBN", "CE + AFG"])
def test_readme_has_its_first_rows(name):
    (run,) = CIFAR[name]["runs"].values()
    assert f"{name} {percent(run['last']['top1'])}" in (ROOT / "README.md").read_text(encoding="utf-8")
