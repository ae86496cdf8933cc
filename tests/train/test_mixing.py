"""Mixed batches in train/erm.py: losses and hidden maps by hand, titles, and settings that make no sense together."""

import json

import numpy as np
import pytest
import torch
from test_networks import images
from test_ranks import on_ranks, rows
from torch.nn import functional as F

from pipeline.batch import Batch
from pipeline.mix import CutMix, Mixup, Remix
from train.engine.launch import run
from train.engine.method import Progress
from train.engine.mixing import ManifoldMixup, make_mixing
from train.erm import ERM
from train.networks.networks import HiddenMix, build_network

COUNTS = np.array([60, 30, 10, 4])


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("mixup", Mixup()),
        ("mixup(alpha=0.2, probability=0.5, per_image=True)", Mixup(alpha=0.2, probability=0.5, per_image=True)),
        ("mixup(partner_q=0)", Mixup(partner="partners")),
        ("remix", Remix()),
        ("remix(kappa=2, tau=0.4)", Remix(kappa=2.0, tau=0.4)),
        ("cutmix", CutMix()),
        ("manifold", Mixup(alpha=2.0, hidden=True)),
        ("manifold(alpha=1, depth=1, partner_q=-1)", Mixup(hidden=True, partner="partners")),
    ],
)
def test_what_the_plan_is_asked_for(text, asked, make_method):
    assert make_mixing(text).mix() == asked
    streams = make_method(ERM, COUNTS, mix=text, q=0.5).streams
    assert (streams[0].mix, streams[0].q) == (asked, 0.5)
    assert [(s.name, s.q) for s in streams[1:]] == ([("partners", make_mixing(text).partner_q)] if "q=" in text else [])


def by_hand(network, first, second, shares, partners, depth):
    """Run a ResNet-32 stage by stage, and mix before stage `depth` + 1."""
    maps = [network.normalize(pictures) for pictures in (first, second)]
    trunk = network.trunk
    stem = torch.nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.layer1)
    for number, stage in enumerate([stem, trunk.layer2, trunk.layer3, network.branch]):
        if number == depth:
            mixed = [s * h + (1 - s) * maps[1][p] for s, h, p in zip(shares, maps[0], partners, strict=True)]
            maps = [torch.stack(mixed)] * 2
        maps = [stage(h) for h in maps]
    return maps[0].mean((2, 3)) @ network.classifier.weight.T + network.classifier.bias


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_hidden_mixing_is_a_forward_by_hand(depth, others):
    torch.manual_seed(0)
    network = build_network("plain", "resnet32", 4).eval()
    first, second = images(4), images(4, seed=1) if others else images(4)
    partners, shares = torch.tensor([1, 0, 3, 2]), torch.tensor([0.3, 1.0, 0.0, 0.8])
    made = network(first, HiddenMix(depth, partners, shares), second if others else None)
    expected = by_hand(network, first, second, shares, partners.tolist(), depth)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    # Shares of 1 mix nothing.
    alone = network(first, HiddenMix(depth, partners, torch.ones(4)), second)
    torch.testing.assert_close(alone, network(first), rtol=1e-4, atol=1e-5)


def test_two_streams_have_batch_statistics_of_their_own_up_to_the_depth():
    torch.manual_seed(0)
    network = build_network("plain", "resnet32", 4).train()
    network(images(4), HiddenMix(1, torch.arange(4), torch.full((4,), 0.5)), images(4, seed=1))
    assert network.trunk.layer1[0].bn1.num_batches_tracked == 2
    assert network.trunk.layer2[0].bn1.num_batches_tracked == 1


def test_a_steps_depth_is_drawn_by_seed_epoch_and_step():
    mixing = ManifoldMixup()
    drawn = [mixing.depth_of(Progress(epoch, 9, step, 5), 3) for epoch in range(1, 10) for step in range(20)]
    assert drawn == [mixing.depth_of(Progress(epoch, 9, step, 5), 3) for epoch in range(1, 10) for step in range(20)]
    assert np.bincount(drawn, minlength=4).tolist()[3] == 0
    assert min(np.bincount(drawn)) > 35  # of 180
    assert {ManifoldMixup(depth=3).depth_of(Progress(1, 9, step, 5), 3) for step in range(9)} == {3}


@pytest.mark.parametrize("mix", ["mixup", "manifold(depth=2)", "manifold(depth=1, partner_q=-1)"])
def test_a_step_weighs_both_labels(make_method, mix):
    method = make_method(ERM, COUNTS, mix=mix, objective="focal", weights="inverse")
    method.network.eval()
    labels, partners = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 3, 2])
    shares = torch.tensor([0.25, 1.0, 0.5, 0.0])
    step_counts = torch.zeros(4).index_add(0, labels, shares).index_add(0, partners, 1 - shares)
    train = Batch(images(4), labels, np.arange(4), partners, shares, step_counts_C=step_counts)
    batch = {"train": train}
    if mix != "mixup":
        rows = torch.arange(4) if "q=" in mix else torch.tensor([1, 0, 3, 2])
        hidden = torch.tensor([0.4, 0.9, 0.5, 0.1])
        batch["train"] = Batch(images(4), labels, np.arange(4), partners, shares, rows, hidden, step_counts)
        second = images(4)
        if "q=" in mix:
            second = images(4, seed=1)
            batch["partners"] = Batch(second, partners, np.arange(4))
        logits = by_hand(method.network, images(4), second, hidden, rows.tolist(), 2 if "2" in mix else 1)
    else:
        logits = method.predict(images(4))
    loss, total = 0.0, 0.0
    for row in range(4):
        for label, share in ((labels[row], shares[row].item()), (partners[row], 1 - shares[row].item())):
            ce = F.cross_entropy(logits[row], label).item()
            loss += share / COUNTS[label] * (1 - np.exp(-ce)) ** 2 * ce
            total += share / COUNTS[label]
    result = method.step(batch, Progress(epoch=1, epochs=10, step=0, seed=0))
    assert result.loss.item() == pytest.approx(loss / total, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ({"weights": "inverse"}, "RW"),
        ({"weights": "effective"}, "CB-CE"),
        ({"weights": "effective", "objective": "focal"}, "CB-focal"),
        ({"weights": "effective", "defer": 0.8}, "CE-DRW"),
        ({"weights": "inverse", "defer": 0.8}, "CE-DRW, inverse"),
        ({"weights": "effective", "objective": "ldam", "defer": 0.8}, "LDAM-DRW"),
        ({"q": 0.0, "defer": 0.8}, "CE-DRS"),
        ({"q": -1.0, "defer": 0.8}, "CE-DRS, q=-1"),
        ({"q": "progressive"}, "CE, q=progressive"),
        ({"mix": "mixup"}, "mixup"),
        ({"mix": "cutmix", "q": 0.0}, "CutMix, q=0"),
        ({"mix": "remix", "weights": "effective", "defer": 0.8}, "Remix-DRW"),
        ({"mix": "manifold"}, "manifold mixup"),
        ({"mix": "manifold(partner_q=-1)"}, "manifold mixup, two samplers"),
        ({"mix": "mixup(partner_q=0)"}, "mixup, two samplers, partners q=0"),
        ({"mix": "mixup", "weights": "effective", "objective": "ldam", "defer": 0.8}, "LDAM-DRW + mixup"),
        ({"objective": "smoothed"}, "label-aware smoothing"),
        ({"objective": "hard"}, "hard-aware"),
        ({"objective": "gradual(form='linear')"}, "GraLoss, linear"),
        ({"objective": "gradual(scale=0.5)"}, "GraLoss, scale=0.5"),
        ({"objective": "focal(gamma=5)", "weights": "effective(beta=0.99)"}, "CB-focal, gamma=5, beta=0.99"),
        ({"objective": "focal(gamma=2)", "weights": "effective(beta=0.9999)"}, "CB-focal"),  # as they are without
        ({"objective": "adjusted(tau=2)"}, "logit-adjusted, τ=2"),
        ({"objective": "ldam", "weights": "effective", "defer": 0.5}, "LDAM-DRW, defer=0.5"),
        ({"mix": "mixup(alpha=0.2, partner_q=0)"}, "mixup, two samplers, partners q=0, alpha=0.2"),
    ],
)
def test_titles_are_the_fields(make_method, settings, title):
    assert make_method(ERM, COUNTS, **settings).title == title


@pytest.mark.parametrize(
    ("settings", "first"), [({"weights": "inverse"}, 1), ({"weights": "inverse", "defer": 0.8}, 9)]
)
def test_weights_apply_from_the_deferred_epoch_on(make_method, settings, first):
    method, plain = make_method(ERM, COUNTS, **settings), make_method(ERM, COUNTS)
    method.network.eval()
    plain.network.eval()
    labels = torch.tensor([0, 0, 0, 3])
    counts = torch.bincount(labels, minlength=4).float()
    batch = {"train": Batch(images(4), labels, np.arange(4), step_counts_C=counts)}
    differ = []
    for epoch in range(1, 11):
        progress = Progress(epoch=epoch, epochs=10, step=0, seed=0)
        differ.append(method.step(batch, progress).loss.item() != plain.step(batch, progress).loss.item())
    assert differ == [epoch >= first for epoch in range(1, 11)]
    assert method.streams[0].from_share == settings.get("defer", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mix", "mixap"], "method.mix=mixap is unknown; choose one of: none, mixup, remix"),
        (["mix", "mixup(alpha=0)"], "method.mix=mixup(alpha=0): alpha cannot be '0' (give a number above 0)"),
        (["mix", "mixup(alpha=None)"], "method.mix=mixup(alpha=None): mixup.alpha has no value"),
        (["mix", "none(alpha=1)"], "method.mix=none(alpha=1): this has no settings; leave them out, or choose another"),
        (["weights", "none(beta=0.9)"], "method.weights=none(beta=0.9): this has no settings"),
        (["mix", "remix(kappa=0.5)"], "method.mix=remix(kappa=0.5): remix has kappa=0.5; it must be at least 1"),
        (["mix", "manifold(depth=4)"], "depth=4) is too deep: the trunk of model.backbone=resnet32 has depths 0 to 3"),
        (
            ["mix", "mixup", "objective", "hard"],
            "method.objective=hard counts which images are recognised, and method.mix",
        ),
        (
            ["mix", "mixup(partner_q=0)", "objective", "gradual"],
            "adjusts for the classes that one sampler draws, and method.mix",
        ),
        (["defer", "0.8"], "method.defer=0.8 has nothing to defer with method.weights=none and method.q=1"),
        (["defer", "1", "weights", "inverse"], "method.defer=1 defers to after the last epoch"),
    ],
)
def test_settings_that_make_no_sense_together_are_named_in_one_line(workplace, capsys, arguments, message):
    flags = [
        word for key, value in zip(arguments[::2], arguments[1::2], strict=True) for word in (f"--method.{key}", value)
    ]
    with pytest.raises(SystemExit) as stopped:
        run(ERM, flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not list(workplace.glob("runs/*"))


SHORT = ["--optim.epochs", "2", "--input.batch_size", "64", "--input.image_size", "8", "--loop.eval_every", "2"]


def test_accumulated_parts_of_a_weighted_step_are_the_step(workplace):
    """Without batch norm's statistics: the loss of the first step is that of the whole batch, cut or not."""
    losses = {}
    for parts in ("1", "4"):
        run(ERM, [*SHORT, "--optim.epochs", "1", "--optim.lr", "1e-9", "--optim.accumulate", parts, "--method.weights",
                  "inverse", "--method.mix", "mixup", "--run", f"runs/{parts}"])  # fmt: skip
        losses[parts] = json.loads((workplace / f"runs/{parts}/metrics.jsonl").read_text())["loss"]
    # Parts differ by their batch statistics alone.
    assert losses["4"] == pytest.approx(losses["1"], rel=0.02)


def _train(rank: int, argv: list[str]) -> None:
    run(ERM, argv)


def test_two_processes_have_the_weighted_mean_and_the_depths_of_one(workplace):
    settings = [*SHORT, "--optim.epochs", "1", "--optim.lr", "0.0001", "--loop.sync_batch_norm", "true"]
    settings += ["--method.weights", "inverse", "--method.mix", "manifold(partner_q=-1, per_image=True)"]
    for ranks in (1, 2):
        assert on_ranks(workplace, _train, [*settings, "--run", f"runs/{ranks}"], ranks=ranks) == [0] * ranks
    one, two = (rows(workplace / f"runs/{ranks}")[0]["loss"] for ranks in (1, 2))
    # The mean of the ranks' own weighted means would be elsewhere.
    assert two == pytest.approx(one, rel=1e-4)
