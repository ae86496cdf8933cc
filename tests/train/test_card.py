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


@pytest.mark.parametrize("changes", [{"kind": "bilateral"}, {"train_counts": [60, 30, 6]}, {"image_size": 24}])
def test_another_experiment_and_the_run_itself_are_no_seeds(tmp_path, capsys, changes):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", seed=1, **changes)
    for seed in (other, run):
        with pytest.raises(SystemExit, match="2"):
            main(["--run", str(run), "--seed-run", str(seed), "--out", str(tmp_path / "card.md")])
        assert "error: " in capsys.readouterr().err


def test_it_says_below_what_predictions_have_no_label(tmp_path):
    run = make_run(tmp_path / "run")
    write_calibration(run, {"last": (Calibration(1.0, 0.0, [1 / 3] * 3, 0.4), {})})
    main(["--run", str(run)])
    text = (run / "README.md").read_text()
    assert "below 0.400 get no label" in text
    assert "Every image gets" not in text
