"""Stage one from its command line: what it leaves, how it resumes, and what it says when something is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

import pipeline.loader
from shards.build import build
from shards.index import open_dataset
from train.bbn import BBN
from train.engine import runs as runs_module
from train.engine import session
from train.engine.config import PRESETS, Optim, preset
from train.engine.launch import run
from train.engine.loop import Sums
from train.engine.optimisers import lr_factor
from train.erm import ERM
from train.networks.model_files import load_model

SHORT = ["--optim.epochs", "2", "--input.batch_size", "64", "--loop.eval_every", "1", "--optim.lr", "0.02",
         "--input.image_size", "8"]  # fmt: skip


def rows(run_folder) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def fails_with(capsys, method, *arguments) -> str:
    """Run, expect exit status 2, and return the one line that it printed."""
    with pytest.raises(SystemExit) as stopped:
        run(method, list(arguments))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2, error
    assert error.startswith(f"train/{method.name}.py: error: ")
    assert "\n" not in error
    return error


@pytest.mark.parametrize("method", [BBN, ERM])
def test_a_run_needs_no_arguments_but_time_and_leaves_a_whole_folder(workplace, method, capsys):
    run(method, SHORT)
    folder = workplace / "runs" / f"digits-{method.name}-1"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == method.name
    assert summary["dataset"] == "digits"
    assert summary["evaluated_on"] == "test"
    assert summary["selected_on"] == "val"
    assert summary["selected"]["epoch"] in (1, 2)
    assert summary["epochs"] == 2
    assert summary["images_per_second"] > 0
    for result in (summary["last"], summary["selected"]):
        assert {"top1", "balanced_accuracy", "many", "medium", "few", "ece"} <= set(result)
        assert 0 <= result["top1"] <= 1
    assert [row["epoch"] for row in rows(folder)] == [1, 2]
    assert [row["eval"]["split"] for row in rows(folder)] == ["val", "val"]
    assert ("alpha" in rows(folder)[0]) == (method is BBN)
    per_class = json.loads((folder / "per_class.json").read_text())
    digits = open_dataset("data/digits")
    assert per_class["total"] == digits.splits["test"].class_counts.tolist()
    assert sum(per_class["correct"]) / sum(per_class["total"]) == pytest.approx(summary["last"]["top1"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["epochs"] == 2
    assert load_model(folder).spec["num_classes"] == 10
    # A second run takes the next folder.
    run(method, [*SHORT[:2], "--optim.epochs", "1", "--input.batch_size", "128"])
    assert (workplace / "runs" / f"digits-{method.name}-2" / "summary.json").exists()
    assert "overall" in capsys.readouterr().out


def test_auto_is_decided_once_printed_and_recorded(workplace, monkeypatch, capsys):
    decided = []
    choose = pipeline.loader.choose_loader
    monkeypatch.setattr("pipeline.loader.choose_loader", lambda *about: decided.append(choose(*about)) or decided[-1])
    run(ERM, [*SHORT, "--run", "runs/auto", "--input.resident_gb", "0"])
    assert [chosen for chosen, _ in decided] == ["dali"]
    summary = json.loads((workplace / "runs/auto/summary.json").read_text())
    assert summary["environment"]["loader"] == "dali"
    assert "loader: dali (" in capsys.readouterr().out
    assert yaml.safe_load((workplace / "runs/auto/config.yaml").read_text())["input"]["loader"] == "auto"


@pytest.mark.parametrize("stop_at", [2, 3])
def test_an_interrupted_run_resumes_to_the_same_bits(workplace, monkeypatch, stop_at):
    short = ["--optim.epochs", "4", *SHORT[2:], "--loop.checkpoint_every", "1", "--run"]
    run(BBN, [*short, "runs/whole"])
    write = runs_module.append_row

    def stop(run_folder, row):
        if row["epoch"] == stop_at:
            raise KeyboardInterrupt
        write(run_folder, row)

    monkeypatch.setattr(runs_module, "append_row", stop)
    with pytest.raises(KeyboardInterrupt):
        run(BBN, [*short, "runs/stopped"])
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert not (workplace / "runs/stopped/summary.json").exists()
    run(BBN, ["--run", "runs/stopped", "--resume"])  # the settings are the run's own
    whole, stopped = (load_file(f"runs/{name}/model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    for ours, theirs in zip(rows(workplace / "runs/stopped"), rows(workplace / "runs/whole"), strict=True):
        for timing in ("seconds", "images_per_second", "eval_seconds"):
            del ours[timing], theirs[timing]
        assert ours == theirs
    results = [json.loads((workplace / f"runs/{name}/summary.json").read_text()) for name in ("whole", "stopped")]
    for key in ("last", "selected"):
        assert results[0][key] == results[1][key]


def test_resume_without_a_name_takes_the_newest_unfinished_run(workplace, monkeypatch, capsys):
    run(BBN, [*SHORT, "--run", "runs/finished"])
    monkeypatch.setattr(session, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(BBN, [*SHORT, "--run", "runs/cut"])
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    run(BBN, ["--resume"])
    assert (workplace / "runs/cut/summary.json").exists()
    assert "resuming runs/cut after epoch 2" in capsys.readouterr().out
    assert len(rows(workplace / "runs/cut")) == 2
    run(BBN, ["--resume", "--run", "runs/cut"])
    assert "runs/cut is finished" in capsys.readouterr().out
    run(BBN, ["--resume", "--run", "runs/cut", "--optim.epochs", "3"])
    assert json.loads((workplace / "runs/cut/summary.json").read_text())["epochs"] == 3
    assert [row["epoch"] for row in rows(workplace / "runs/cut")] == [1, 2, 3]
    assert "no unfinished bbn run" in fails_with(capsys, BBN, "--resume")


def test_the_commit_is_the_codes_own(tmp_path, monkeypatch):
    """Installed in an environment that lies in another repository, it has none."""
    commit = ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"]
    for words in (["init", "-q"], commit):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(runs_module, "__file__", str(tmp_path / "lib/train/engine/runs.py"))
    (tmp_path / "lib").mkdir()
    assert runs_module.environment("cpu", 1)["commit"] is None


def test_a_run_that_is_a_link_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs", "elsewhere/big"):
        Path(folder).mkdir(parents=True)
    Path("elsewhere/big/config.yaml").write_text("about: {method: bbn, dataset: digits}\n")
    Path("runs/big").symlink_to("../elsewhere/big")
    assert runs_module.newest_run({1}, method="bbn", finished=False) == Path("runs/big")
    Path("runs/folder").mkdir()
    shutil.copy2("runs/big/config.yaml", "runs/folder/config.yaml")
    Path("runs/latest").symlink_to("folder")
    assert runs_module.newest_run({1}, method="bbn", finished=False) == Path("runs/folder")


def test_resume_takes_the_newest_unfinished_run_on_the_dataset_that_is_named(workplace, capsys):
    for number, name in enumerate(("digits", "photos")):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"about: {{method: bbn, dataset: {name}, data: data/{name}}}\n")
        os.utime(folder / "config.yaml", (number, number))
    assert "photos" in fails_with(capsys, BBN, "--resume")
    run(BBN, [*SHORT, "--data", "data/digits", "--resume"])
    assert "-> runs/digits" in capsys.readouterr().out


def test_what_steps_add_up_is_kept_as_exactly_as_they_have_it():
    sums = Sums(torch.device("cpu"))
    for _ in range(2):
        sums.add({"alpha": 0.9, "loss": torch.tensor(0.5)})
    sums.gather(Accelerator(cpu=True))
    assert sums.totals()["alpha"].item() == 1.8


def test_resume_of_a_run_without_a_checkpoint_starts_it(workplace):
    run(ERM, [*SHORT, "--run", "runs/new", "--resume"])
    assert (workplace / "runs/new/summary.json").exists()


def test_a_checkpoint_of_another_model_is_named(workplace, capsys):
    run(BBN, [*SHORT, "--run", "runs/a"])
    assert "runs/a already holds a run: add --resume" in fails_with(capsys, BBN, "--run", "runs/a")
    (workplace / "runs/a/summary.json").unlink()
    message = fails_with(capsys, BBN, "--run", "runs/a", "--resume", "--model.backbone", "resnet18")
    assert "runs/a/checkpoints/step-" in message
    assert "is of another model" in message
    # Of 6 steps an epoch; 4 would fit the 12 that were taken, too.
    for size in ("32", "96"):
        assert f"runs/a was begun with input.batch_size=64 and cannot be resumed with {size}; begin" in fails_with(
            capsys, BBN, "--run", "runs/a", "--resume", "--input.batch_size", size
        )
    assert "a run of bbn, not of erm" in fails_with(capsys, ERM, "--run", "runs/a", "--resume")
    for state in (workplace / "runs/a/checkpoints").glob("step-*/state.pt"):
        state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="2"):
        run(BBN, ["--run", "runs/a", "--resume"])
    assert "every checkpoint of runs/a is damaged; remove runs/a/checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--optim.epoch", "3"], "--optim.epoch 3; did you mean --optim.epochs? (--help"),
        (["--epochs", "3"], "did you mean --optim.epochs?"),
        (["--batch-size=3"], "did you mean --input.batch_size?"),
        (["--optim.seed", "3"], "did you mean --loop.seed?"),
        (["--rum", "a"], "did you mean --run?"),
        (["--factor", "20"], "unrecognized arguments: --factor 20 (--help"),
        (["--optim.epochs", "many"], "optim.epochs"),
        (["--optim.epochs", "0"], "optim.epochs"),
        (["--optim.lr", "-1"], "optim.lr"),
        (["--method.adaptor", "linear"], "method.adaptor"),
        (["--input.loader", "ffcv"], "input.loader"),
        (["--input.augment", "cifra"], "'cifra'; choose one of"),
        (["--input.batch_size", "0"], "input.batch_size"),
        (["--model.backbone", "resnet33"], "'resnet33' is unknown; did you mean resnet34?"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--data", "."], "has no dataset.json"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--config", "wrong-key.yaml"], "option 'epoch'; did you mean optim.epochs?"),
        (["--config", "no-section.yaml"], "Option 'seed' is not accepted; did you mean loop.seed?"),
        (["--config", "wrong-section.yaml"], "Option 'optm.lr' is not accepted; did you mean optim.lr?"),
        (
            ["--config", "of-a-run.yaml"],
            "is not accepted; the section about is what a run says of itself: leave it out",
        ),
        (["--config", "wrong-type.yaml"], "optim.epochs"),
        (["--config", "broken.yaml"], "broken.yaml"),
        (["--loop.seed", str(2**32)], "loop.seed=4294967296 must be below 2**32"),
        (["--optim.ema", "1"], "optim.ema"),
        (["--run", "data"], "data already exists and is no run of ours"),
        (["--run", "file/below"], "cannot make the run folder"),
        (["--resume", "--run", "data"], "data already exists and is no run of ours"),
    ],
)
def test_mistakes_are_reported_in_one_line_and_leave_nothing(workplace, capsys, arguments, expected):
    (workplace / "wrong-key.yaml").write_text("optim: {epoch: 3}\n")
    (workplace / "no-section.yaml").write_text("seed: 3\n")
    (workplace / "wrong-section.yaml").write_text("optm: {lr: 0.2}\n")
    (workplace / "of-a-run.yaml").write_text("about: {method: bbn}\noptim: {lr: 0.2}\n")
    (workplace / "wrong-type.yaml").write_text("optim: {epochs: many}\n")
    (workplace / "broken.yaml").write_text("optim: {epochs: [\n")
    (workplace / "file").write_text("")
    before = sorted(workplace.rglob("*"))
    assert expected in fails_with(capsys, BBN, *arguments)
    assert sorted(workplace.rglob("*")) == before


def test_help_and_refusals_wait_for_no_library_that_only_training_needs():
    slow = "{'torchvision', 'nvidia.dali', 'sklearn', 'scipy', 'matplotlib'}"
    loaded = f"import sys, train.bbn, train.erm, train.afg; print({slow} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(PRESETS.parents[1])}
    done = subprocess.run([sys.executable, "-c", loaded], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_data_must_be_one_or_named(workplace, capsys, photos):
    (workplace / "data/photos").symlink_to(photos.root)
    message = fails_with(capsys, BBN)
    assert "choose one: --data data/digits | data/photos" in message
    for path in (workplace / "data").iterdir():
        path.unlink()
    assert "tailstream build digits" in fails_with(capsys, BBN)


def test_a_diverging_run_stops_and_says_where(workplace, capsys):
    message = fails_with(capsys, ERM, *SHORT[2:], "--optim.epochs", "3", "--optim.lr", "1e30")
    assert "the loss is" in message
    assert "; lower optim.lr" in message
    assert "epoch" in message


def test_without_held_out_splits_there_is_nothing_to_report_on(workplace, capsys, photo_folder):
    build("folder", source=photo_folder, out=workplace / "bare", val_fraction=0.0, test_fraction=0.0, workers=1)
    message = fails_with(capsys, ERM, "--data", "bare", "--input.image_size", "32", *SHORT[:2])
    assert "neither a test nor a val split" in message


def test_a_val_split_of_a_few_images_selects_nothing(workplace, photos, capsys):
    run(ERM, [*SHORT, "--data", str(photos.root), "--input.batch_size", "8", "--model.backbone", "resnet32",
              "--run", "runs/a"])  # fmt: skip
    summary = json.loads((workplace / "runs/a/summary.json").read_text())
    assert (summary["selected"], summary["selected_on"]) == (None, None)
    assert not (workplace / "runs/a/model-selected.safetensors").exists()
    assert "note: val has 3 images, which tell epochs apart only by chance: none is selected" in capsys.readouterr().out
    assert "eval" in json.loads((workplace / "runs/a/metrics.jsonl").read_text().splitlines()[-1])


def test_without_a_val_split_nothing_is_selected(workplace, photo_folder):
    build("folder", source=photo_folder, out=workplace / "no-val", val_fraction=0.0, workers=1)
    run(ERM, ["--data", "no-val", "--run", "runs/a", "--optim.epochs", "1", "--input.image_size", "32",
              "--input.batch_size", "8", "--model.backbone", "resnet32"])  # fmt: skip
    summary = json.loads((workplace / "runs/a/summary.json").read_text())
    assert summary["selected"] is None
    assert summary["selected_on"] is None
    assert rows(workplace / "runs/a")[0]["eval"]["split"] == "test"


def test_the_torch_loader_trains_to_the_same_weights_on_lossless_images(workplace):
    for kind in ("dali", "torch"):
        whole = [*SHORT, "--optim.epochs", "1", "--input.image_size", "16"]  # as stored: nothing is resized
        run(BBN, [*whole, "--input.loader", kind, "--run", f"runs/{kind}"])
    ours, theirs = (load_file(f"runs/{kind}/model.safetensors") for kind in ("dali", "torch"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_bf16_trains(workplace):
    run(BBN, [*SHORT, "--optim.epochs", "1", "--loop.precision", "bf16", "--run", "runs/a"])
    assert np.isfinite(rows(workplace / "runs/a")[0]["loss"])
    assert load_file("runs/a/model.safetensors")["classifier.weight"].dtype == torch.float32


def test_learning_rate_warms_up_and_drops_at_shares_of_the_epochs():
    optim = Optim(epochs=200, warmup_epochs=5, milestones=[0.6, 0.8], decay=0.01)
    factors = {epoch: lr_factor(optim, epoch) for epoch in range(1, 201)}
    np.testing.assert_allclose([factors[epoch] for epoch in range(1, 6)], np.array([7, 9, 11, 13, 15]) / 15)
    assert {factors[epoch] for epoch in range(5, 120)} == {1.0}
    np.testing.assert_allclose([factors[epoch] for epoch in range(120, 160)], 0.01)
    np.testing.assert_allclose([factors[epoch] for epoch in range(160, 201)], 0.0001)
    inat = Optim(epochs=90, warmup_epochs=0, milestones=[0.6667, 0.8889], decay=0.1)
    assert [round(lr_factor(inat, epoch), 6) for epoch in (1, 59, 60, 79, 80)] == [1, 1, 0.1, 0.1, 0.01]


def test_warm_up_from_zero_is_an_even_stair():
    optim = Optim(epochs=200, warmup_epochs=5, warmup_start=0.0)
    np.testing.assert_allclose([lr_factor(optim, epoch) for epoch in range(1, 6)], [0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_the_first_epoch_has_the_whole_rate_however_short_the_run(epochs):
    assert lr_factor(Optim(epochs=epochs, warmup_epochs=0), 1) == 1.0


def test_cosine_and_constant_schedules():
    cosine = Optim(epochs=10, warmup_epochs=1, schedule="cosine")
    assert lr_factor(cosine, 2) == 1.0
    assert lr_factor(cosine, 6) == pytest.approx(0.5 * (1 + np.cos(np.pi * 4 / 9)))
    assert {lr_factor(Optim(epochs=10, warmup_epochs=0, schedule="constant"), e) for e in range(1, 11)} == {1.0}
    assert lr_factor(Optim(epochs=1, warmup_epochs=5), 1) == pytest.approx(7 / 15)


def test_a_warm_up_that_is_longer_than_the_run_is_reported(workplace, capsys):
    run(ERM, [*SHORT, "--optim.warmup_epochs", "5"])
    warning = (
        "warning: optim.warmup_epochs=5 is more than the 2 epochs: the rate rises to 0.012 only, not to optim.lr=0.02"
    )
    assert warning in capsys.readouterr().out
    run(ERM, [*SHORT, "--optim.warmup_epochs", "2"])
    assert "warning" not in capsys.readouterr().out


def test_a_dataset_that_has_moved_or_changed(workplace, capsys):
    shutil.copytree("data/digits", "elsewhere")
    run(ERM, [*SHORT, "--data", "elsewhere", "--run", "runs/a"])
    Path("elsewhere").rename("moved")
    resume = ["--resume", "--run", "runs/a", "--optim.epochs", "3"]
    message = fails_with(capsys, ERM, *resume)
    assert "elsewhere does not exist" in message
    assert "runs/a was trained on it: if it has moved, name its new place with --data" in message
    build("digits", out="other", seed=1, workers=1)
    capsys.readouterr()
    message = fails_with(capsys, ERM, *resume, "--data", "other")
    assert "other does not hold the images that runs/a was trained on; name that dataset with --data, or" in message
    run(ERM, [*resume, "--data", "moved"])
    assert len(rows(workplace / "runs/a")) == 3


@pytest.mark.parametrize("year", ["2017", "2018"])
def test_inaturalist_has_a_longer_variant(year, digits):
    dataset = type(digits)(digits.root, {**digits.manifest, "preset": f"inat{year}"}, digits.splits)
    settings = {variant: preset(dataset, "training", "bbn", variant=variant) for variant in (None, "2x")}
    assert [settings[variant]["optim"].pop("epochs") for variant in (None, "2x")] == [90, 180]
    assert settings[None] == settings["2x"]


def test_a_variant_belongs_to_a_new_run(workplace, monkeypatch, capsys):
    (workplace / "presets").mkdir()
    name = open_dataset("data/digits").manifest["preset"]
    variants = {"variants": {"long": {"training": {"optim": {"epochs": 2}}}}}
    (workplace / f"presets/{name}.yaml").write_text(yaml.safe_dump({"training": {"optim": {"epochs": 1}}, **variants}))
    monkeypatch.setattr("train.engine.config.PRESETS", workplace / "presets")
    slurm = ["--resume", "--run", "runs/a"]  # its script always resumes
    run(ERM, [*SHORT[2:], *slurm, "--variant", "long"])
    assert len(rows(workplace / "runs/a")) == 2
    run(ERM, [*slurm, "--variant", "long", "--optim.epochs", "3"])
    run(ERM, [*slurm, "--optim.epochs", "4"])
    assert "runs/a was begun with --variant long; begin another run for --variant none" in fails_with(
        capsys, ERM, *slurm, "--variant", "none"
    )


@pytest.mark.parametrize("method", [BBN, ERM])
def test_what_print_config_prints_can_be_given_back(workplace, capsys, method):
    with pytest.raises(SystemExit, match="0"):
        run(method, [*SHORT, "--print_config"])
    Path("my.yaml").write_text(capsys.readouterr().out)
    # It has run: null, which the flag comes over although it stands before.
    run(method, ["--run", "runs/a", "--optim.epochs", "1", "--config", "my.yaml", "--optim.lr=0.01"])
    config = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    assert (config["optim"]["epochs"], config["optim"]["lr"], config["input"]["batch_size"]) == (1, 0.01, 64)
    # Of a dataset whose preset says something else of what a schedule does not use.
    config = yaml.safe_load(Path("my.yaml").read_text())
    config["optim"] |= {"schedule": "cosine", "milestones": [0.5], "warmup_steps": 5, "warmup_epochs": 4}
    Path("my.yaml").write_text(yaml.safe_dump(config))
    run(method, ["--config", "my.yaml", "--dry-run"])
    message = fails_with(capsys, method, "--optim.milestones", "[0.5]", "--config=my.yaml", "--dry-run")
    assert "optim.milestones=[0.5] and optim.schedule=cosine exclude each other" in message


def test_a_resumed_run_does_not_say_that_it_began_with_other_weights(workplace, capsys):
    run(ERM, [*SHORT, "--optim.epochs", "1", "--run", "runs/a"])
    resume = ["--resume", "--run", "runs/a", "--optim.epochs", "2", "--model.weights"]
    message = fails_with(capsys, ERM, *resume, "nowhere.safetensors")
    assert "runs/a was begun with model.weights=None and cannot be resumed with nowhere.safetensors" in message
    message = fails_with(capsys, ERM, *resume, "null", "--loop.seed", "1")
    assert "runs/a was begun with loop.seed=0 and cannot be resumed with 1" in message
    run(ERM, [*resume, "null"])


def test_an_unknown_variant_is_reported(workplace, capsys):
    assert "--variant 3x: the preset digits has no such variant; it has: none" in fails_with(
        capsys, BBN, "--variant", "3x"
    )


def test_a_run_says_which_settings_are_not_its_presets(workplace):
    run(
        BBN,
        [*SHORT, "--optim.epochs", "1", "--run", "runs/a", "--method.adaptor", "linear_decay", "--optim.ema", "0.9"],
    )
    changed = yaml.safe_load((workplace / "runs/a/config.yaml").read_text())["about"]["changed"]
    assert {"method.adaptor", "optim.ema", "optim.epochs"} <= set(changed)
    assert "optim.momentum" not in changed
    run(ERM, [*SHORT, "--optim.epochs", "1", "--run", "runs/b", "--method.q", "0"])
    changed = yaml.safe_load((workplace / "runs/b/config.yaml").read_text())["about"]["changed"]
    assert "method.q" not in changed  # the title says it
