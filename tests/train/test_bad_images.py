"""A dataset that lost images since it was built: the run goes on, and says so."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest

from pipeline.faults import Faults, faults_of
from shards.errors import UserError
from shards.index import open_dataset
from train.engine import evaluation, loop
from train.engine.launch import run
from train.erm import ERM

SHORT = ["--data", "digits", "--run", "run", "--optim.epochs", "2", "--input.batch_size", "64", "--optim.lr", "0.02"]


@pytest.fixture
def damaged(tmp_path, monkeypatch, digits) -> list[tuple[str, int]]:
    """A folder with the digits, of which one image for training and one for testing are zeroed."""
    shutil.copytree(digits.root, tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    bad = [("test", 5), ("train", 3)]
    for name, sample in bad:
        split = open_dataset("digits").splits[name]
        row = split.samples[sample]
        with split.shard_paths[row["shard"]].open("r+b") as shard:
            shard.seek(row["offset"])
            shard.write(bytes(int(row["size"])))
    return bad


@pytest.mark.parametrize("loader", ["dali", "torch", "resident"])
def test_a_run_over_bad_images_counts_them(damaged, loader, tmp_path, capsys):
    run(ERM, [*SHORT, "--input.loader", loader])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [(row["split"], row["sample"]) for row in summary["faults"]] == damaged
    assert all(row["times"] >= 1 and row["shard"].endswith(".tar") and row["reason"] for row in summary["faults"])
    reported = capsys.readouterr()
    assert "2 images did not decode and were replaced or left out" in reported.out
    assert reported.err.count("does not decode") == 2  # the test images are evaluated more than once
    per_class = json.loads((tmp_path / "run" / "per_class.json").read_text())
    assert sum(per_class["total"]) == len(open_dataset("digits").splits["test"]) - 1


def test_what_is_drawn_to_measure_a_run_is_not_counted(damaged, tmp_path):
    run(ERM, SHORT)
    run(ERM, [*SHORT, "--run", "measured", "--loop.budget", "1h"])
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "measured")]
    assert summaries[0]["faults"] == summaries[1]["faults"] != []


def test_the_limit_ends_the_run(damaged, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(ERM, [*SHORT, "--input.fault_limit", "0"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "train/erm.py: error: 1 image does not decode and input.fault_limit is 0: the image at byte"
    )


def test_a_resident_loader_without_room_is_a_users_mistake(damaged, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(ERM, [*SHORT, "--input.loader", "resident", "--input.resident_gb", "0"])
    assert stopped.value.code == 2
    assert "may use 0 GB on cpu" in capsys.readouterr().err


def test_a_resumed_run_remembers_what_was_bad_before(damaged, tmp_path, monkeypatch):
    """No step is left: only the checkpoint knows of the training image."""
    with monkeypatch.context() as patched:
        save = loop.save_checkpoint

        def signalled(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            save(*arguments)

        patched.setattr(loop, "save_checkpoint", signalled)
        with pytest.raises(SystemExit, match="75"):
            run(ERM, [*SHORT, "--optim.epochs", "1"])
    run(ERM, ["--run", "run", "--resume"])
    faults = json.loads((tmp_path / "run" / "summary.json").read_text())["faults"]
    assert [(row["split"], row["sample"]) for row in faults] == damaged
    assert all(row["times"] >= 1 and row["shard"].endswith(".tar") for row in faults)


def test_an_image_that_was_repaired_is_looked_at_again(damaged, digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("train.engine.session.finish", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit, match="75"):
            run(ERM, [*SHORT, "--optim.epochs", "1", "--loop.select", "false"])
    for shard in digits.root.glob("*.tar"):
        shutil.copy(shard, "digits")
    run(ERM, ["--run", "run", "--resume"])
    faults = json.loads((tmp_path / "run" / "summary.json").read_text())["faults"]
    assert [(row["split"], row["sample"]) for row in faults] == [("train", 3)]  # another was shown in its place, once
    per_class = json.loads((tmp_path / "run" / "per_class.json").read_text())
    assert sum(per_class["total"]) == len(digits.splits["test"])


def test_the_limit_is_that_of_all_processes(damaged, monkeypatch):
    """Each meets a few of the images; whether a run goes on does not depend on whether it was stopped."""
    dataset, two = open_dataset("digits"), SimpleNamespace(num_processes=2)
    byte = int(dataset.splits["train"].samples["offset"][3])
    other = {"split": "train", "sample": 3, "shard": "train-000000.tar", "byte": byte, "reason": "damaged", "times": 4}
    monkeypatch.setattr(evaluation, "gather_object", lambda mine: [*mine, other])
    assert evaluation.gather_faults(dataset, two) == [other]
    faults = faults_of(dataset.splits["train"])
    faults.limit = 0
    with pytest.raises(UserError, match=r"1 image does not decode and input\.fault_limit is 0"):
        faults.check()
    assert evaluation.gather_faults(dataset, two) == [other]  # counted once


def test_the_limit_counts_what_was_bad_before(damaged):
    split = open_dataset("digits").splits["train"]
    byte = int(split.samples["offset"][3])
    rows = [{"sample": 3, "shard": "train-000000.tar", "byte": byte, "reason": "damaged", "times": 4}]
    first, other = Faults(limit=0), Faults(limit=0)
    first.recall(split, rows, counted=True)
    other.recall(split, rows, counted=False)
    assert (first.rows(), other.rows()) == (rows, [rows[0] | {"times": 0}])
    with pytest.raises(UserError, match=r"1 image does not decode and input\.fault_limit is 0"):
        first.check()
