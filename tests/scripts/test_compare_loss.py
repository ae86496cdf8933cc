"""Two runs' losses side by side: what is printed, and with which status it exits."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compare_loss(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "compare_loss.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})


@pytest.fixture
def two_runs(tmp_path) -> tuple[Path, Path]:
    for name, losses in {"a": (2.0, 1.0), "b": (2.0, 1.02)}.items():
        (tmp_path / name).mkdir()
        text = "".join(f'{{"epoch": {epoch}, "loss": {loss}}}\n' for epoch, loss in enumerate(losses, start=1))
        (tmp_path / name / "metrics.jsonl").write_text(text)
    return tmp_path / "a", tmp_path / "b"


def test_compare_loss_says_where_runs_part(two_runs):
    apart = compare_loss(*two_runs)
    assert apart.returncode == 1
    assert apart.stdout.splitlines()[1:] == [
        "    1    2.000000    2.000000   0.00e+00",
        "    2    1.000000    1.020000   1.96e-02  <--",
    ]
    near = compare_loss(*two_runs, "--tolerance", "0.02")
    assert near.returncode == 0
    assert near.stdout.endswith("alike: no loss differs by more than 0.02 of itself\n")


def test_compare_loss_counts_a_lacking_epoch(two_runs):
    path = two_runs[1] / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0])
    shorter = compare_loss(two_runs[0], path)
    assert shorter.returncode == 1
    assert "only one of them has the epochs 2" in shorter.stdout


def test_what_a_kill_left_of_a_line_is_no_epoch_and_nan_is_apart(two_runs):
    path = two_runs[1] / "metrics.jsonl"
    path.write_text('{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "loss": NaN}\n{"epoch": 3, "lo')
    apart = compare_loss(*two_runs)
    assert apart.returncode == 1
    assert apart.stdout.splitlines()[-1].endswith("  <--")


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("{\n", "holds no losses by epoch")])
def test_compare_loss_tells_mistakes(two_runs, content, message):
    path = two_runs[1] / "metrics.jsonl"
    path.unlink()
    if content:
        path.write_text(content)
    wrong = compare_loss(*two_runs)
    assert wrong.returncode == 2
    assert message in wrong.stderr
    assert wrong.stderr.count("\n") == 1
