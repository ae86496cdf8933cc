"""The model card: metadata that hubs can read, figures with their spread, and names that are only names."""

import json

import numpy as np
import pytest
import torch
import yaml
from untrained import make_run

from train.card import main
from train.engine.calibration import Calibration, write_calibration
from train.engine.predictions import Collector, write_predictions

FIGURES = {"top1": 0.5, "balanced_accuracy": 0.4, "many": None, "medium": 0.7, "few": 0.1, "ece": 0.05}
HOSTILE = ["<script>alert(1)</script>", "a|b\n---\nlicense: mine", "\u202etxet [x](y)"]


def described(folder, seed=0, **figures):
    weights = {"last": {"file": "model.safetensors", "epoch": 2, "figures": FIGURES | figures}}
    return make_run(folder, classes=HOSTILE, seed=seed, weights=weights, train_counts=[60, 30, 6])


def test_hubs_can_read_it_and_names_are_only_names(tmp_path, capsys):
    run = described(tmp_path / "run")
    collector = Collector(3, logits=False)
    collector.add(np.arange(40), torch.arange(40) % 3, torch.eye(3)[torch.zeros(40).long()])
    write_predictions(run, {"test": collector.gather()})
    main(["--run", str(run)])
    assert "wrote" in capsys.readouterr().out
    text = (run / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["license"] == "other"
    (result,) = metadata["model-index"][0]["results"]
    assert {one["name"]: one["value"] for one in result["metrics"]} == {
        "overall": 50.0, "balanced": 40.0, "medium": 70.0, "few": 10.0,
    }  # fmt: skip
    assert "<script" not in body
    assert "\u202e" not in text
    assert "a&#124;b" in body
    assert not any(line.startswith("license:") for line in body.splitlines())
    # All 40 were taken for class 0; the standard error of a mean of two classes of 14 and 13 images, none right.
    assert "| 50.0 ± 3.9 |" in body
    assert "| – |" in body
    assert "standard error over the evaluated images" in body
    assert "2 classes" in body


def test_what_is_code_is_neither_markup_nor_an_entity(tmp_path, capsys):
    place = tmp_path / "my_run `x`\n---\nlicense: mine"
    run = make_run(place, dataset={"name": "\u202eds", "fingerprint": "`a`"})
    main(["--run", str(run)])
    capsys.readouterr()
    text = (run / "README.md").read_text()
    assert "tailstream predict --run 'my_run `x`\\n---\\nlicense: mine' PICTURES…\n" in text
    assert "fingerprint ` a `" in text
    assert "\u202e" not in text
    assert [line for line in text.splitlines() if line.startswith("license:")] == ["license: other"]


def test_the_spread_over_seeds(tmp_path, capsys):
    runs = [described(tmp_path / f"run{seed}", seed, top1=top1) for seed, top1 in enumerate((0.5, 0.6, 0.7))]
    out = tmp_path / "card.md"
    main(["--run", str(runs[0]), "--seed-run", str(runs[1]), "--seed-run", str(runs[2]), "--out", str(out)])
    assert "| 60.0 ± 10.0 |" in out.read_text()
    assert "over 3 runs of other seeds" in out.read_text()
    with pytest.raises(SystemExit, match="2"):
        main(["--run", str(runs[0]), "--out", str(out)])
    assert "already exists" in capsys.readouterr().err
    other = make_run(tmp_path / "other")
    with pytest.raises(SystemExit, match="2"):
        main(["--run", str(runs[0]), "--seed-run", str(other), "--out", str(tmp_path / "b.md")])
    assert "is another experiment than" in capsys.readouterr().err
    assert json.loads((runs[0] / "model.json").read_text())["classes"] == HOSTILE


def test_of_a_second_stage_it_names_the_classifier_that_val_chose(tmp_path):
    last = {"file": "model.safetensors", "epoch": 10, "figures": FIGURES}
    chosen = {"file": "model-selected.safetensors", "epoch": 10, "figures": FIGURES | {"name": "cRT"}}
    run = make_run(tmp_path / "run", selected=True, weights={"last": last, "selected": chosen})
    main(["--run", str(run)])
    text = (run / "README.md").read_text()
    assert "**Weights:** cRT, the classifier that did best on val" in text
    assert "the epoch that did best" not in text


def test_a_run_that_is_not_there_is_what_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--run", str(tmp_path / "typo")])
    error = capsys.readouterr().err
    assert "holds no trained model" in error
    assert "--out" not in error


def refused(capsys, run, seed, out) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(["--run", str(run), "--seed-run", str(seed), "--out", str(out)])
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"kind": "bilateral"}, "network"),
        ({"train_counts": [60, 30, 6]}, "images of the classes"),
        ({"image_size": 24}, "image size"),
        ({"dataset": {"name": "others", "fingerprint": None}}, "dataset"),
    ],
)
def test_another_experiment_and_the_run_itself_are_no_seeds(tmp_path, capsys, changes, name):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", seed=1, **changes)
    assert f"is another experiment than {run} ({name})" in refused(capsys, run, other, tmp_path / "card.md")
    assert f"{run} has the seed of {run}" in refused(capsys, run, run, tmp_path / "card.md")


def configured(run, seed, begun_with=None, **changes):
    """Write what a run's folder says of its settings."""
    about = {"method": "erm"} if begun_with is None else {"method": "afg", "from": begun_with, "weights": "last"}
    input = {"batch_size": 128 + 128 * (begun_with is not None), "threads": seed}
    config = {"input": input, "optim": {"lr": 0.1, "epochs": 200}, "loop": {"seed": seed}}
    for setting, value in changes.items():
        section, _, key = setting.partition("_")
        config.setdefault(section, {})[key] = value
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"about": about, **config}))
    return run


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"optim_epochs": 90}, "optim.epochs"),
        ({"input_batch_size": 64}, "input.batch_size"),
        ({"input_loader": "dali", "loop_device": "cpu", "method_chunk": 9, "optim_ema": None}, None),
    ],
)
def test_seeds_have_the_same_settings(tmp_path, capsys, changes, name):
    run = configured(make_run(tmp_path / "run"), 0)
    other = configured(make_run(tmp_path / "other", seed=1), 1, **changes)
    out = tmp_path / "card.md"
    if name is not None:
        assert f"is another experiment than {run} ({name}); leave it out" in refused(capsys, run, other, out)
    else:
        main(["--run", str(run), "--seed-run", str(other), "--out", str(out)])
        assert "over 2 runs of other seeds" in out.read_text()
        out.unlink()
    again = configured(make_run(tmp_path / "again", seed=1), 0)
    assert f"{again} has the seed of {run}" in refused(capsys, run, again, out)


def test_of_a_second_stage_the_first_ones_seed_and_settings_count(tmp_path, capsys):
    for place, seed, lr in (("a", 0, 0.1), ("b", 1, 0.1), ("c", 2, 0.2)):
        (tmp_path / place).mkdir()
        configured(tmp_path / place / "ce", seed, optim_lr=lr)
    run, other, third = (
        configured(make_run(tmp_path / place / "afg"), 0, begun_with="runs/ce", input_batch_size=size)
        for place, size in (("a", 256), ("b", 64), ("c", 256))
    )
    main(["--run", str(run), "--seed-run", str(other)])
    assert "over 2 runs of other seeds" in (run / "README.md").read_text()
    (run / "README.md").unlink()
    elsewhere = configured(make_run(tmp_path / "c/elsewhere"), 0, begun_with=str(tmp_path / "b/ce"))
    main(["--run", str(run), "--seed-run", str(elsewhere)])
    out = tmp_path / "card.md"
    assert "(stage one's optim.lr)" in refused(capsys, run, third, out)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("weights: last", "weights: selected"))
    assert "(weights of stage one)" in refused(capsys, run, other, out)


def test_seeds_that_agree_have_a_spread_of_0(tmp_path):
    runs = [described(tmp_path / f"run{seed}", seed) for seed in range(2)]
    main(["--run", str(runs[0]), "--seed-run", str(runs[1])])
    assert "| 50.0 ± 0.0 | 40.0 ± 0.0 | – | 70.0 ± 0.0 | 10.0 ± 0.0 |" in (runs[0] / "README.md").read_text()


def test_a_classifier_without_epochs_stands_on_what_was_trained(tmp_path):
    weights = {"last": {"file": "model.safetensors", "epoch": 0, "figures": FIGURES}}
    main(["--run", str(make_run(tmp_path / "run", weights=weights, method="CE + NCM"))])
    text = (tmp_path / "run/README.md").read_text()
    assert "**Weights:** those of a stage without epochs of training" in text


def test_it_says_below_what_predictions_have_no_label(tmp_path):
    run = make_run(tmp_path / "run")
    write_calibration(run, {"last": (Calibration(1.0, 0.0, [1 / 3] * 3, 0.4), {})})
    main(["--run", str(run)])
    text = (run / "README.md").read_text()
    assert "below 0.400 get no label" in text
    assert "Every image gets" not in text
