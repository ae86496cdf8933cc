"""Calibration on test: fitted to val alone, and nothing of the runs changes."""

import json
import sys

import numpy as np
import pytest
import torch

from bench_predict import make_run
from compare_calibration import main
from train.engine.calibration import Calibration, probabilities
from train.engine.predictions import Collector, write_predictions

COUNTS = [900, 90, 10]
FIGURES = {"top1": 0.5, "balanced_accuracy": 0.4, "many": None, "medium": 0.7, "few": 0.1, "ece": 0.05}


@pytest.fixture
def overconfident(tmp_path):
    """A run whose logits are three times too large and know the shares of train; val and test have equal ones."""
    run = make_run(tmp_path / "a|b", "resnet32", 32, COUNTS)
    kept, true = {}, Calibration(3.0, 1.0, [1 / 3] * 3)
    for seed, (split, count) in enumerate({"val": 2000, "test": 4000}.items()):
        generator = np.random.default_rng(seed)
        logits_NC = 6 * generator.normal(size=(count, 3)) + 3 * np.log(np.array(COUNTS) / 1000)
        p_NC = probabilities(logits_NC, true, COUNTS)
        labels_N = (p_NC.cumsum(1) < generator.random((count, 1))).sum(1)
        collector = Collector(3, logits=split == "val")
        collector.add(np.arange(count), torch.from_numpy(labels_N), torch.from_numpy(logits_NC).float())
        kept[split] = collector.gather()
    write_predictions(run, kept)
    summary = {"evaluated_on": "test", "dataset": "drawn", "title": "CE", "seed": 0, "last": FIGURES}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_calibration.py", *map(str, arguments)])
    main()


def test_the_error_falls_and_even_shares_serve_the_tail(overconfident, tmp_path, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in overconfident.iterdir()}
    call(monkeypatch, overconfident, "--out", tmp_path / "tables/table.md", "--json", tmp_path / "table.json")
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert (row["val_images"], row["test_images"]) == (2000, 4000)
    assert row["temperature"] == pytest.approx(3, rel=0.15)
    assert row["tau"] == pytest.approx(1, abs=0.15)
    figures = row["figures"]
    assert figures["calibrated"]["ece"] < 0.03 < 0.1 < figures["as it is"]["ece"]
    assert figures["calibrated"]["nll"] < figures["as it is"]["nll"]
    for way in ("calibrated", "calibrated even"):
        assert figures[way]["balanced_accuracy"] > figures["as it is"]["balanced_accuracy"] + 0.02
    table = (tmp_path / "tables/table.md").read_text()
    assert "a&#124;b" in table
    assert {line.count("|") for line in table.splitlines()} == {15}
    assert "nowhere higher" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in overconfident.iterdir()} == before


def test_a_run_without_val_is_refused_in_one_line(overconfident, monkeypatch, capsys):
    with np.load(overconfident / "predictions.npz") as file:
        np.savez(overconfident / "kept.npz", **{name: file[name] for name in file.files if "val" not in name})
    (overconfident / "kept.npz").rename(overconfident / "predictions.npz")
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, overconfident)
    assert "has no val split to calibrate on; leave it out" in capsys.readouterr().err
