"""SDN: its losses by hand, its streams, what it keeps, and how it is evaluated."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_networks import images
from torch import nn
from torch.nn import functional as F

from pipeline.batch import Batch
from pipeline.distort import find_distortion
from pipeline.plan import TrainPlan
from train.bbn import BBN
from train.engine.launch import run
from train.engine.method import Progress
from train.networks.model_files import load_model
from train.sdn import SDN, classification_weight, divergences

COUNTS = np.array([60, 30, 10, 4])
SHORT = ["--optim.epochs", "2", "--input.batch_size", "64", "--input.image_size", "8", "--loop.eval_every", "2"]
SHORT += ["--optim.lr", "0.01"]


def test_lambda_is_the_schedule_of_section_2_2():
    assert [classification_weight(e, 4, 1.0) for e in range(1, 5)] == [0.25, 0.5, 0.75, 1]
    assert [classification_weight(e, 4, 2.0) for e in (2, 4)] == [0.25, 1]
    assert classification_weight(1, 16, 0.5) == 0.25
    assert classification_weight(1, 16, 0.0) == 1


def test_the_divergence_is_the_kullback_leibler_sum():
    strong, weak = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    by_hand = []
    for s, w in zip(strong.tolist(), weak.tolist(), strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, z)) for x in z] for z in (s, w))
        by_hand.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    torch.testing.assert_close(divergences(strong, weak), torch.tensor(by_hand))
    assert (divergences(strong, strong) == 0).all()
    certain = torch.tensor([[1e4, 0.0]])
    assert divergences(certain, -certain).item() == 1e4
    assert divergences(torch.zeros(2, 1), torch.ones(2, 1)).tolist() == [0, 0]  # one class


@pytest.fixture
def batch():
    labels = torch.tensor([0, 1, 2, 3])
    counts = torch.bincount(labels, minlength=4).float()
    return {
        name: Batch(images(4, seed=seed), labels, np.arange(4), step_counts_C=counts)
        for seed, name in enumerate(("weak", "strong"))
    }


def ldam(logits_BC, labels_B):
    margins = torch.tensor([0.5 * (4 / n) ** 0.25 for n in COUNTS.tolist()])
    shifted = logits_BC - 30 * margins * F.one_hot(labels_B, 4)
    return F.cross_entropy(shifted, labels_B, reduction="none")


# Weights and the hard-aware loss come in epoch 9 of 10, when nothing has been counted yet.
@pytest.mark.parametrize("bound", [0.3, 50.0])
@pytest.mark.parametrize(("epoch", "weighted", "hard"), [(1, False, False), (8, False, False), (9, True, True)])
def test_a_step_is_the_losses_by_hand(make_method, batch, epoch, weighted, hard, bound):
    method = make_method(SDN, COUNTS, bound=bound)
    method.network.eval()
    result = method.step(batch, Progress(epoch=epoch, epochs=10, step=0, seed=0))
    weak, strong = method.network(batch["weak"].images_BHWC, batch["strong"].images_BHWC)
    w = torch.tensor([(1 - 0.9999) / (1 - 0.9999**n) if weighted else 1.0 for n in COUNTS.tolist()])
    loss, lam = 0.0, epoch / 10
    for logits in (weak, strong):
        losses = F.cross_entropy(logits, torch.arange(4), reduction="none") if hard else ldam(logits, torch.arange(4))
        loss = loss + lam * (w * losses).sum() / w.sum()
    apart = divergences(strong, weak)
    loss = loss + (1 - lam) * sum(max(0.0, bound - d) for d in apart.tolist()) / 4
    torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=1e-5)
    assert result.sums["lambda"] == lam
    assert result.sums["divergence"].item() == pytest.approx(apart.mean().item())


def test_branches_are_driven_apart_up_to_the_bound_and_no_further(make_method, batch):
    gradients = {}
    for bound in (1e-6, 1e6):
        method = make_method(SDN, COUNTS, bound=bound, gamma=50.0)  # λ = 10^−50: the difference alone
        method.network.eval()
        result = method.step(batch, Progress(epoch=1, epochs=10, step=0, seed=0))
        result.loss.backward()
        gradients[bound] = method.network.classifier.weight.grad
        if bound == 1e6:
            with torch.no_grad():
                for parameter in method.network.parameters():
                    parameter -= 1e-4 * parameter.grad
            after = method.step(batch, Progress(epoch=1, epochs=10, step=0, seed=0))
            assert after.sums["divergence"] > result.sums["divergence"]
    assert gradients[1e6].abs().max() > 0
    assert gradients[1e-6].abs().max() < 1e-30


def test_both_streams_show_the_same_images_one_of_them_distorted(make_method, digits):
    method = make_method(SDN, digits.train_counts)
    plan = TrainPlan(digits.splits["train"], method.streams, 16, 8, 0, 5)
    weak, strong = plan.draws(3)
    np.testing.assert_array_equal(weak.ids_B, strong.ids_B)
    assert not np.array_equal(weak.windows_B4, strong.windows_B4)
    assert weak.distortions_B is None
    assert strong.distortions_B.dtype.names == (str(find_distortion("strong")),)


def test_each_branch_counts_its_own_hard_classes(workplace):
    run(SDN, [*SHORT, "--run", "runs/a"])
    rows = [json.loads(line) for line in (workplace / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert [row["lambda"] for row in rows] == pytest.approx([0.5, 1])
    assert all({"divergence", "weak_hardest", "strong_hardest"} <= row.keys() for row in rows)
    assert rows[0]["weak_hardest"] != rows[0]["strong_hardest"]
    assert json.loads((workplace / "runs/a/summary.json").read_text())["title"] == "SDNHL"


def test_a_resumed_run_goes_on_with_the_weights_of_hard_classes(workplace):
    # Nothing here depends on how many epochs there are to be.
    settings = [*SHORT, "--optim.schedule", "constant", "--method.gamma", "0", "--method.hard_from", "0"]
    settings += ["--method.defer", "0", "--loop.select", "false"]
    run(SDN, [*settings, "--optim.epochs", "3", "--run", "runs/whole"])
    run(SDN, [*settings, "--optim.epochs", "2", "--run", "runs/cut"])
    run(SDN, [*settings, "--optim.epochs", "3", "--run", "runs/cut", "--resume"])
    whole, cut = (
        [json.loads(line) for line in (workplace / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    )
    for key in ("loss", "weak_hardest", "strong_hardest"):
        assert [row[key] for row in whole] == [row[key] for row in cut], key
    assert whole[0]["weak_hardest"] != whole[2]["weak_hardest"]


def test_the_mean_of_both_branches_predicts_and_is_exported_as_one_linear_layer(workplace):
    run(SDN, [*SHORT, "--run", "runs/a"])
    model = load_model(workplace / "runs/a")
    assert type(model.classifier) is nn.Linear
    weak, strong = model(images(3, 8), images(3, 8))
    torch.testing.assert_close(model.predict(images(3, 8)), (weak + strong) / 2, rtol=1e-4, atol=1e-4)
    raw = load_file("runs/a/checkpoints/selected.safetensors")
    assert "classifier.bias" not in raw  # cosines, as they were trained
    rows = raw["classifier.weight"].unflatten(1, (2, 64))
    assert not torch.allclose(rows.norm(dim=2), rows.norm(dim=2)[0, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--method.defer", "1"], "method.defer=1 defers to after the last epoch"),
        (
            ["--method.hard", "ldam(scale=9)"],
            "method.hard=ldam(scale=9) wants another classifier than method.objective=ldam",
        ),
        (["--method.objective", "ce", "--method.hard", "ldam"], "method.hard=ldam wants another classifier"),
        (["--input.augment", "cifar+strong"], "has strong twice"),
    ],
)
def test_settings_that_make_no_sense_together(workplace, capsys, settings, message):
    with pytest.raises(SystemExit) as stopped:
        run(SDN, settings)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(workplace.glob("runs/*"))


def test_it_needs_nothing_that_bbns_network_has_not(make_method):
    ours, bbns = (make_method(method, COUNTS).network for method in (SDN, BBN))
    assert type(ours) is type(bbns)


def test_what_is_not_weighted_need_not_be_deferred(make_method):
    make_method(SDN, COUNTS, weights="none", defer=1.0)
