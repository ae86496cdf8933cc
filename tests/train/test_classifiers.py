"""Classifiers, the epochs that they are trained on, and the baselines that are chosen among them."""

import copy
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shards.errors import UserError
from train.features.candidates import RATES, TAUS, Candidate, Families, Judge, table
from train.features.classifiers import logit_adjusted, measure, nearest_means, tau_normalized
from train.features.commands import ClassifierOptim, ReferenceOptim
from train.features.gaussians import find_support, fit, head_classes
from train.features.mixing import Mixture, mixed_epoch, real_epoch
from train.features.passes import Passes, Source
from train.features.recipes import Recipe
from train.features.selection import best_temperature, judge, select
from train.features.training import Stack, train_together


def make_mixture(counts=(200, 30, 5), **options) -> Mixture:
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.tensor(counts))
    features = (torch.rand(len(labels), 8, generator=generator) + torch.eye(len(counts), 8)[labels]).half()
    gaussians = fit(features, labels, len(counts))
    support = find_support(gaussians, 2, head_classes(gaussians.counts_C, 100))
    return Mixture(features, labels, gaussians, support, gaussians.counts_C.max() - gaussians.counts_C, **options)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed(mixture, beta, batch_size, generator):
    """A mixed epoch at one β as plain batches."""
    for views, labels in mixed_epoch(mixture, [beta], batch_size, generator):
        (features,) = views
        yield features.clone(), labels


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = zip(*batches, strict=True)
    return torch.cat(features), torch.cat(labels)


@pytest.mark.parametrize("chunk", [1, 50, 65536])
def test_an_epoch_holds_every_real_feature_once_and_balances_the_classes(chunk):
    mixture = make_mixture((40, 9, 2), chunk=chunk)
    batches = list(mixed(mixture, 0.4, 16, seeded()))
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
            yield features.clone(), labels
            del features

    monkeypatch.setattr(Mixture, "generated", watched)
    for _ in mixed(mixture, 0.4, 32, seeded()):
        assert sum(chunk() is not None for chunk in alive) <= 2
    assert len(alive) == 6


def test_ranks_share_an_epoch_in_equal_steps():
    whole = [list(mixed(make_mixture(chunk=64, rank=r, world_size=3), 0.4, 16, seeded())) for r in range(3)]
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


def test_a_plain_epoch_holds_every_feature_once():
    mixture = make_mixture((400, 40, 4))
    _, labels = joined(real_epoch(mixture, "each-once", 16, seeded()))
    assert torch.bincount(labels).tolist() == [400, 40, 4]


def test_several_betas_share_what_is_drawn():
    mixture = make_mixture((40, 9, 2), chunk=30)
    seen = [([view.clone() for view in views], labels) for views, labels in
            mixed_epoch(mixture, [0.0, 0.4, torch.tensor([0.0, 0.4, 0.4])], 16, seeded())]  # fmt: skip
    assert torch.bincount(torch.cat([labels for _, labels in seen])).tolist() == [40, 40, 40]
    none, some, per_class = (torch.cat([views[i] for views, _ in seen]) for i in range(3))
    torch.testing.assert_close(some, per_class)
    alike = (none == some).all(1)
    assert 51 <= alike.sum() < len(alike)  # the real ones, and nothing of the small classes


def slow(first: nn.Linear, recipe: Recipe, batches, teacher=None, head=None) -> nn.Module:
    """What a Stack does, by autograd and torch's SGD, one classifier at a time, features divided by the unit."""
    torch.manual_seed(0)
    linear = copy.deepcopy(first)
    if recipe.kind == "linear":
        linear = nn.Linear(first.in_features, first.out_features)
    else:
        linear.weight.data *= recipe.unit
    scales = nn.Parameter(torch.ones(linear.out_features))
    learnt = {"linear": [*linear.parameters()], "lws": [scales], "scaled": [*linear.parameters(), scales]}[recipe.kind]
    optimizer = torch.optim.SGD(learnt, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    for epoch in range(1, recipe.epochs + 1):
        optimizer.param_groups[0]["lr"] = recipe.rate(epoch)
        alpha = recipe.distill * (recipe.distill_base ** (epoch / recipe.epochs) - 1)
        for features, labels in batches():
            logits = scales * linear(features / recipe.unit)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                inside = head[labels]
                kl = F.kl_div(
                    logits[inside].log_softmax(1), teacher(features[inside]).log_softmax(1),
                    reduction="sum", log_target=True,
                )  # fmt: skip
                loss = loss + alpha * kl / len(labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lambda features: scales * linear(features / recipe.unit)


CRT = Recipe("linear", 6, 0.2, weight_decay=5e-4, early_cosine=True)
LWS = Recipe("lws", 3, 0.2, weight_decay=5e-4, early_cosine=True)


@pytest.mark.parametrize(
    "recipe",
    [CRT, LWS, Recipe("scaled", 5, 0.3, unit=2.5), Recipe("scaled", 5, 0.3, unit=2.5, distill=1.0, teacher_tau=0.7)],
)
def test_a_stack_equals_autograd_one_by_one(recipe):
    """cRT and LWS by the reference's definition on the same features and rates, and AFG's own: logits to 1e-5."""
    mixture = make_mixture((60, 20, 5))
    torch.manual_seed(3)
    first = nn.Linear(8, 3)
    counts, head = mixture.gaussians.counts_C, mixture.support.head_C

    def batches():
        return real_epoch(mixture, "oversampled", 32, generator)

    def views():
        return (([features], labels) for features, labels in batches())

    # Beside others, one of which trains longer: a neighbour has no effect.
    kind = "lws" if recipe.kind == "lws" else "scaled"
    others = [replace(recipe, lr=recipe.lr * 3, epochs=recipe.epochs + 2), replace(recipe, kind=kind)]
    stack = Stack(first, [others[0], recipe, others[1]], counts, head, seed=0)
    generator = seeded()
    ((_, found, _),) = train_together([stack], views, 6, "")
    generator = seeded()
    with torch.enable_grad():
        teacher = logit_adjusted(first, counts, recipe.teacher_tau) if recipe.distill else None
        expected = slow(first, recipe, batches, teacher, head)
    features = mixture.features_ND.float()
    torch.testing.assert_close(found.linear(features), expected(features), rtol=1e-5, atol=1e-5)


def test_the_references_last_epoch_has_rate_zero():
    assert CRT.rate(6) == pytest.approx(0, abs=1e-12)
    assert CRT.rate(3) == pytest.approx(0.1)
    ours = replace(CRT, early_cosine=False)
    assert ours.rate(1) == pytest.approx(0.2)
    assert ours.rate(6) > 0


def test_label_aware_smoothing_by_hand():
    """MiSLAS's loss: (1 − ε_y)·CE + ε_y·the mean over all classes, the target included."""
    first, labels, features = nn.Linear(4, 3), torch.tensor([0, 2, 1]), torch.rand(3, 4)
    counts = torch.tensor([100, 60, 10])
    recipe = Recipe("scaled", 1, 0.1, momentum=0.0, weight_decay=0.0, smoothing=(0.3, 0.1))
    stack = Stack(first, [recipe], counts, counts > 100, seed=0)
    ((found,),) = train_together([stack], lambda: iter([([features], labels)]), 1, "")
    epsilon = 0.1 + 0.2 * ((counts - 10) / 90 * torch.pi / 2).sin()
    weight, bias = (part.detach().clone().requires_grad_() for part in (first.weight, first.bias))
    logs = F.linear(features, weight, bias).log_softmax(1)
    loss = -((1 - epsilon[labels]) * logs[range(3), labels] + epsilon[labels] * logs.mean(1)).mean()
    loss.backward()
    assert found.rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    scale = found.linear.bias / (bias - 0.1 * bias.grad)
    torch.testing.assert_close(found.linear.weight, (weight - 0.1 * weight.grad) * scale[:, None], rtol=1e-4, atol=1e-6)


def test_class_weights_by_hand():
    """Σ w·l / Σ w over a step's batch, as torch's own weighted cross-entropy has it."""
    first, labels, features = nn.Linear(4, 3), torch.tensor([0, 2, 1, 0]), torch.rand(4, 4)
    counts = torch.tensor([100, 60, 10])
    recipe = Recipe("linear", 1, 0.1, momentum=0.0, weight_decay=0.0, weights="inverse")
    stack = Stack(first, [recipe, replace(recipe, weights="none")], counts, counts > 100, seed=0)
    start = stack.linear(0)
    found = train_together([stack], lambda: iter([([features], labels)]), 1, "")[0]
    for one, weights in zip(found, (1 / counts, torch.ones(3)), strict=True):
        weight, bias = (part.detach().clone().requires_grad_() for part in (start.weight, start.bias))
        loss = F.cross_entropy(F.linear(features, weight, bias), labels, weight=weights.float())
        loss.backward()
        assert one.rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(one.linear.weight, weight - 0.1 * weight.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.linear.bias, bias - 0.1 * bias.grad, rtol=1e-5, atol=1e-6)


def test_class_weights_of_two_ranks_are_those_of_the_whole_batch():
    first, labels, features = nn.Linear(4, 3), torch.tensor([0, 2, 1, 0, 0, 0]), torch.rand(6, 4)
    counts = torch.tensor([100, 60, 10])
    recipe = Recipe("linear", 1, 0.1, momentum=0.0, weight_decay=0.0, weights="inverse")

    def stepped(features, labels, average) -> nn.Linear:
        stack = Stack(first, [recipe], counts, counts > 100, seed=0)
        stack.begin_epoch(1)
        stack.step(features, labels, average)
        return stack.linear(0)

    whole = stepped(features, labels, lambda mine: mine)
    # A rank's sum of weights is the first thing that is averaged.
    mean = sum((1 / counts)[part].sum() for part in labels.chunk(2)) / 2 * 3 / (1 / counts).sum()

    def with_the_others(mine):
        return mean.expand_as(mine) if mine.shape == (1,) else mine

    one, other = (
        stepped(part, reported, with_the_others)
        for part, reported in zip(features.chunk(2), labels.chunk(2), strict=True)
    )
    torch.testing.assert_close((one.weight + other.weight) / 2, whole.weight, rtol=1e-5, atol=1e-6)


def test_a_diverged_classifier_is_left_out_and_leaves_its_neighbours_alone():
    mixture = make_mixture((60, 20, 5))
    families = families_of(mixture, rates=[1.0, 1e30])
    found = families.search(Source("oversampled", 16), {"a": [replace(CRT, lr=0.1)]})["a"]
    assert all(torch.isfinite(one.linear.weight).all() for one in found)
    with pytest.raises(UserError, match=r"a: the loss is not finite at any rate from 1e\+30 to 1e\+30; lower"):
        families_of(mixture, rates=[1.0]).search(Source("oversampled", 16), {"a": [replace(CRT, lr=1e30)]})
    bad = torch.full((4, 3), float("inf")), torch.zeros(4).long()
    with pytest.raises(UserError, match="on features, the model's logits hold nan or inf"):
        measure(nn.Linear(3, 2), bad)


def families_of(mixture: Mixture, judge: Judge | None = None, **options) -> Families:
    torch.manual_seed(0)
    linear = nn.Linear(8, len(mixture.targets_C))
    optim = ClassifierOptim(epochs=4, batch_size=32)
    passes = Passes(linear, mixture, 0, folder=options.pop("folder", None))
    return Families(
        linear, mixture, judge or judge_of(mixture), passes, optim, ReferenceOptim(batch_size=32), **options
    )


def test_a_grid_whose_end_wins_is_extended():
    mixture = make_mixture((60, 20, 5))
    labels = torch.where(torch.arange(85) % 4 == 0, (mixture.labels_N + 1) % 3, mixture.labels_N)  # being sure costs
    judge = replace(judge_of(mixture), watched=(mixture.features_ND, labels))
    families = families_of(mixture, judge)
    for first in (1e-2, 50.0):
        found = families.search(Source("oversampled", 32), {"cRT": [replace(CRT, lr=first, epochs=3)]})["cRT"]
        rates = sorted(one.setting["lr"] for one in found)
        best = families.judge.best(found).setting["lr"]
        assert len(rates) > len(RATES)
        assert rates[0] < best < rates[-1]


def test_finished_passes_are_not_trained_again(tmp_path, monkeypatch):
    mixture = make_mixture((60, 20, 5))
    train = [Source("oversampled", 32), [CRT, LWS]]
    once = families_of(mixture, folder=tmp_path).passes.train(*train)
    monkeypatch.setattr("train.features.passes.train_together", lambda *a, **o: pytest.fail("trained again"))
    again = families_of(mixture, folder=tmp_path).passes.train(*train)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one.linear.weight, other.linear.weight)
        assert one.rows == other.rows
    with pytest.raises(pytest.fail.Exception):
        families_of(mixture, folder=tmp_path).passes.train(train[0], [CRT, replace(LWS, lr=0.3)])


def test_memory_bounds_what_trains_together(monkeypatch):
    mixture = make_mixture((60, 20, 5))
    together = families_of(mixture).passes.train(Source("oversampled", 32), [CRT, replace(CRT, lr=0.5)])
    monkeypatch.setattr("train.features.passes.PASS_VALUES", 1)
    apart = families_of(mixture).passes.train(Source("oversampled", 32), [CRT, replace(CRT, lr=0.5)])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.linear.weight, other.linear.weight)


def test_nearest_means_by_hand():
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 8.0]])
    near, far = torch.tensor([[0.5, 3.0]]), torch.tensor([[1.0, 2.0]])
    by_distance = nearest_means(features, torch.tensor([0, 0, 1]), 2, cosine=False)
    by_angle = nearest_means(features, torch.tensor([0, 0, 1]), 2, cosine=True)
    assert [by_distance(x).argmax().item() for x in (near, far)] == [0, 0]
    assert [by_angle(x).argmax().item() for x in (near, far)] == [1, 1]


def constant(c: int) -> nn.Linear:
    linear = nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.zeros(2, 2), torch.eye(2)[c]
    return linear


def scaled(*weights: float) -> nn.Linear:
    linear = nn.Linear(2, 2)
    linear.weight.data, linear.bias.data = torch.diag(torch.tensor(weights)), torch.zeros(2)
    return linear


def test_of_those_within_an_error_of_the_best_the_likeliest_is_selected():
    perfect = scaled(1.0, 1.0)
    features = torch.eye(2).repeat(50, 1)
    labels = torch.tensor([0, 1]).repeat(50)
    found = select([constant(0), perfect, perfect], (features, labels))
    assert (found.index, found.best) == (1, 1)  # the simpler of two that tie
    assert found.behind == pytest.approx([0.5, 0, 0])
    # One image of a hundred has another class, and both miss it: they tie by accuracy. Who is less sure is likelier.
    labels[1] = 0
    less_sure = scaled(1.0, 0.5)
    found = select([constant(1), perfect, less_sure], (features, labels))
    assert (found.index, found.best) == (2, 1)
    assert found.behind[1:] == [0, 0]
    assert found.losses[2] < found.losses[1] < found.losses[0]
    few = select([perfect, constant(0)], (features[:2], torch.tensor([0, 0])))
    assert few.errors[0] > 0.2  # two images say little


def test_the_error_is_that_of_images_drawn_anew_within_each_class():
    labels = torch.tensor([0] * 40 + [1] * 10)
    features = torch.eye(2)[labels]
    features[:4], features[40:45] = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])  # 4 of 40 and 5 of 10 mistaken
    found = select([constant(0), scaled(1.0, 1.0)], (features, labels))
    assert found.behind[0] == pytest.approx((0.9 + 0.5 - 1) / 2)
    # constant(0) is right on those 4 alone of class 0, and on the other 5 of class 1 never.
    variance = np.var([1] * 4 + [0] * 36, ddof=1) / 40 + np.var([1] * 5 + [0] * 5, ddof=1) / 10
    assert found.errors[0] == pytest.approx(variance**0.5 / 2)


def test_classes_of_one_image_say_how_little_they_say():
    perfect, half = (nn.Linear(20, 20) for _ in range(2))
    for linear in (perfect, half):
        linear.weight.data, linear.bias.data = torch.eye(20), torch.zeros(20)
    half.weight.data[:10] = torch.eye(20)[:10].roll(1, 0)  # ten of twenty classes are mistaken
    found = select([perfect, half], (torch.eye(20), torch.arange(20)))
    assert found.behind[1] == pytest.approx(0.5)
    assert found.errors[1] == pytest.approx(0.5 / 19**0.5)


def test_who_is_measurably_worse_is_not_selected_however_likely():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 2, generator=generator)
    labels = features.argmax(1)
    turned = nn.Linear(2, 2)
    turned.weight.data, turned.bias.data = torch.tensor([[1.0, 0.3], [0.3, 1.0]]), torch.tensor([0.2, 0.0])
    found = select([turned, scaled(1.0, 1.0)], (features, labels))
    assert found.index == 1
    assert found.behind[0] > found.errors[0]


def test_a_classifier_that_is_merely_too_sure_is_no_worse():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 2, generator=generator)
    labels = (features + torch.randn(300, 2, generator=generator)).argmax(1)
    once, many_times = judge(scaled(1.0, 1.0), (features, labels)), judge(scaled(9.0, 9.0), (features, labels))
    assert once[1] == pytest.approx(many_times[1], abs=1e-3)
    # By hand: the same search on a grid.
    losses = {t: F.cross_entropy(features / t, labels).item() for t in np.geomspace(0.1, 10, 400)}
    assert best_temperature(scaled(1.0, 1.0), (features, labels)) == pytest.approx(min(losses, key=losses.get), rel=0.1)


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
    assert not judge.chooses  # two images
    many = replace(judge, watched=(watched[0].repeat(10, 1), watched[1].repeat(10)))
    scored = [many.scored(one) for one in candidates]
    assert many.best(scored).setting == {"a": 2.0}
    assert judge.report(right)["top1"] == 0
    assert judge.best(scored).setting == {"a": 1.0}  # the first
    surer = nn.Linear(2, 2)
    surer.weight.data, surer.bias.data = 5 * torch.eye(2), torch.zeros(2)
    assert many.best([*scored, many.scored(Candidate({"a": 3.0}, surer))]).setting == {"a": 3.0}  # ties: the loss


def test_every_baseline_is_there_and_learns_what_it_may():
    mixture = make_mixture((60, 20, 5))
    families = families_of(mixture)
    judge, linear = families.judge, families.stage_one
    found = {
        name: judge.best(families.closed(name)) for name in ("stage one", "tau-normalized", "logit adjustment", "NCM")
    }
    names = ("LWS", "cRT", "no generation", "oversampling", "MiSLAS")
    found |= {name: judge.best(tried) for name, tried in families.on_real_features(*names).items()}
    assert found["stage one"].linear is linear
    assert found["logit adjustment"].setting["tau"] in TAUS
    assert found["MiSLAS"].setting.keys() == {"lr", "smoothing_head", "smoothing_tail"}
    ratio = found["LWS"].linear.weight / linear.weight
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert found["cRT"].score[0] > found["stage one"].score[0]


def test_the_table_shows_names_settings_and_percent():
    figures = {"top1": 0.5, "balanced_accuracy": 0.25, "many": 1.0, "medium": None, "few": 0.125}
    text = table([{"name": "cRT", "setting": {"lr": 0.2}, **figures}, {"name": "AFG", "setting": {}, **figures}])
    assert text.splitlines() == [
        "classifier  chosen  overall  balanced   many  medium   few",
        "cRT         lr 0.2     50.0      25.0  100.0       –  12.5",
        "AFG                    50.0      25.0  100.0       –  12.5",
    ]


def test_selecting_on_many_images_a_class_takes_little_memory():
    features_ND = torch.rand(60_000, 2, generator=torch.Generator().manual_seed(0))
    labels_N = (features_ND[:, 0] > features_ND[:, 1]).long()
    linears = [nn.Linear(2, 2) for _ in range(2)]
    for linear, weight in zip(linears, ([[0, 1], [1, 0]], [[1, 0], [0, 0.5]]), strict=True):
        linear.weight.data, linear.bias.data = torch.tensor(weight).float(), torch.zeros(2)
    tracemalloc.start()
    found = select(linears, (features_ND, labels_N))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(found.errors) > 0
    assert most < 100e6  # 2,000 draws of 30,000 images would take 480


def test_families_of_other_momenta_train_on_the_same_features():
    families = families_of(make_mixture((60, 20, 5)), rates=[1.0])
    families.optim.momentum = 0.5  # reference.momentum stays 0.9
    found = families.on_real_features("LWS", "cRT", "oversampling")
    assert [len(found[name]) for name in ("LWS", "cRT", "oversampling")] == [1, 1, 1]


def test_a_batch_may_be_larger_than_all_features():
    ((features, labels),) = mixed(make_mixture((40, 9, 2)), 0.4, 10**12, seeded())
    assert len(features) == len(labels) == 120


def test_a_single_epoch_has_the_whole_rate():
    assert Recipe("linear", epochs=1, lr=0.2, early_cosine=True).rate(1) == 0.2
