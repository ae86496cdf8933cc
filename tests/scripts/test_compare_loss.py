"""Two runs' losses side by side: what is printed, and with which status it exits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULT = {"top1": 0.5, "balanced_accuracy": 0.5, "many": 0.5, "medium": None, "few": 0.5, "ece": 0.1}
SUMMARY = {
    "method": "erm", "title": "CE", "stage": 1, "from": None, "dataset": "digits", "seed": 0, "epochs": 2,
    "last": RESULT, "selected": None, "selected_on": None, "evaluated_on": "test", "images_per_second": 1.0,
    "seconds": 1.0, "environment": {}, "command": "train/erm.py",
}  # fmt: skip


def make_run(folder: Path, *losses: float) -> None:
    folder.mkdir()
    rows = [json.dumps({"epoch": number, "loss": loss}) for number, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "config.yaml").write_text("loop: {}\n")
    table = {"classes": ["a"], "train_counts": [1], "correct": [1], "total": [1]}
    (folder / "per_class.json").write_text(json.dumps(table))


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "one", 2.0, 1.0)
    make_run(tmp_path / "same", 2.0, 1.0)
    make_run(tmp_path / "near", 2.0, 1.01)
    make_run(tmp_path / "longer", 2.0, 1.0, 0.5)
    make_run(tmp_path / "none")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["one", "same"], 0, "largest difference: 0.00e+00, in epoch 1; tolerance 0"),
        (["one", "near"], 1, "largest difference: 9.90e-03, in epoch 2; tolerance 0"),
        (["near", "one"], 1, "largest difference: 9.90e-03, in epoch 2; tolerance 0"),
        (["one", "near", "--tolerance", "0.01"], 0, "tolerance 0.01"),
        (["one", "longer"], 1, "in one run only: epochs 3"),
        (["one", "absent"], 2, "absent is not a folder; name the folder of a run"),
        (["one", "none"], 2, "one and none have no epoch in common; compare runs that trained"),
        (["one"], 2, "run_b"),
        (["one", "near", "--tolerance", "-1"], 2, '"tolerance": Not of type NonNegativeFloat: -1'),
    ],
)
def test_what_it_says_and_how_it_exits(runs, arguments, status, told):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compare_loss.py", *arguments],
        cwd=runs,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done
    assert told in done.stdout + done.stderr
    if status == 2:
        assert len(done.stderr.strip().splitlines()) == 1
    else:
        assert "    2        1.000000" in done.stdout or "    2        1.010000" in done.stdout
