"""Calibration: fitted to val alone, to known answers; and the predictions that it is fitted to."""

import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_ranks import on_ranks
from untrained import make_run

from analysis.metrics import summarize, tally
from shards.errors import UserError
from train.calibrate import calibrate, main, reliability
from train.engine import calibration as calibration_module
from train.engine.calibration import (
    Calibration,
    fit,
    probabilities,
    read_calibration,
    reject_threshold,
    write_calibration,
)
from train.engine.inference import open_model
from train.engine.launch import run as train
from train.engine.predictions import Collector, read_predictions, write_predictions
from train.erm import ERM

COUNTS = [800, 150, 30, 20]


def drawn(count: int, temperature: float, tau: float, prior_C=(0.25,) * 4, seed: int = 0):
    """Draw labels from softmax(z / T − τ·log prior): the calibration is known."""
    generator = np.random.default_rng(seed)
    logits_NC = generator.normal(size=(count, 4)) * 3 + tau * temperature * np.log(np.array(COUNTS) / 1000)
    true = Calibration(temperature, tau, list(prior_C))
    p_NC = probabilities(logits_NC, true, COUNTS)
    labels_N = (p_NC.cumsum(1) < generator.random((count, 1))).sum(1)
    return logits_NC, labels_N


@pytest.mark.parametrize(("temperature", "tau"), [(1.0, 0.0), (2.5, 1.0), (0.5, -0.5)])
def test_it_finds_the_temperature_and_the_adjustment_that_labels_were_drawn_with(temperature, tau):
    logits_NC, labels_N = drawn(20_000, temperature, tau)
    found = fit(logits_NC, labels_N, COUNTS)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.tau == pytest.approx(tau, abs=0.06)
    assert sum(found.prior_C) == pytest.approx(1)
    test_NC, truth_N = drawn(20_000, temperature, tau, seed=1)
    errors = [
        summarize(tally(np.log(probabilities(test_NC, one, COUNTS)), truth_N), COUNTS)["ece"]
        for one in (Calibration.none(COUNTS), found)
    ]
    assert errors[1] < 0.02
    assert errors[1] <= errors[0] + 0.005


@pytest.mark.parametrize("labels", [[0], [0, 1, 2, 3], [3, 2, 1, 0]])
def test_few_labels_all_right_or_all_wrong_give_finite_numbers(labels):
    logits_NC = 20 * np.eye(4)[np.arange(len(labels))]
    found = fit(logits_NC, labels, COUNTS)
    assert np.isfinite([found.temperature, found.tau]).all()
    p_NC = probabilities(logits_NC, found, COUNTS)
    np.testing.assert_allclose(p_NC.sum(1), 1)
    assert min(found.prior_C) > 0


def test_it_is_the_minimum_of_the_equation_that_is_stated():
    logits_NC, labels_N = drawn(25, 2.0, 0.5)
    found = fit(logits_NC, labels_N, COUNTS)

    def loss(inverse: float, tau: float) -> float:
        p_NC = probabilities(logits_NC, Calibration(1 / inverse, tau, [0.25] * 4), COUNTS)
        return -np.log(p_NC[np.arange(25), labels_N]).sum() + ((inverse - 1) ** 2 + tau**2) / 2

    least = loss(1 / found.temperature, found.tau)
    for inverse, tau in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01), (0.3, 0.3), (-0.2, 1)):
        assert loss(1 / found.temperature + inverse, found.tau + tau) > least


def test_parts_of_the_logits_give_what_all_of_them_do_and_take_little_memory(monkeypatch):
    generator = np.random.default_rng(0)
    counts, labels_N = generator.integers(1, 100, 500).tolist(), generator.integers(0, 500, 4000)
    logits_NC = (generator.normal(size=(4000, 500)) + 3 * np.eye(500)[labels_N]).astype(np.float16)
    whole, about = calibrate(logits_NC, labels_N, counts, reject=0.9)
    monkeypatch.setattr(calibration_module, "BLOCK_VALUES", 20_000)
    tracemalloc.start()
    parts, about_parts = calibrate(logits_NC, labels_N, counts, reject=0.9)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (parts.temperature, parts.tau) == pytest.approx((whole.temperature, whole.tau), rel=1e-5)
    assert about_parts["ece_after"] == pytest.approx(about["ece_after"], rel=1e-3)
    assert most < logits_NC.nbytes  # all of them in float64 are four times as much


def test_ten_images_do_not_spoil_what_is_right_already():
    test_NC, truth_N = drawn(2000, 1.0, 0.0, seed=100)

    def loss(calibration: Calibration) -> float:
        return -np.log(probabilities(test_NC, calibration, COUNTS)[np.arange(2000), truth_N]).mean()

    found = [fit(*drawn(10, 1.0, 0.0, seed=seed), COUNTS) for seed in range(20)]
    lost = np.mean([loss(one) for one in found]) - loss(Calibration.none(COUNTS))
    assert lost < 0.1  # 1.6 by the likelihood alone: some ten images are all right
    # What is all right stays, where smoothed targets would raise T to 5.
    all_right = fit(20 * np.eye(4)[[0, 1, 2, 3] * 3], [0, 1, 2, 3] * 3, COUNTS)
    assert all_right.temperature == pytest.approx(1, abs=0.05)
    assert all_right.tau == pytest.approx(0, abs=0.05)


def test_the_prior_is_bayes_rule_and_raises_balanced_accuracy():
    """Labels of a tail's shares, a network that has learned them: equal shares serve the tail."""
    generator = np.random.default_rng(0)
    prior_C = np.array(COUNTS) / 1000
    labels_N = generator.integers(0, 4, 20_000)
    evidence_NC = np.eye(4)[labels_N] * 2 + generator.normal(size=(20_000, 4))
    logits_NC = 2 * evidence_NC + np.log(prior_C)  # exact for these Gaussians
    none = Calibration.none(COUNTS)
    trained, uniform = (probabilities(logits_NC, none, COUNTS, target) for target in (None, np.full(4, 0.25)))
    expected = trained / prior_C * 0.25
    np.testing.assert_allclose(uniform, expected / expected.sum(1, keepdims=True))
    balanced = [summarize(tally(np.log(p_NC), labels_N), COUNTS)["balanced_accuracy"] for p_NC in (trained, uniform)]
    assert balanced[1] > balanced[0] + 0.05
    assert reliability(uniform.max(1), uniform.argmax(1) == labels_N)[1] < 0.02


def test_thresholds_keep_the_share_that_is_right():
    scores_N, right_N = np.array([0.9, 0.8, 0.8, 0.5, 0.4]), np.array([True, True, False, True, False])
    assert reject_threshold(scores_N, right_N, 0.0) == 0
    assert reject_threshold(scores_N, right_N, 0.7) == 0.5
    assert reject_threshold(scores_N, right_N, 0.9) == 0.9
    assert reject_threshold(scores_N, ~right_N, 0.9) > 1.0
    assert reject_threshold(np.array([1.0, 1.0, 0.5]), np.array([False, True, True]), 1.0) > 1.0
    assert reject_threshold(scores_N[:0], right_N[:0], 0.9) == 0


@pytest.fixture
def calibrated(tmp_path):
    """A run with predictions of 400 val and 50 test images, four classes."""
    run = make_run(tmp_path / "run", classes=["a", "b", "c", "d"], train_counts=COUNTS)
    kept = {}
    for seed, (split, count) in enumerate({"val": 400, "test": 50}.items()):
        logits_NC, labels_N = drawn(count, 2.0, 1.0, seed=seed)
        collector = Collector(4, logits=split == "val")
        collector.add(np.arange(count), torch.from_numpy(labels_N), torch.from_numpy(logits_NC).float())
        kept[split] = collector.gather()
    write_predictions(run, kept)
    return run


def test_no_test_data_are_read(calibrated, capsys):
    main(["--run", str(calibrated), "--reject", "0.8", "--per-class"])
    before = (calibrated / "calibration.json").read_bytes()
    said = capsys.readouterr().out
    assert "temperature" in said
    assert "calibration error on val" in said
    path = calibrated / "predictions.npz"
    with np.load(path) as file:
        arrays = dict(file)
    with zipfile.ZipFile(path, "w") as file:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            file.writestr(f"{name}.npy", b"corrupt" if name.startswith("test_") else buffer.getvalue())
    with pytest.raises(UserError, match="is damaged"):
        read_predictions(calibrated, "last", "test_labels")
    (calibrated / "calibration.json").unlink()
    main(["--run", str(calibrated), "--reject", "0.8", "--per-class"])
    assert (calibrated / "calibration.json").read_bytes() == before
    assert capsys.readouterr().out == said

    found = read_calibration(calibrated, "last", 4)
    assert len(found.reject_below_C) == 4
    assert 0 < found.reject_below < 1
    assert read_calibration(calibrated, "selected", 4) is None


@pytest.mark.parametrize(("right", "option", "of"), [(9, [], "every class"), (0, ["--per-class"], "3 of the classes")])
def test_a_share_that_no_threshold_reaches_is_remarked_on(tmp_path, capsys, right, option, of):
    run = make_run(tmp_path / "run", classes=["a", "b", "c", "d"], train_counts=COUNTS)
    collector = Collector(4, logits=True)
    guessed_N = torch.arange(400) % 4
    half_N = torch.where(torch.arange(400) < 200, guessed_N, (guessed_N + 1) % 4)
    labels_N = torch.where(guessed_N == right, guessed_N, half_N)  # of the others every second is wrong
    collector.add(np.arange(400), labels_N, 20.0 * torch.eye(4)[guessed_N])
    write_predictions(run, {"val": collector.gather()})
    main(["--run", str(run), "--reject", "0.9", *option])
    assert f"no threshold reaches what --reject asks for of {of}" in capsys.readouterr().out
    main(["--run", str(run), "--reject", "0"])
    assert "no threshold" not in capsys.readouterr().out


def test_few_images_of_val_are_remarked_on(calibrated, capsys, monkeypatch):
    main(["--run", str(calibrated)])
    assert "note:" not in capsys.readouterr().out
    monkeypatch.setattr("train.calibrate.FEW_IMAGES", 10_000)
    main(["--run", str(calibrated)])
    assert "images of val are few to tell a temperature by" in capsys.readouterr().out


def test_without_val_it_says_so_and_does_nothing(calibrated, capsys):
    collector = Collector(4, logits=False)
    collector.add(np.arange(3), torch.tensor([0, 1, 2]), torch.eye(4)[:3])
    write_predictions(calibrated, {"test": collector.gather()})
    main(["--run", str(calibrated)])
    assert "has no val split" in capsys.readouterr().out
    assert not (calibrated / "calibration.json").exists()


def test_mistakes_are_reported_in_one_line(calibrated, tmp_path, capsys):
    def fails_with(*arguments) -> str:
        with pytest.raises(SystemExit, match="2"):
            main([str(argument) for argument in arguments])
        return capsys.readouterr().err.strip()

    assert "--per-class needs --reject" in fails_with("--run", calibrated, "--per-class")
    with pytest.raises(UserError, match="has no array 'train_labels'; train"):
        read_predictions(calibrated, "last", "train_labels")
    assert "holds no trained model" in fails_with("--run", tmp_path)
    (calibrated / "predictions.npz").write_bytes(b"PK damaged")
    assert "predictions.npz is damaged" in fails_with("--run", calibrated)
    (calibrated / "predictions.npz").unlink()
    assert "--resume evaluates" in fails_with("--run", calibrated)
    for content, message in (
        ({"format": 2}, "is of format 2"),
        ({"format": 1, "last": {"temperature": 1}}, "is damaged"),
    ):
        (calibrated / "calibration.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            read_calibration(calibrated, "last", 4)
    write_calibration(calibrated, {"last": (Calibration(1.0, 0.0, [0.5, 0.5]), {})})
    with pytest.raises(UserError, match="does not fit 4 classes"):
        read_calibration(calibrated, "last", 4)
    write_calibration(calibrated, {"last": (Calibration(1.0, float("nan"), [0.25] * 4), {})})
    with pytest.raises(UserError, match="does not fit 4 classes"):
        read_calibration(calibrated, "last", 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"val_logits": np.zeros((400, 3))}, "its arrays do not fit"),
        ({"val_logits": np.zeros((399, 4))}, "its arrays do not fit"),
        ({"val_logits": np.full((400, 4), np.inf)}, "hold nan or inf"),
        ({"val_logit_rows": np.arange(1, 401)}, "its arrays do not fit"),
        ({"val_labels": np.full(400, 4)}, "its arrays do not fit"),
        ({"val_logits": np.zeros((0, 4)), "val_logit_rows": np.arange(0)}, "its arrays do not fit"),
    ],
)
def test_logits_of_another_run_or_a_diverged_one_are_refused(calibrated, capsys, damage, message):
    with np.load(calibrated / "predictions.npz") as file:
        arrays = dict(file) | damage
    np.savez(calibrated / "predictions.npz", **arrays)
    with pytest.raises(SystemExit, match="2"):
        main(["--run", str(calibrated)])
    assert message in capsys.readouterr().err
    assert not (calibrated / "calibration.json").exists()


@pytest.mark.parametrize(("classes", "kept", "dtype"), [(3, 3, np.float32), (150, 100, np.float16)])
def test_what_is_kept_of_predictions(tmp_path, classes, kept, dtype, monkeypatch):
    logits_NC = torch.randn(9, classes, generator=torch.Generator().manual_seed(0))
    logits_NC[0] = 0  # a tie: the lower class first, as in the figures
    labels_N, ids_N = torch.arange(9) % classes, np.array([3, 1, 2, 0, 8, 7, 6, 5, 4])
    collector = Collector(classes, logits=True)
    collector.add(ids_N[:4], labels_N[:4], logits_NC[:4])
    collector.add(ids_N[4:], labels_N[4:], logits_NC[4:])
    monkeypatch.setattr("train.engine.predictions.MOST_LOGITS", 5 * classes)
    write_predictions(tmp_path, {"val": collector.gather()})
    names = [f"val_{what}" for what in ("ids", "labels", "topk_labels", "topk_scores", "logits", "logit_rows")]
    ids, labels, topk, scores, logits, rows = read_predictions(tmp_path, "last", *names)
    order = np.argsort(ids_N)
    np.testing.assert_array_equal(ids, np.arange(9))
    np.testing.assert_array_equal(labels, labels_N.numpy()[order])
    assert topk.shape == scores.shape == (9, kept)
    assert (topk.dtype, scores.dtype) == (np.int32, dtype)
    assert topk[3].tolist() == list(range(kept))
    np.testing.assert_array_equal(topk[:, 0], tally_argmax(logits_NC)[order])
    assert (np.diff(scores.astype(float), axis=1) <= 0).all()
    np.testing.assert_allclose(scores[:, 0], logits_NC.softmax(1).amax(1).numpy()[order], rtol=1e-3)
    assert rows.tolist() == [0, 2, 4, 6, 8]  # every second is enough
    np.testing.assert_allclose(logits, logits_NC.numpy()[order][rows], rtol=1e-3, atol=1e-3)


def _gather(rank: int, folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    logits_NC = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    mine = slice(4, 7) if rank == 0 else slice(0, 4)
    collector = Collector(3, logits=True)
    if rank < 2:  # the third has no image
        collector.add(np.arange(7)[mine], torch.arange(7)[mine] % 3, logits_NC[mine])
    gathered = collector.gather(accelerator)
    write_predictions(Path(folder) / str(rank), {"val": gathered})


def test_ranks_gather_their_predictions_by_ascending_id(tmp_path):
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
    assert on_ranks(tmp_path, _gather, str(tmp_path), ranks=3) == [0, 0, 0]
    logits_NC = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    for rank in range(3):
        ids, labels, logits = read_predictions(tmp_path / str(rank), "last", "val_ids", "val_labels", "val_logits")
        assert ids.tolist() == list(range(7))
        assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
        np.testing.assert_array_equal(logits, logits_NC.numpy())


def tally_argmax(logits_NC):
    return logits_NC.numpy().argmax(1)


def test_a_run_leaves_predictions_of_both_weights_and_a_model_that_describes_itself(workplace, capsys, monkeypatch):
    train(ERM, ["--optim.epochs", "2", "--input.batch_size", "64", "--input.image_size", "8", "--run", "runs/a"])
    run = workplace / "runs/a"
    said = capsys.readouterr().out
    summary, reported = (json.loads((run / f"{name}.json").read_text()) for name in ("summary", "per_class"))
    model = json.loads((run / "model.json").read_text())
    assert model["classes"] == [str(digit) for digit in range(10)]
    assert (model["image_size"], model["eval_augment"], model["crop_share"]) == (8, "none", 1.0)
    assert model["weights"]["selected"]["epoch"] == summary["selected"]["epoch"]
    assert model["weights"]["last"]["figures"] == summary["last"]
    assert f"epoch {summary['selected']['epoch']}, which val chose, on test" in said
    for weights in ("last", "selected"):
        ids, labels, topk, scores, logits, val_labels = read_predictions(
            run, weights, "test_ids", "test_labels", "test_topk_labels", "test_topk_scores", "val_logits", "val_labels"
        )
        assert ids.tolist() == list(range(sum(reported["total"])))
        assert (topk[:, 0] == labels).mean() == pytest.approx(summary[weights]["top1"])
        np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)
        assert logits.shape == (len(val_labels), 10)
    main(["--run", str(run)])
    (run / "model.onnx").write_bytes(b"exported")
    assert {"last", "selected"} <= json.loads((run / "calibration.json").read_text()).keys()
    train(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "3"])
    assert not (run / "calibration.json").exists()  # it was of other weights
    said = capsys.readouterr().out
    assert "note: runs/a/model.onnx is of the weights that the run had before; make it again" in said
    assert "README.md" not in said

    # A run of an older version has none; its last checkpoint is evaluated, and nothing is trained.
    summary, rows = json.loads((run / "summary.json").read_text()), (run / "metrics.jsonl").read_text()
    (run / "predictions.npz").unlink()
    capsys.readouterr()
    train(ERM, ["--resume", "--run", "runs/a"])
    assert "its last checkpoint is evaluated again" in capsys.readouterr().out
    assert (run / "predictions.npz").exists()
    assert (run / "metrics.jsonl").read_text() == rows
    assert {key: json.loads((run / "summary.json").read_text())[key] for key in ("last", "selected", "epochs")} == {
        key: summary[key] for key in ("last", "selected", "epochs")
    }
    (run / "summary.json").unlink()  # as if cut off
    with pytest.raises(SystemExit, match="2"):
        train(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "2"])
    assert "give more epochs" in capsys.readouterr().err

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.engine.evaluation.describe", killed)
    with pytest.raises(KeyboardInterrupt):
        train(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "4"])
    with pytest.raises(UserError, match="is not finished"):  # rather than new weights by an old description
        open_model(run)
