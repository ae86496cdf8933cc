"""Stage two from its command line, and the parts of its classifier training."""

import itertools
import json
import shutil

import pytest
import torch
from torch import nn

from shards.build import build
from shards.index import open_dataset
from train.afg import (
    Banks,
    ClassifierOptim,
    ScaledLinear,
    Settings,
    distill_weight,
    mixed_epoch,
    run,
    train_classifier,
)
from train.erm import ERM
from train.gaussians import find_support, fit, head_classes
from train.loop import run as run_stage_one
from train.networks import load_model


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory, digits):
    """A short finished run of stage one on the digits."""
    folder = tmp_path_factory.mktemp("stage") / "ce"
    arguments = ["--data", str(digits.root), "--run", str(folder), "--optim.epochs", "3", "--optim.lr", "0.02"]
    run_stage_one(ERM, [*arguments, "--input.batch_size", "32"])
    return folder


@pytest.fixture
def here(workplace, stage_one):
    """A workplace with that run under runs/."""
    shutil.copytree(stage_one, workplace / "runs/ce")
    shutil.rmtree(workplace / "runs/ce/features", ignore_errors=True)
    return workplace


SHORT = ["--optim.epochs", "4"]


def fails_with(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(list(arguments))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2, error
    assert error.startswith("train/afg.py: error: ")
    assert "\n" not in error
    return error


def test_stage_two_needs_no_arguments_and_leaves_a_whole_folder(here):
    run(SHORT)
    folder = here / "runs/digits-afg-1"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["title"], summary["stage"], summary["from"]) == ("afg", "CE + AFG", 2, "ce")
    assert summary["beta"]["selected_on"] == "val"
    assert list(summary["beta"]["tried"]) == ["0", "0.2", "0.4", "0.6", "0.8"]
    best = max(summary["beta"]["tried"].values())
    assert summary["beta"]["tried"][f"{summary['beta']['used']:g}"] == best
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["distillation"] == 0
    assert rows[-1]["distillation"] == 1
    assert rows[-1]["eval"]["split"] == "val"


def test_the_saved_model_predicts_what_was_measured_on_features(here):
    run([*SHORT, "--method.beta", "0.4", "--run", "runs/afg"])
    network, test = load_model("runs/afg"), open_dataset("data/digits").splits["test"]
    from pipeline.loader import open_loader
    from pipeline.plan import EvalPlan

    with open_loader(EvalPlan(test, 1000, 16), "torch", threads=0) as loader, torch.no_grad():
        (batch,) = [step["eval"] for step in loader]
        right = network.predict(batch.images_BHWC).argmax(1) == batch.labels_B
    told = json.loads((here / "runs/afg/per_class.json").read_text())
    assert abs(int(right.sum()) - sum(told["correct"])) <= 1  # the bank is half precision


def test_a_run_without_a_val_split_says_which_beta_it_takes(here, photo_folder, capsys):
    build("folder", source=photo_folder, out=here / "data/pictures", val_fraction=0.0, workers=1)
    small = ["--input.batch_size", "8", "--input.image_size", "32", "--model.backbone", "resnet32"]
    run_stage_one(ERM, ["--data", "data/pictures", "--run", "runs/pictures", "--optim.epochs", "1", *small])
    run(["--optim.epochs", "2", "--run", "runs/afg"])  # the newest finished run
    summary = json.loads((here / "runs/afg/summary.json").read_text())
    assert summary["from"] == "pictures"
    assert summary["beta"] == {"used": 0.6, "tried": {}, "selected_on": None}
    assert "no val split to select β on" in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(here, capsys, photos):
    assert "nowhere is not a run" in fails_with(capsys, "--from", "nowhere")
    assert "method.beta" in fails_with(capsys, "--method.beta", "1.5")
    assert "method.k" in fails_with(capsys, "--method.k", "0")
    assert "--method.lambda" in fails_with(capsys, "--method.lambda", "0.5")
    message = fails_with(capsys, "--from", "runs/ce", "--data", str(photos.root))
    assert "was trained for 10 classes" in message
    assert "has 3" in message
    assert "already holds a run" in fails_with(capsys, "--run", "runs/ce")
    (here / "runs/ce/summary.json").unlink()
    assert "no finished stage-one run under runs" in fails_with(capsys)
    assert "is not finished; go on with it: train/erm.py" in fails_with(capsys, "--from", "runs/ce")
    assert sorted(p.name for p in (here / "runs").iterdir()) == ["ce"]


def make_banks(counts=(200, 30, 5), dimensions=8) -> tuple[Banks, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.tensor(counts))
    features = torch.rand(len(labels), dimensions, generator=generator) + torch.eye(len(counts), dimensions)[labels]
    gaussians = fit(features, labels, len(counts))
    support = find_support(gaussians, 2, head_classes(gaussians.counts_C, 100))
    bank = (features, labels)
    torch.manual_seed(0)
    banks = Banks(bank, bank, bank, gaussians, support, gaussians.counts_C.max() - gaussians.counts_C)
    return banks, nn.Linear(dimensions, len(counts))


def test_an_epoch_holds_every_real_feature_once_and_balances_the_classes():
    banks, _ = make_banks()
    batches = list(mixed_epoch(banks, Settings(), 0.4, 64, torch.Generator().manual_seed(1)))
    features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.bincount(labels).tolist() == [200, 200, 200]
    real = {tuple(row) for row in banks.train[0].tolist()}
    assert sum(tuple(row) in real for row in features.tolist()) == 235
    assert (features >= 0).all()


@pytest.mark.parametrize("kind", ["scaled", "lws"])
def test_training_learns_and_lws_moves_the_scales_alone(kind):
    banks, linear = make_banks()
    before = linear.weight.detach().clone()
    optim = ClassifierOptim(epochs=20, batch_size=64, lr=0.5)
    trained, rows = train_classifier(linear, banks, Settings(classifier=kind), optim, 0.4, seed=0)
    assert torch.equal(linear.weight, before)  # stage one's stays the teacher
    assert rows[-1]["loss"] < rows[0]["loss"] + 0.5
    ratio = trained.weight / before
    alike = torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4)
    assert alike == (kind == "lws")
    again, _ = train_classifier(linear, banks, Settings(classifier=kind), optim, 0.4, seed=0)
    assert torch.equal(trained.weight, again.weight)


def test_distillation_pulls_head_classes_towards_stage_one():
    banks, linear = make_banks()
    optim = ClassifierOptim(epochs=20, batch_size=64, lr=0.5)
    head = banks.train[0][banks.train[1] == 0]
    teacher = linear(head).log_softmax(1)

    def divergence(distill: float) -> float:
        trained, _ = train_classifier(linear, banks, Settings(distill=distill), optim, 0.4, seed=0)
        return nn.functional.kl_div(
            trained(head).log_softmax(1), teacher, reduction="batchmean", log_target=True
        ).item()

    assert divergence(20.0) < divergence(1.0) < divergence(0.0)


def test_folding_keeps_the_logits():
    linear = nn.Linear(6, 4)
    scaled = ScaledLinear(linear, freeze=False, unit=7.0)
    features = torch.randn(5, 6)
    torch.testing.assert_close(scaled(features), linear(features))
    nn.init.normal_(scaled.scales_C)
    torch.testing.assert_close(scaled.folded()(features), scaled(features))


def test_head_classes_are_the_many_or_else_the_largest():
    assert head_classes(torch.tensor([101, 100, 5]), 100).tolist() == [True, False, False]
    assert head_classes(torch.tensor([40, 40, 5]), 100).tolist() == [True, True, False]


def test_distillation_rises_from_zero_to_s():
    weights = [distill_weight(0.5, 2.0, epoch, 40) for epoch in range(1, 41)]
    assert weights[0] == 0
    assert weights[-1] == pytest.approx(0.5)
    assert all(a < b for a, b in itertools.pairwise(weights))
    assert distill_weight(1.0, 2.0, 1, 1) == 0
