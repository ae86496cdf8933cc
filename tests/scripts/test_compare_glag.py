"""The comparison: which runs it starts, and that it resumes where it was cut off. No network is trained here."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import compare_glag
from shards.build import build
from shards.errors import UserError


@pytest.fixture
def launched(monkeypatch):
    """Stand in for processes: each leaves a finished run, or what `fails` says of it. The commands, as they come."""
    commands, fails, really_run = [], {}, subprocess.run

    def run(command, stdout=None, **options):
        if "--run" not in command:
            return really_run(command, stdout=stdout, **options)
        commands.append(command)
        folder = Path(command[command.index("--run") + 1])
        if folder.name in fails:
            stdout.write(fails[folder.name])
            return SimpleNamespace(returncode=1)
        folder.mkdir(exist_ok=True)
        (folder / "summary.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return SimpleNamespace(commands=commands, fails=fails)


def finish(runs: Path, *options: str) -> list[Path]:
    dataset = SimpleNamespace(place="data/x", train_counts=np.array([504, 70, 9]))
    return compare_glag.finish(dataset, runs, "gradual", 2, list(options), threads=1)


def test_one_network_and_all_that_is_trained_on_its_features(tmp_path, launched):
    runs = finish(tmp_path, "--optim.epochs", "20")
    assert [run.name for run in runs] == [
        f"gradual-2{end}" for end in ("", "-afg", "-adaptive", "-fixed", "-undistilled", "-fifth")
    ]
    first, *seconds = (" ".join(map(str, command[1:])) for command in launched.commands)
    assert "train/erm.py" in first
    assert first.endswith(
        "--method.objective gradual --optim.schedule cosine --optim.weight_decay 5e-4 --optim.epochs 20"
    )
    assert all("train/afg.py" in second and f"--from {runs[0]}" in second for second in seconds)
    assert all("--data data/x --loop.seed 2" in command for command in (first, *seconds))
    assert ["--method.baselines false" in second for second in seconds] == [False, True, True, True, True]
    assert "--method.head_above 100" in seconds[-1]


def test_what_is_finished_is_not_begun_again(tmp_path, launched):
    finish(tmp_path)
    launched.commands.clear()
    finish(tmp_path)
    assert launched.commands == []


def test_what_was_cut_off_goes_on(tmp_path, launched):
    for name in ("gradual-2", "gradual-2-afg"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
    finish(tmp_path)
    assert ["--resume" in command for command in launched.commands] == [True, False, False, False, False, False]
    assert not (tmp_path / "gradual-2-afg/config.yaml").exists()  # started over


def test_a_run_that_fails_is_named_with_what_it_said(tmp_path, launched):
    launched.fails["gradual-2-adaptive"] = "the disk is full"
    with pytest.raises(
        UserError, match=r"train/afg.py ended with 1; .*gradual-2-adaptive.log says why: the disk is full"
    ):
        finish(tmp_path)


def fails_with(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["compare_glag.py", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        compare_glag.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("scripts/compare_glag.py: error: ")
    assert error.count("\n") == 1
    return error


def test_wrong_arguments_are_named(tmp_path, monkeypatch, capsys, launched):
    monkeypatch.chdir(tmp_path)
    assert "no/such" in fails_with(monkeypatch, capsys, "no/such", "runs")
    build("digits", out=tmp_path / "all", val_fraction=0.0, workers=1)
    assert "has no val split to choose β on" in fails_with(monkeypatch, capsys, "all", "runs")
    assert "at least 1" in fails_with(monkeypatch, capsys, "all", "runs", "--seeds", "0")
    assert "at least 1" in fails_with(monkeypatch, capsys, "all", "runs", "--jobs", "0", "--", "--optim.epochs", "3")
    assert launched.commands == []
    assert not (tmp_path / "runs").exists()


def test_every_seed_of_both_objectives_then_tables(tmp_path, digits, monkeypatch, launched):
    compared = []
    monkeypatch.setattr(compare_glag, "read_runs", lambda runs: compared.extend(runs) or [])
    arguments = [str(digits.root), str(tmp_path / "runs"), "--seeds", "2", "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", ["compare_glag.py", *arguments])
    compare_glag.main()
    assert [run.name for run in compared if run.name.count("-") == 1] == ["ce-0", "gradual-0", "ce-1", "gradual-1"]
    assert len(compared) == 24 == len(launched.commands)
    assert (tmp_path / "runs/table.txt").exists()
    assert json.loads((tmp_path / "runs/table.json").read_text())["rows"] == []
