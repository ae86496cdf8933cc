"""BBN's own mathematics: Table 4's adaptors, Eq. 3's loss, Table 3's streams."""

import math

import numpy as np
import pytest
import torch

from pipeline.batch import Batch
from shards.errors import UserError
from train.bbn import ADAPTORS, BBN, adaptor_alpha, bbn_loss
from train.engine.method import Progress
from train.networks.model_files import load_model, save_model
from train.networks.networks import build_network

COUNTS = np.array([9, 5, 2, 1])


@pytest.mark.parametrize(
    ("adaptor", "formula"),
    [
        ("equal", lambda t: 0.5),
        ("parabolic_increment", lambda t: t**2),
        ("linear_decay", lambda t: 1 - t),
        ("cosine_decay", lambda t: math.cos(t * math.pi / 2)),
        ("parabolic_decay", lambda t: 1 - t**2),
    ],
)
def test_adaptors_follow_table_4_with_epochs_counted_from_zero(adaptor, formula):
    for epoch in (1, 2, 57, 200):
        assert adaptor_alpha(adaptor, epoch, 200) == pytest.approx(formula((epoch - 1) / 200), abs=1e-12)


def test_parabolic_decay_starts_with_the_conventional_branch_alone():
    assert adaptor_alpha("parabolic_decay", 1, 60) == 1.0
    assert adaptor_alpha("parabolic_decay", 60, 60) == 1 - (59 / 60) ** 2
    # iNaturalist's 90 epochs decay over 100: α is still 1 - 0.89² in the last one.
    assert adaptor_alpha("parabolic_decay", 90, 100) == pytest.approx(1 - 0.89**2)


def test_separate_stages_are_one_after_the_other(make_method):
    """The authors' code holds it in a comment: the conventional branch alone to epoch 120 of 200, then the other."""
    assert [adaptor_alpha("separate", epoch, 200) for epoch in (1, 120, 121, 200)] == [1, 1, 0, 0]
    method = make_method(BBN, COUNTS, adaptor="separate", separation=0.25)
    images, labels = torch.zeros(2, 16, 16, 3, dtype=torch.uint8), torch.tensor([0, 1])
    batch = {name: Batch(images, labels, np.arange(2)) for name in ("uniform", "reversed")}
    sums = [method.step(batch, Progress(epoch, 8, 0, 0)).sums["alpha"] for epoch in (1, 2, 3, 8)]
    assert sums == [1, 1, 0, 0]
    with pytest.raises(UserError, match=r"method.separation=0.25 has no effect with method.adaptor=parabolic_decay"):
        make_method(BBN, COUNTS, separation=0.25)


@pytest.mark.parametrize("adaptor", ADAPTORS)
def test_alpha_stays_within_its_range_even_beyond_the_last_epoch(adaptor):
    for epoch in (1, 2, 10, 11, 12, 50):
        assert 0 <= adaptor_alpha(adaptor, epoch, 10, seed=1, step=epoch) <= 1


def test_beta_adaptor_draws_from_beta_by_seed_epoch_and_step():
    draws = np.array([adaptor_alpha("beta", 1, 10, seed=0, step=step) for step in range(2000)])
    assert adaptor_alpha("beta", 1, 10, seed=0, step=7) == draws[7]
    assert adaptor_alpha("beta", 2, 10, seed=0, step=7) != draws[7]
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
    assert abs(draws.mean() - 0.5) < 5 * math.sqrt(1 / 5.6 / 2000)
    assert draws.var() == pytest.approx(1 / 5.6, rel=0.1)


def test_loss_is_equation_3():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.5, 0.5, -1.0]])
    conventional, reverse = torch.tensor([0, 1]), torch.tensor([2, 2])
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    alpha = 0.3
    e_c = -(p[0, 0].log() + p[1, 1].log()) / 2
    e_r = -(p[0, 2].log() + p[1, 2].log()) / 2
    torch.testing.assert_close(bbn_loss(logits, conventional, reverse, alpha), 0.3 * e_c + 0.7 * e_r)
    torch.testing.assert_close(bbn_loss(logits, conventional, reverse, 1.0), e_c)
    torch.testing.assert_close(bbn_loss(logits, conventional, reverse, 0.0), e_r)


@pytest.mark.parametrize("q", [-1.0, 0.0, 1.0])
def test_samplers_of_table_3_are_exponents_of_the_second_stream(make_method, q):
    uniform, second = make_method(BBN, COUNTS, q=q).streams
    assert (uniform.name, uniform.q) == ("uniform", 1.0)
    assert (second.name, second.q) == ("reversed", q)


def test_a_step_is_equations_1_and_3_on_both_streams(make_method):
    method = make_method(BBN, COUNTS, alpha_span=0.5)
    method.network.eval()  # so that a second pass gives the same features
    images = torch.randint(0, 256, (2, 3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 2], [3, 3, 2]])
    batch = {name: Batch(images[i], labels[i], np.arange(3)) for i, name in enumerate(("uniform", "reversed"))}
    result = method.step(batch, Progress(epoch=5, epochs=16, step=0, seed=0))
    alpha = 1 - (4 / 8) ** 2
    assert result.sums == {"alpha": alpha}
    f_c, f_r = method.network.features(images[0])[:, :64], method.network.features(images[1])[:, 64:]
    W, b = method.network.classifier.weight, method.network.classifier.bias
    logits = 2 * alpha * f_c @ W[:, :64].T + 2 * (1 - alpha) * f_r @ W[:, 64:].T + b
    torch.testing.assert_close(result.loss, bbn_loss(logits, labels[0], labels[1], alpha))


@pytest.mark.parametrize(("epochs", "last"), [(90, 100), (180, 200), (1, 1)])
def test_alpha_spans_what_the_authors_code_has(make_method, monkeypatch, epochs, last):
    spans = []
    monkeypatch.setattr(
        "train.bbn.adaptor_alpha", lambda adaptor, epoch, last_epoch, *_: spans.append(last_epoch) or 0.5
    )
    method = make_method(BBN, COUNTS, alpha_span=1.1111)
    images, labels = torch.zeros(2, 16, 16, 3, dtype=torch.uint8), torch.tensor([0, 1])
    batch = {name: Batch(images, labels, np.arange(2)) for name in ("uniform", "reversed")}
    method.step(batch, Progress(epoch=1, epochs=epochs, step=0, seed=0))
    assert spans == [last]


def test_prediction_weighs_both_branches_alike(make_method):
    method = make_method(BBN, COUNTS)
    method.network.eval()
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(method.predict(images), torch.stack(method.network(images, images)).mean(0))


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_each_branch_can_be_had_alone(classifier, tmp_path):
    """Table 5 judges the features of each branch: a plain network with that branch's logits."""
    torch.manual_seed(0)
    network = build_network("bilateral", "resnet32", 4, classifier=classifier).eval()
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    for number, branch in enumerate(("conventional", "rebalancing")):
        save_model(network.single(branch), tmp_path / branch)
        alone = load_model(tmp_path / branch)
        assert alone.spec["kind"] == "plain"
        torch.testing.assert_close(alone.predict(images), network(images, images)[number], rtol=1e-4, atol=1e-4)
        features = network.features(images)[:, 64 * number : 64 * (number + 1)]
        torch.testing.assert_close(alone.features(images), features, rtol=1e-4, atol=1e-5)
