"""How far second stages fall behind the best candidate."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import compare_stages
from shards.errors import UserError


def finished(seed, afg, selected, cheaper, dearer, name="cheaper"):
    rows = [{"name": "cheaper", "balanced_accuracy": cheaper}, {"name": "dearer", "balanced_accuracy": dearer}]
    chosen = None if selected is None else {"name": name, "balanced_accuracy": selected}
    summary = {"seed": seed, "selected": chosen, "environment": {"commit": "abc"}}
    return SimpleNamespace(
        path=Path("runs/a"),
        dataset="digits",
        title="CE + AFG",
        baselines=rows,
        last={"balanced_accuracy": afg},
        summary=summary,
    )


def test_differences_are_paired_and_the_best_is_that_of_the_mean():
    found = compare_stages.experiment([finished(0, 0.7, 0.8, 0.8, 0.9), finished(1, 0.6, 0.7, 0.7, 0.75)])
    assert found["best"] == "dearer"
    assert found["selected_names"] == {"cheaper": 2}
    assert found["rows"]["selected"]["behind_best"] == pytest.approx(0.075)
    assert found["rows"]["selected"]["standard_error"] == pytest.approx(0.025)  # of 0.1 and 0.05
    assert found["rows"]["dearer"]["behind_best"] == 0


def test_one_seed_has_no_error_and_a_run_may_select_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compare_stages, "read_runs", lambda _: [finished(0, 0.7, None, 0.6, 0.65)])
    monkeypatch.setattr(sys, "argv", ["compare_stages.py", "runs/a", "--json", str(tmp_path / "a.json")])
    compare_stages.main()
    assert "| digits, CE | 1 | AFG 70.0 |  | none | – | 70.0 | 0.0 ± ? |" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["experiments"]["digits, CE"]["best"] == "AFG"


def test_another_afg_is_another_experiment(monkeypatch, capsys):
    other = finished(1, 0.5, None, 0.6, 0.65)
    other.title = "CE + AFG, adaptive β"
    monkeypatch.setattr(compare_stages, "read_runs", lambda _: [finished(0, 0.7, None, 0.6, 0.65), other])
    monkeypatch.setattr(sys, "argv", ["compare_stages.py", "runs/a"])
    compare_stages.main()
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2  # a head of two lines


def test_a_run_without_other_classifiers_is_refused():
    run = finished(0, 0.7, None, 0.6, 0.65)
    run.baselines = []
    with pytest.raises(UserError, match=r"--method\.baselines false"):
        compare_stages.figures(run)
