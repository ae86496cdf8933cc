"""Objectives of a single branch, by hand, and how train/erm.py goes over them."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.batch import Batch
from train.engine.launch import run
from train.engine.method import Progress
from train.erm import ERM
from train.networks.objectives import adjusted_cross_entropy, gradual_weight, log_prior

COUNTS = np.array([60, 30, 10])


def test_the_gradual_weight_is_equation_3():
    assert [gradual_weight(epoch, 5, 1.0, 2.0) for epoch in range(1, 6)] == pytest.approx(
        [2 ** (t / 4) - 1 for t in range(5)]
    )
    assert gradual_weight(200, 200, 0.5, 2.0) == 0.5
    assert gradual_weight(1, 1, 1.0, 2.0) == 0
    assert gradual_weight(3, 5, 1.0, 8.0) < (gradual_weight(1, 5, 1.0, 8.0) + gradual_weight(5, 5, 1.0, 8.0)) / 2


def test_the_adjusted_loss_is_the_right_hand_side_of_equation_2():
    """log[1 + Σ_{y'≠y} (p_y'/p_y)^τ · e^{z_y' − z_y}]."""
    z, labels, tau = torch.tensor([[0.3, -1.0, 0.8], [2.0, 0.1, -0.4]]), torch.tensor([2, 0]), 0.7
    p = torch.tensor([0.6, 0.3, 0.1])
    by_hand = [
        torch.log1p(sum((p[k] / p[y]) ** tau * (row[k] - row[y]).exp() for k in range(3) if k != y))
        for row, y in zip(z, labels.tolist(), strict=True)
    ]
    loss = adjusted_cross_entropy(z, labels, log_prior(COUNTS), tau)
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())


def test_without_adjustment_it_is_cross_entropy_even_where_a_class_has_no_images():
    z, labels = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    prior = log_prior(np.array([5, 3, 0]))
    torch.testing.assert_close(adjusted_cross_entropy(z, labels, prior, 0.0), F.cross_entropy(z, labels))
    z.requires_grad_()
    adjusted_cross_entropy(z, labels, prior, 1.0).backward()
    assert z.grad.isfinite().all()
    assert (z.grad[:, 2] == 0).all()  # a class that cannot occur is pushed nowhere


@pytest.mark.parametrize(
    ("settings", "title", "taus"),
    [
        ({}, "CE", (0, 0, 0)),
        ({"q": 0.0}, "CE, q=0", (0, 0, 0)),
        ({"objective": "adjusted", "tau": 1.5}, "logit-adjusted, τ=1.5", (1.5, 1.5, 1.5)),
        ({"objective": "gradual"}, "GraLoss", (0, 2**0.5 - 1, 1)),
        ({"objective": "gradual", "gradual": 0.5, "gradual_base": 4.0, "q": 0.5}, "GraLoss, q=0.5", (0, 0.5, 1.5)),
    ],
)
def test_a_step_adjusts_by_its_epoch(make_method, settings, title, taus):
    method = make_method(ERM, COUNTS, **settings)
    method.network.eval()
    assert method.title == title
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = {"train": Batch(images, torch.tensor([0, 1, 2]), np.arange(3))}
    for epoch, tau in zip((1, 6, 11), taus, strict=True):
        result = method.step(batch, Progress(epoch=epoch, epochs=11, step=0, seed=0))
        shifted = result.logits + tau * torch.from_numpy(np.log(COUNTS / 100)).float()
        torch.testing.assert_close(result.loss, F.cross_entropy(shifted, batch["train"].labels_B))
        torch.testing.assert_close(result.logits, method.predict(images))  # what predicts is not adjusted
        assert result.log == ({} if title.startswith("CE") else {"tau": pytest.approx(tau)})


def test_graloss_is_told_in_rows_and_summary(workplace):
    common = ["--optim.epochs", "2", "--input.batch_size", "64", "--input.image_size", "8", "--loop.eval_every", "2"]
    run(ERM, [*common, "--run", "runs/a", "--method.objective", "gradual"])
    rows = [json.loads(line) for line in (workplace / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert [row["tau"] for row in rows] == [0, 1]
    assert json.loads((workplace / "runs/a/summary.json").read_text())["title"] == "GraLoss"


@pytest.mark.parametrize("wrong", [["--method.objective", "focal"], ["--method.tau", "-1"], ["--method.gradual", "-1"]])
def test_wrong_settings_are_named(workplace, capsys, wrong):
    with pytest.raises(SystemExit) as stopped:
        run(ERM, wrong)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert wrong[1] in error
    assert wrong[0].removeprefix("--") in error
