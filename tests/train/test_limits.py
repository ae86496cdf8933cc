"""What a run takes: measured without a trace, said before the first step, held against memory and time."""

import json
from dataclasses import replace
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.plan import TrainPlan
from pipeline.stream import Stream
from shards.errors import UserError
from shards.index import SAMPLE, Dataset, Split
from train.bbn import BBN
from train.engine import limits
from train.engine.config import Config, Input, Loop, Model, Optim
from train.engine.estimate import Estimate, measure
from train.engine.launch import run
from train.engine.limits import (
    check_memory,
    enlarged,
    said,
    said_bytes,
    said_parameters,
    said_time,
    seconds_in,
    within_budget,
)
from train.engine.machine import make_accelerator
from train.erm import ERM

SHORT = ["--input.image_size", "8", "--input.batch_size", "64", "--optim.lr", "0.02", "--optim.warmup_epochs", "0"]
SHORT += ["--loop.eval_every", "1", "--optim.epochs", "1"]
# 1 GB whatever the batch, 100 MB for an image of each stream, 2 s a step, 10 ms to predict an image.
BIG = Estimate(30_000_000, 10**9, 1e8, 10**9, 2.0, 0.01, 3, 8)


def setting(batch: int = 128, accumulate: int = 1, epochs: int = 60, **loop) -> Config:
    optim = Optim(epochs=epochs, accumulate=accumulate, warmup_epochs=5)
    return Config(Input(224, batch), Model("resnet50"), BBN.Settings(), optim, Loop(**loop))


def made(images: int = 1_280, batch: int = 128, side: int = 300) -> tuple[TrainPlan, Dataset]:
    samples = np.zeros(images, SAMPLE)
    samples["height"], samples["width"] = side, 2 * side
    train = Split("train", samples, np.arange(images), np.array([images]), ())
    val = Split("val", samples[:100], np.arange(100), np.array([100]), ())
    dataset = Dataset(Path("data/x"), {"name": "x"}, {"train": train, "val": val})
    return TrainPlan(train, (Stream("train"),), batch, 224, 0, 60), dataset


def test_a_run_is_the_same_bit_for_bit_with_and_without(workplace, capsys):
    run(BBN, [*SHORT, "--run", "runs/with"])
    printed = capsys.readouterr().out
    assert "0.539 M parameters, about " in printed
    assert printed.index(" M parameters") < printed.index("BBN on digits: ")
    run(BBN, [*SHORT, "--run", "runs/without", "--loop.estimate", "false"])
    assert " M parameters" not in capsys.readouterr().out
    ours, theirs = (load_file(workplace / f"runs/{name}/model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("method", [BBN, ERM])
def test_a_dry_run_says_what_it_takes_and_writes_nothing(workplace, capsys, method):
    before = sorted(workplace.rglob("*"))
    run(method, [*SHORT, "--dry-run"])
    printed = capsys.readouterr().out
    assert "for 6 steps and evaluations (measured: 10 steps of 64 of 64 images per stream)" in printed
    assert printed.endswith("nothing was written (--dry-run)\n")
    assert sorted(workplace.rglob("*")) == before


def test_weights_gradients_and_state_are_counted_to_the_byte(workplace, digits):
    config = replace(setting(64), input=Input(8, 64), model=Model("resnet32"))
    method = ERM(replace(config, method=ERM.Settings()), digits.train_counts)
    plan = TrainPlan(digits.splits["train"], method.streams, 64, 8, 0, 60)
    found = measure(method, plan, config, make_accelerator("no", "cpu"), 2, load=False)
    values = sum(p.numel() for p in method.network.parameters())
    buffers = sum(b.nbytes for b in method.network.buffers())
    assert found.parameters == values
    assert found.fixed_bytes == 3 * 4 * values + buffers  # weights, gradients, momentum
    # An image's maps: 16 channels of 8 by 8 pixels, 32 of 4 by 4, 64 of 2 by 2, at least one for each of 31 layers.
    least = 4 * (11 * 16 * 64 + 10 * 32 * 16 + 10 * 64 * 4)
    assert least < found.image_bytes < 6 * least


def test_what_does_not_fit_the_memory_is_refused_with_what_does(workplace):
    plan, _ = made()
    check_memory(BIG, setting(), plan, 14 * 10**9)
    with pytest.raises(UserError) as refused:
        check_memory(BIG, setting(), plan, 5 * 10**9)
    assert str(refused.value) == (
        "a step needs about 13.8 GB of memory, and 5.0 GB are free; settings that fit: --optim.accumulate 4 (4.2 GB),"
        " --input.batch_size 32 (4.2 GB), --input.image_size 96 (3.4 GB); --loop.estimate false tries it all the same"
    )
    with pytest.raises(UserError, match=r"--input.batch_size 24 "):  # three processes can share it
        check_memory(BIG, setting(), replace(plan, batch_size=384, world_size=3), int(2.2 * 10**9))
    with pytest.raises(UserError, match=r"; choose a smaller --model.backbone; "):
        check_memory(BIG, setting(), plan, 10**9)


def test_what_is_refused_leaves_nothing(workplace, capsys, monkeypatch):
    monkeypatch.setattr(limits, "free_memory", lambda device: 10**6)
    with pytest.raises(SystemExit) as stopped:
        run(BBN, SHORT)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "train/bbn.py: error: a step needs about " in error
    assert error.count("\n") == 1
    assert not (workplace / "runs").exists()


def test_a_long_run_is_worth_a_warning():
    plan, dataset = made()
    (line,) = said(BIG, setting(), plan, dataset, 600, torch.device("cpu"))
    assert "30 M parameters, about 14.8 GB of memory, 2 s a step: about 21 minutes for 600 steps" in line
    _, warning = said(BIG, setting(), plan, dataset, 60_000, torch.device("cpu"))
    assert "long for a CPU" in warning
    assert "--loop.budget" in warning
    (_,) = said(BIG, setting(), plan, dataset, 60_000, torch.device("cpu"), begins=False)  # which takes no budget


def test_a_budget_lowers_the_epochs_and_the_schedule_with_them():
    plan, dataset = made()  # 10 steps and an evaluation of 100 images: 21 s; and 2 s at the end
    fitted = within_budget(setting(budget="5m"), plan, dataset, BIG)
    assert (fitted.optim.epochs, fitted.optim.warmup_epochs) == (14, 2)
    assert BIG.seconds(fitted, plan, dataset, 14 * 10) <= 300 < BIG.seconds(fitted, plan, dataset, 15 * 10)
    assert within_budget(setting(budget="1d"), plan, dataset, BIG).optim.epochs == 60
    assert within_budget(setting(budget="23s"), plan, dataset, BIG).optim.epochs == 1
    with pytest.raises(UserError, match=r"loop.budget=22s is too short for one epoch, which takes about 23 s"):
        within_budget(setting(budget="22s"), plan, dataset, BIG)


@pytest.mark.parametrize("epochs", [3, 4])
def test_a_budget_that_holds_all_epochs_leaves_them(workplace, monkeypatch, epochs):
    monkeypatch.setattr(limits, "measure", lambda *_: replace(BIG, step_seconds=1e-3, predict_seconds=0.0))
    run(ERM, [*SHORT[:-1], str(epochs), "--loop.budget", "1h", "--run", "runs/a"])
    optim = yaml.safe_load((workplace / "runs/a/config.yaml").read_text())["optim"]
    assert (optim["epochs"], optim["warmup_epochs"]) == (epochs, 0)


def test_a_resumed_run_keeps_the_epochs_of_its_budget(workplace, monkeypatch, capsys):
    monkeypatch.setattr(limits, "measure", lambda *_: replace(BIG, step_seconds=1.0, predict_seconds=0.0))
    run(ERM, [*SHORT[:-2], "--loop.budget", "15s", "--run", "runs/a"])  # 6 steps an epoch
    config = yaml.safe_load((workplace / "runs/a/config.yaml").read_text())
    assert (config["optim"]["epochs"], config["loop"]["budget"]) == (2, "15s")
    assert "loop.budget=15s: 2 of 60 epochs fit it" in capsys.readouterr().out
    assert "optim.epochs" in config["about"]["changed"]
    monkeypatch.setattr(limits, "measure", lambda *_: BIG)
    (workplace / "runs/a/summary.json").unlink()
    run(ERM, ["--resume", "--run", "runs/a"])
    assert json.loads((workplace / "runs/a/summary.json").read_text())["epochs"] == 2
    assert yaml.safe_load((workplace / "runs/a/config.yaml").read_text())["about"] == config["about"]
    with pytest.raises(SystemExit):
        run(ERM, ["--resume", "--run", "runs/a", "--loop.budget", "1h"])
    assert "loop.budget=1h fits the epochs of a run that begins, and runs/a has begun" in capsys.readouterr().err


def test_the_command_of_a_budget_given_again_keeps_its_epochs(workplace, monkeypatch, capsys):
    monkeypatch.setattr(limits, "measure", lambda *_: replace(BIG, step_seconds=1.0, predict_seconds=0.0))
    command = [*SHORT[:-1], "50", "--loop.budget", "15s", "--run", "runs/a", "--resume"]
    run(ERM, command)
    run(ERM, command)
    assert "runs/a is finished: it has its 2 epochs" in capsys.readouterr().out
    (workplace / "runs/a/summary.json").unlink()
    run(ERM, command)
    assert "the 2 epochs that fitted loop.budget=15s are kept; for others give --optim.epochs without" in (
        capsys.readouterr().out
    )
    assert yaml.safe_load((workplace / "runs/a/config.yaml").read_text())["optim"]["epochs"] == 2
    run(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "3"])
    assert json.loads((workplace / "runs/a/summary.json").read_text())["epochs"] == 3


def test_measuring_that_takes_too_long_gives_what_it_has(workplace, monkeypatch, capsys):
    monkeypatch.setattr("train.engine.estimate.LONGEST", 1e-9)
    monkeypatch.setattr("train.engine.estimate.SHORT", 0.0)
    run(ERM, [*SHORT, "--run", "runs/a"])
    assert "(measured: 1 step of " in capsys.readouterr().out


def test_images_that_are_to_be_kept_in_memory_are_counted(workplace, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.resident_loader._alive", WeakSet())  # what other tests set aside is nobody's here
    monkeypatch.setattr(limits, "measure", lambda *_: BIG)
    monkeypatch.setattr(limits, "free_memory", lambda device: BIG.memory(64) + 1000)  # the digits take 863 kB
    with pytest.raises(SystemExit, match="2"):
        run(BBN, [*SHORT, "--run", "runs/a"])
    assert "a step needs about 7.4 GB of memory" in capsys.readouterr().err
    monkeypatch.setattr("pipeline.resident_loader._alive", WeakSet())
    run(BBN, [*SHORT, "--run", "runs/a", "--input.loader", "torch", "--dry-run"])


def test_images_that_are_enlarged_are_named():
    _, dataset = made(side=100)
    assert "half of the images have at most 100 pixels on their shorter side and are enlarged to 224" in (
        enlarged(dataset, 224) or ""
    )
    assert enlarged(dataset, 100) is None


def test_numbers_as_they_are_said():
    assert [said_bytes(size) for size in (123_456, 2e8, 999_600_000, 1e9)] == ["0.123 MB", "200 MB", "1.0 GB", "1.0 GB"]
    assert [said_parameters(count) for count in (463_914, 3e7, 1_136_480_000)] == ["0.464 M", "30 M", "1,136 M"]


def test_times_as_they_are_given_and_said():
    assert [seconds_in(text) for text in ("90s", "15m", "1h30m", "2d")] == [90, 900, 5400, 172_800]
    reported = [said_time(seconds) for seconds in (0.314, 12.3, 100, 3_600, 20_000, 200_000)]
    assert reported == ["0.31 s", "12 s", "1.7 minutes", "60 minutes", "5.6 hours", "2.3 days"]


@pytest.mark.parametrize("budget", ["15", "m", "1h 30m", "-5m", ""])
def test_a_budget_that_is_no_time_is_refused(workplace, capsys, budget):
    with pytest.raises(SystemExit) as stopped:
        run(BBN, [*SHORT, f"--loop.budget={budget}"])
    assert stopped.value.code == 2
    assert "loop.budget" in capsys.readouterr().err


def test_weights_of_the_preset_that_are_out_of_reach_are_done_without_and_those_of_the_user_are_not(
    workplace, photos, capsys
):
    """There are no pretrained weights of ResNet-32, with or without network."""
    options = ["--data", str(photos.root), "--model.backbone", "resnet32", "--input.image_size", "16"]
    options += ["--optim.epochs", "1", "--run", "runs/a"]
    run(ERM, options)
    printed = capsys.readouterr().out
    assert "warning: resnet32 starts from random weights" in printed
    config = yaml.safe_load((workplace / "runs/a/config.yaml").read_text())
    assert (config["model"]["weights"], config["optim"]["optimizer"]) == (None, "sgd")
    assert config["about"]["preset"]["parts"] == ["training", "cpu", "erm"]
    assert config["about"]["preset"]["fitted"]["model"] == {"weights": None}
    assert config["about"]["changed"] == ["input.image_size", "model.backbone", "optim.epochs"]
    run(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "2"])
    assert "random weights" not in capsys.readouterr().out
    again = yaml.safe_load((workplace / "runs/a/config.yaml").read_text())
    assert again["about"] == config["about"]
    with pytest.raises(SystemExit) as stopped:
        run(ERM, [*options[:-1], "runs/b", "--model.weights", "default"])
    assert stopped.value.code == 2
    assert "resnet32" in capsys.readouterr().err
    assert not (workplace / "runs/b").exists()


def test_one_image_with_maps_of_one_pixel_is_one_line(workplace, capsys):
    argv = [
        "--model.backbone",
        "resnet18",
        "--input.image_size",
        "32",
        "--input.batch_size",
        "1",
        "--optim.epochs",
        "1",
    ]
    with pytest.raises(SystemExit) as stopped:
        run(ERM, argv)
    assert stopped.value.code == 2
    assert "has no variance to normalise by" in capsys.readouterr().err
