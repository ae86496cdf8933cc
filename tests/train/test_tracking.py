"""Curves in TensorBoard, W&B, MLflow and Trackio, by stand-ins for their packages."""

import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch.utils
import yaml
from accelerate import PartialState

from train.bbn import BBN
from train.engine.launch import run
from train.engine.tracking import Tracking
from train.erm import ERM

SHORT = ["--optim.epochs", "1", "--input.batch_size", "64", "--input.image_size", "8", "--optim.lr", "0.02"]
SECTIONS = {"optim": {"epochs": 2, "milestones": [0.6, 0.8]}, "model": {"weights": None, "backbone": "resnet32"}}
FLAT = {"optim.epochs": 2, "optim.milestones": "[0.6, 0.8]", "model.weights": "None", "model.backbone": "resnet32"}
ROW = {"epoch": 1, "step": 7, "loss": 0.5, "note": "text", "eval": {"split": "val", "top1": 0.25, "few": None}}
NUMBERS = {"train/epoch": 1, "train/step": 7, "train/loss": 0.5, "val/top1": 0.25}


class Calls(list):
    """Takes note of calls: calls.of("init") is a function that does."""

    def of(self, name, result=None):
        return lambda *arguments, **options: (self.append((name, *arguments, options)), result)[1]


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for all four packages; returns what is called of them."""
    PartialState()  # as there is in a run
    calls = Calls()

    class Writer:
        def __init__(self, folder, **options):
            calls.append(("open", folder, options))

        def add_scalar(self, name, value, global_step):
            calls.append(("scalar", name, value, global_step))

        def flush(self): ...

        def close(self):
            calls.append(("close",))

    tensorboard = ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = Writer
    monkeypatch.setattr(torch.utils, "tensorboard", tensorboard, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    for name in ("wandb", "trackio"):
        package = ModuleType(name)
        package.init = calls.of("init", SimpleNamespace(log=calls.of("log"), finish=calls.of("finish")))
        package.config = SimpleNamespace(update=calls.of("config"))
        monkeypatch.setitem(sys.modules, name, package)
    mlflow = ModuleType("mlflow")
    mlflow.utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100))
    mlflow.search_experiments = lambda filter_string: []
    mlflow.create_experiment = lambda name, **options: f"experiment {name}"
    mlflow.start_run = calls.of("init", SimpleNamespace(info=SimpleNamespace(run_id="the server's")))
    mlflow.log_params, mlflow.log_metrics, mlflow.end_run = calls.of("config"), calls.of("log"), calls.of("finish")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return calls


def track(tracker, folder, step=0, row=ROW):
    tracking = Tracking(tracker)
    tracking.open(folder, step, "birds", SECTIONS)
    tracking.row(row)
    tracking.close()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_before_anything_is_made(workplace, capsys, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if tracker == "tensorboard" else tracker, None)
    with pytest.raises(SystemExit) as ended:
        run(ERM, [*SHORT, "--loop.track", tracker])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"loop.track={tracker} needs the package {tracker} (" in error
    assert error.strip().endswith(f"): pip install {tracker}, or use --loop.track none")
    assert not (workplace / "runs").exists()


def test_nothing_is_tracked_unless_asked(tmp_path, packages):
    track("none", tmp_path)
    assert packages == []
    assert not list(tmp_path.iterdir())


def test_tensorboard_drops_the_steps_after_the_one_where_a_run_is_resumed(tmp_path, packages):
    track("tensorboard", tmp_path, step=7)
    assert packages[0] == ("open", str(tmp_path / "tensorboard"), {"purge_step": 8})
    assert packages[1:-1] == [("scalar", name, value, 7) for name, value in NUMBERS.items()]
    assert packages[-1] == ("close",)


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_a_resumed_run_continues_its_curves(tmp_path, packages, tracker, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = tmp_path / "a run"
    folder.mkdir()
    track(tracker, folder)
    assert [name for name, *_ in packages] == ["init", "config", "log", "finish"]
    first, config, log = packages[0][-1], packages[1], packages[2]
    assert config[1] == FLAT
    assert log == ("log", NUMBERS, {"step": 7})
    packages.clear()
    track(tracker, folder)
    assert [name for name, *_ in packages] == ["init", "log", "finish"]
    again = packages[0][-1]
    if tracker == "mlflow":
        assert (first["run_id"], again["run_id"]) == (None, "the server's")
        assert first["run_name"] == "a run"
        assert first["experiment_id"] == "experiment birds"
    else:
        assert again == first
        assert (first["project"], first["resume"]) == ("birds", "allow")
        token = json.loads((folder / "tracking.json").read_text())["id"]
        name = {"wandb": "a run", "trackio": f"a run-{token}"}[tracker]
        assert (first["name"], first.get("id", token)) == (name, token)
    packages.clear()
    other = tmp_path / "b" / "a run"
    other.mkdir(parents=True)
    track(tracker, other)
    assert packages[0][-1] != again


@pytest.mark.parametrize("content", ["{", "[]", '{"tracker": "mlflow", "id": "x"}', '{"tracker": "wandb"}'])
def test_a_note_of_another_tracker_or_a_damaged_one_is_not_used(tmp_path, packages, content):
    (tmp_path / "tracking.json").write_text(content)
    track("wandb", tmp_path)
    assert packages[1][0] == "config"
    assert packages[0][-1]["id"] not in ("x", "None")


def test_wandb_takes_its_own_project(tmp_path, packages, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    track("wandb", tmp_path)
    assert packages[0][-1]["project"] == "ours"


def test_one_that_does_not_start_is_a_line_and_leaves_no_run(workplace, packages, monkeypatch, capsys):
    def refuse(**_):
        raise ConnectionError("not logged in,\nrun wandb login")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(SystemExit):
        run(ERM, [*SHORT, "--loop.track", "wandb", "--run", "runs/a"])
    error = capsys.readouterr().err
    assert "loop.track=wandb does not start (ConnectionError: not logged in, run wandb login); follow" in error
    assert list((workplace / "runs/a").iterdir()) == []


def test_what_one_that_did_not_start_left_is_in_nobodys_way(workplace, packages, monkeypatch):
    def refuse(dir, **_):
        (Path(dir) / "wandb").mkdir()
        raise ConnectionError("no route to host")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(SystemExit, match="2"):
        run(ERM, [*SHORT, "--loop.track", "wandb", "--run", "runs/a"])
    run(ERM, [*SHORT, "--run", "runs/a"])
    assert (workplace / "runs/a/summary.json").exists()


def test_a_signal_while_one_starts_or_ends_is_no_failure_of_it(workplace, packages, monkeypatch, capsys):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    for package, function, says in (
        ("wandb", "init", "before the first step; give the same command again"),
        ("mlflow", "end_run", "after step 6, with a checkpoint; resume with: "),
    ):
        monkeypatch.setattr(sys.modules[package], function, interrupt)
        with pytest.raises(SystemExit, match="75"):
            run(ERM, [*SHORT, "--loop.track", package])
        assert f"stopped by SIGTERM {says}" in capsys.readouterr().out


def test_one_that_fails_later_costs_its_curve_and_not_the_run(tmp_path, packages, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", fail)
    track("mlflow", tmp_path)
    assert capsys.readouterr().err == (
        "warning: mlflow failed (OSError: no route to host); training continues, and metrics.jsonl has its numbers\n"
    )
    assert packages[-1][0] == "finish"


def test_a_run_shows_its_rows(workplace, packages):
    run(BBN, [*SHORT, "--loop.track", "trackio", "--run", "runs/a"])
    ((_, numbers, options),) = [call for call in packages if call[0] == "log"]
    row = json.loads((workplace / "runs/a/metrics.jsonl").read_text())
    assert options == {"step": row["step"]}
    assert numbers["train/loss"] == row["loss"]
    wanted = {"train/loss", "train/lr", "train/alpha", "train/images_per_second", "train/eval_seconds"}
    assert wanted | {f"val/{name}" for name in ("top1", "many", "medium", "few")} <= set(numbers)
    (config,) = [call for call in packages if call[0] == "config"]
    assert config[1]["optim.epochs"] == 1
    assert yaml.safe_load((workplace / "runs/a/config.yaml").read_text())["loop"]["track"] == "trackio"
    run(BBN, ["--resume", "--run", "runs/a", "--optim.epochs", "2"])
    first, second = [call[-1] for call in packages if call[0] == "init"]
    assert second == first
