"""Objectives of a single branch, by hand, and how train/erm.py goes over them."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.batch import Batch
from pipeline.plan import TrainPlan
from train.engine.launch import run
from train.engine.method import Progress
from train.engine.objectives import adjusted_cross_entropy, gradual_weight, log_prior, make_objective
from train.erm import ERM

COUNTS = np.array([60, 30, 10])


def test_the_gradual_weight_is_equation_3():
    assert [gradual_weight(epoch, 5, 1.0, 2.0) for epoch in range(1, 6)] == pytest.approx(
        [2 ** (t / 5) - 1 for t in range(1, 6)]
    )
    assert gradual_weight(200, 200, 0.5, 2.0) == 0.5
    assert gradual_weight(1, 1, 1.0, 2.0) == 1
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
    torch.testing.assert_close(loss, torch.stack(by_hand))


def test_without_adjustment_it_is_cross_entropy_even_where_a_class_has_no_images():
    z, labels = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    prior = log_prior(np.array([5, 3, 0]))
    without = F.cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(adjusted_cross_entropy(z, labels, prior, 0.0), without)
    for tau in (1.0, -0.5):
        z = torch.randn(4, 3, requires_grad=True)
        adjusted_cross_entropy(z, labels, prior, tau).mean().backward()
        assert z.grad.isfinite().all()
        assert (z.grad[:, 2] == 0).all()  # a class that cannot occur is pushed nowhere


@pytest.mark.parametrize(
    ("settings", "title", "taus"),
    [
        ({}, "CE", (0, 0, 0)),
        ({"q": 0.0}, "CE, q=0", (0, 0, 0)),
        ({"objective": "adjusted(tau=1.5)"}, "logit-adjusted, τ=1.5", (1.5, 1.5, 1.5)),
        ({"objective": "adjusted"}, "balanced softmax", (1, 1, 1)),
        ({"objective": "gradual"}, "GraLoss", (2**0.1 - 1, 2**0.5 - 1, 1)),
        (
            {"objective": "gradual(scale=0.5, base=4)", "q": 0.5},
            "GraLoss, q=0.5, scale=0.5, base=4",
            (2**-0.8 - 0.5, 0.5, 1.5),
        ),
    ],
)
def test_a_step_adjusts_by_its_epoch(make_method, settings, title, taus):
    method = make_method(ERM, COUNTS, **settings)
    method.network.eval()
    assert method.title == title
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = {"train": Batch(images, torch.tensor([0, 1, 2]), np.arange(3))}
    for epoch, tau in zip((1, 5, 10), taus, strict=True):
        result = method.step(batch, Progress(epoch=epoch, epochs=10, step=0, seed=0))
        # q = 0.5 has corrected half of it already.
        drawn_C = COUNTS ** settings.get("q", 1.0)
        shifted = method.predict(images) + tau * torch.from_numpy(np.log(drawn_C / drawn_C.sum())).float()
        torch.testing.assert_close(result.loss, F.cross_entropy(shifted, batch["train"].labels_B))
        assert result.sums == ({} if title.startswith("CE") else {"tau": pytest.approx(tau)})


@pytest.mark.parametrize("defer", [0.0, 0.4])
@pytest.mark.parametrize("q", [1.0, 0.5, 0.0, -1.0, "progressive"])
def test_the_prior_is_what_the_stream_draws(make_method, digits, q, defer):
    counts, split, epochs = digits.train_counts, digits.splits["train"], 3
    method = make_method(ERM, counts, objective="adjusted", q=q, defer=0.0 if q == 1 else defer)
    plan = TrainPlan(split, method.streams, batch_size=100_000, image_size=8, seed=0, epochs=epochs)
    logits = torch.randn(10, 10)
    for epoch in (1, 2, 3):
        drawn = np.bincount(split.samples["label"][plan.global_ids(method.streams[0], epoch - 1, 0)], minlength=10)
        expected = F.cross_entropy(logits + torch.from_numpy(drawn / drawn.sum()).log(), torch.arange(10))
        losses = method._objective.losses(logits, torch.arange(10), Progress(epoch, epochs, 0, 0))
        # Of 100,000 draws.
        assert float(losses.mean()) == pytest.approx(float(expected), abs=0.01), epoch


def test_graloss_is_reported_in_rows_and_summary(workplace):
    common = ["--optim.epochs", "2", "--input.batch_size", "64", "--input.image_size", "8", "--loop.eval_every", "2"]
    run(ERM, [*common, "--run", "runs/a", "--method.objective", "gradual"])
    rows = [json.loads(line) for line in (workplace / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert [row["tau"] for row in rows] == pytest.approx([2**0.5 - 1, 1])
    assert json.loads((workplace / "runs/a/summary.json").read_text())["title"] == "GraLoss"


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("adjust", "is unknown; choose one of: ce, adjusted, gradual"),
        ("ce(tau=1)", "ce has no setting 'tau'; it has no settings"),
        ("gradual(tau=1)", "gradual has no setting 'tau'; its settings are: scale, base"),
        ("adjusted(tau=-1)", "tau"),
        ("adjusted(scale=10)", "scale=10 has no effect without cosine=True"),
        ("adjusted(1.5)", "is not understood; write it as gradual or gradual(scale=0.5)"),
        ("adjusted(tau=", "is not understood"),
        ("adjusted(tau=1, tau=2)", "is not understood"),
        ("adjusted(**{})", "is not understood"),
        ("nowhere.Loss", "cannot be imported (No module named 'nowhere'); is its folder on PYTHONPATH?"),
        ("json.JSONDecoder", "is no Objective of train.engine.objectives; derive it from that class"),
    ],
)
def test_wrong_objectives_are_named(workplace, capsys, objective, message):
    with pytest.raises(SystemExit) as stopped:
        run(ERM, ["--method.objective", objective])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "method.objective=" + objective in error
    assert message in error
    assert not list(workplace.glob("runs/*"))


def test_an_objective_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "their_losses.py").write_text(
        "from dataclasses import dataclass\n"
        "from train.engine.objectives import CrossEntropy\n"
        "class Doubled(CrossEntropy):\n"
        "    title = 'doubled'\n"
        "    @dataclass\n"
        "    class Settings:\n"
        "        factor: float = 2.0\n"
        "    def losses(self, logits_BC, labels_B, progress):\n"
        "        return self.settings.factor * super().losses(logits_BC, labels_B, progress)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    objective = make_objective("their_losses.Doubled(factor=3)", COUNTS)
    z, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    expected = 3 * F.cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(objective.losses(z, labels, Progress(1, 1, 0, 0)), expected)
