"""Classifiers, the epochs that they are trained on, and the baselines that are chosen among them."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from shards.errors import UserError
from train.features.candidates import TAUS, Candidate, Judge, baselines, table
from train.features.classifiers import (
    ClassifierOptim,
    Distillation,
    ScaledLinear,
    logit_adjusted,
    measure,
    tau_normalized,
    train_classifier,
)
from train.features.gaussians import find_support, fit, head_classes
from train.features.mixing import Mixture, mixed_epoch, real_epoch


def make_mixture(counts=(200, 30, 5), **options) -> Mixture:
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.tensor(counts))
    features = (torch.rand(len(labels), 8, generator=generator) + torch.eye(len(counts), 8)[labels]).half()
    gaussians = fit(features, labels, len(counts))
    support = find_support(gaussians, 2, head_classes(gaussians.counts_C, 100))
    return Mixture(features, labels, gaussians, support, gaussians.counts_C.max() - gaussians.counts_C, **options)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = zip(*batches, strict=True)
    return torch.cat(features), torch.cat(labels)


@pytest.mark.parametrize("chunk", [1, 50, 65536])
def test_an_epoch_holds_every_real_feature_once_and_balances_the_classes(chunk):
    mixture = make_mixture((40, 9, 2), chunk=chunk)
    batches = list(mixed_epoch(mixture, 0.4, 16, seeded()))
    features, labels = joined(batches)
    assert torch.bincount(labels).tolist() == [40, 40, 40]
    real = {tuple(row) for row in mixture.features_ND.tolist()}
    assert sum(tuple(row) in real for row in features.tolist()) == 51
    assert (features >= 0).all()
    assert max(len(labels) for _, labels in batches) <= 16
    if chunk > 100:
        assert all(len(labels.unique()) == 3 for _, labels in batches)  # shuffled over classes
        assert {len(labels) for _, labels in batches} == {15}


def test_generated_features_live_for_a_chunk_only(monkeypatch):
    alive = []
    mixture = make_mixture((300, 3, 2), chunk=100)
    generated = Mixture.generated

    def watched(self, *arguments):
        import weakref

        for features, labels in generated(self, *arguments):
            alive.append(weakref.ref(features))
            assert sum(chunk() is not None for chunk in alive) <= 2
            yield features, labels
            del features

    monkeypatch.setattr(Mixture, "generated", watched)
    for _ in mixed_epoch(mixture, 0.4, 32, seeded()):
        assert sum(chunk() is not None for chunk in alive) <= 2
    assert len(alive) == 6


def test_ranks_share_an_epoch_in_equal_steps():
    whole = [list(mixed_epoch(make_mixture(chunk=64, rank=r, world_size=3), 0.4, 16, seeded())) for r in range(3)]
    sizes = [[len(labels) for _, labels in batches] for batches in whole]
    assert sizes[0] == sizes[1] == sizes[2]
    rows = torch.cat([joined(batches)[0] for batches in whole])
    assert len(rows.unique(dim=0)) == len(rows) == 3 * (235 // 3 + 365 // 3)


def test_oversampling_repeats_each_feature_in_turn():
    mixture = make_mixture((40, 9, 2))
    features, labels = joined(real_epoch(mixture, "oversampled", 16, seeded()))
    assert torch.bincount(labels).tolist() == [40, 40, 40]
    _, times = features[labels == 1].unique(dim=0, return_counts=True)
    assert sorted(times.tolist()) == [4] * 5 + [5] * 4


def test_real_epochs_without_and_with_balance():
    mixture = make_mixture((400, 40, 4))
    _, labels = joined(real_epoch(mixture, "each-once", 16, seeded()))
    assert torch.bincount(labels).tolist() == [400, 40, 4]
    _, labels = joined(real_epoch(mixture, "class-balanced", 16, seeded()))
    counts = torch.bincount(labels).double()
    assert len(labels) == 444
    assert ((counts - 148).abs() <= 4 * (444 * 2 / 9) ** 0.5).all()


@pytest.mark.parametrize("kind", ["scaled", "lws"])
def test_folding_keeps_the_logits(kind):
    linear = nn.Linear(6, 4)
    scaled = ScaledLinear(linear, kind, unit=7.0)
    features = torch.randn(5, 6)
    torch.testing.assert_close(scaled(features), linear(features))
    nn.init.normal_(scaled.scales_C)
    torch.testing.assert_close(scaled.folded()(features), scaled(features))


def test_a_fresh_classifier_knows_nothing_of_stage_one_and_has_no_scales():
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    fresh = ScaledLinear(linear, "linear", unit=7.0)
    assert not torch.equal(fresh.linear.weight, linear.weight * 7)
    assert [name for name, p in fresh.named_parameters() if p.requires_grad] == ["linear.weight", "linear.bias"]


def test_distillation_rises_to_s():
    distillation = Distillation(lambda features: features, torch.tensor([True]), 0.5, 2.0)
    weights = [distillation.weight(epoch, 40) for epoch in range(1, 41)]
    assert weights[0] == pytest.approx(0.5 * (2 ** (1 / 40) - 1))
    assert weights[-1] == pytest.approx(0.5)
    assert all(a < b for a, b in itertools.pairwise(weights))
    assert distillation.weight(1, 1) == 0.5


def test_distillation_by_hand():
    """KL(teacher ‖ student) of the one head sample, over both samples, at temperature 1."""
    distillation = Distillation(lambda features: features, torch.tensor([True, False]), 1.0, 2.0)
    teacher, student = torch.tensor([[0.0, 1.0], [5.0, 0.0]]), torch.tensor([[0.5, 0.0], [0.0, 9.0]])
    p, q = teacher[0].softmax(0), student[0].softmax(0)
    expected = (p * (p / q).log()).sum() / 2
    torch.testing.assert_close(distillation.loss(teacher, student, torch.tensor([0, 1])), expected)


def test_a_loss_that_is_not_finite_is_told():
    bad = torch.full((4, 3), float("inf")), torch.zeros(4).long()
    with pytest.raises(UserError, match=r"the loss is nan in epoch 1 \(optim\.lr=0\.1\); lower optim\.lr"):
        train_classifier(ScaledLinear(nn.Linear(3, 2)), lambda: iter([bad]), ClassifierOptim())
    with pytest.raises(UserError, match="on features, the model's logits hold nan or inf"):
        measure(nn.Linear(3, 2), bad)


def test_closed_form_baselines_by_hand():
    linear = nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, 1.0])
    tau = tau_normalized(linear, 1.0)
    torch.testing.assert_close(tau.weight.data, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    assert tau.bias.tolist() == [0, 0]
    adjusted = logit_adjusted(linear, torch.tensor([3, 1]), 2.0)
    expected = torch.tensor([1.0, 1.0]) - 2 * torch.tensor([0.75, 0.25]).log()
    torch.testing.assert_close(adjusted.bias.data, expected)
    assert linear.bias.tolist() == [1, 1]


def judge_of(mixture: Mixture, test=None) -> Judge:
    bank = (mixture.features_ND, mixture.labels_N)
    return Judge(bank, test or bank, mixture.gaussians.counts_C.numpy())


def test_the_held_out_split_alone_chooses():
    right, wrong = nn.Linear(2, 2), nn.Linear(2, 2)
    right.weight.data, right.bias.data = torch.eye(2), torch.zeros(2)
    wrong.weight.data, wrong.bias.data = -torch.eye(2), torch.zeros(2)
    watched = (torch.eye(2), torch.tensor([0, 1]))
    test = (torch.eye(2), torch.tensor([1, 0]))  # the other way round
    judge = Judge(watched, test, torch.tensor([3, 1]).numpy())
    candidates = [Candidate({"a": 1.0}, wrong), Candidate({"a": 2.0}, right)]
    assert judge.best(iter(candidates)).setting == {"a": 2.0}
    assert judge.report(right)["top1"] == 0
    assert replace(judge, watched=None).best(iter(candidates)).setting == {"a": 1.0}
    surer = nn.Linear(2, 2)
    surer.weight.data, surer.bias.data = 5 * torch.eye(2), torch.zeros(2)
    assert judge.best(iter([*candidates, Candidate({"a": 3.0}, surer)])).setting == {"a": 3.0}  # ties: the loss


def test_every_baseline_is_there_and_learns_what_it_may():
    mixture = make_mixture((60, 20, 5))
    torch.manual_seed(0)
    linear = nn.Linear(8, 3)
    given = (linear, mixture, judge_of(mixture), ClassifierOptim(epochs=10, batch_size=32, lr=0.5), "scaled", 2.0, 0)
    found = dict(baselines(*given, torch.clone))
    assert list(found) == [
        "stage one", "no generation", "oversampling", "cRT", "LWS", "tau-normalized", "logit adjustment",
    ]  # fmt: skip
    assert found["stage one"].linear is linear
    assert found["cRT"].setting["lr"] in (0.125, 0.5, 2.0)
    assert found["logit adjustment"].setting["tau"] in TAUS
    ratio = found["LWS"].linear.weight / linear.weight
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    scores = {name: judge_of(mixture).score(candidate.linear)[0] for name, candidate in found.items()}
    assert scores["cRT"] > scores["stage one"]


def test_the_table_shows_names_settings_and_percent():
    figures = {"top1": 0.5, "balanced_accuracy": 0.25, "many": 1.0, "medium": None, "few": 0.125}
    text = table([{"name": "cRT", "setting": {"lr": 0.2}, **figures}, {"name": "AFG", "setting": {}, **figures}])
    assert text.splitlines() == [
        "classifier  chosen  overall  balanced   many  medium   few",
        "cRT         lr 0.2     50.0      25.0  100.0       –  12.5",
        "AFG                    50.0      25.0  100.0       –  12.5",
    ]
