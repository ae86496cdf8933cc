import numpy as np
import pytest

from pipeline.plan import EvalPlan, Stream, TrainPlan
from pipeline.sampling import class_probabilities
from shards.errors import UserError
from shards.index import Dataset, Split

COUNTS = np.array([120, 60, 24, 12, 6, 3, 1])


def make_split(counts: np.ndarray, name: str = "train") -> Split:
    """A split of 32×48 images in memory, without shards."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    samples = np.zeros(len(labels), dtype=[(n, "<i8") for n in ("offset", "size", "shard", "label", "height", "width")])
    samples["label"], samples["height"], samples["width"] = labels, 32, 48
    return Split(name, samples, np.argsort(labels, kind="stable"), np.asarray(counts), ())


def make_plan(counts=COUNTS, q=1.0, batch_size=16, **options) -> TrainPlan:
    return TrainPlan(
        make_split(counts),
        (Stream("only", q=q, augment="imagenet"),),
        batch_size,
        image_size=24,
        seed=options.pop("seed", 3),
        epochs=options.pop("epochs", 10),
        **options,
    )


def epoch_ids(plan: TrainPlan, epoch: int) -> np.ndarray:
    first = epoch * plan.steps_per_epoch
    return np.concatenate([plan.draws(first + step)[0].ids_B for step in range(plan.steps_per_epoch)])


@pytest.mark.parametrize("q", [1.0, 0.5, 0.0, -1.0, -3.0, 50.0])
def test_probability_of_a_class_is_its_count_to_the_power_q(q):
    probabilities = class_probabilities(COUNTS, q)
    weights = (COUNTS / COUNTS.max()).astype(np.longdouble) ** q
    np.testing.assert_allclose(probabilities, (weights / weights.sum()).astype(float), rtol=1e-12)
    assert abs(probabilities.sum() - 1) < 1e-12


@pytest.mark.parametrize("sign", [1, -1])
def test_an_exponent_that_nothing_can_be_computed_with_is_named(sign):
    assert class_probabilities(COUNTS, sign * 1e300).tolist() == [1, 0, 0, 0, 0, 0, 0][::sign]
    with pytest.raises(UserError, match="is too far from 0 for classes of such different sizes"):
        class_probabilities(COUNTS, sign * 1.7e308)


def test_reversed_sampler_is_equation_4_of_bbn():
    weights = COUNTS.max() / COUNTS
    np.testing.assert_allclose(class_probabilities(COUNTS, -1.0), weights / weights.sum(), rtol=1e-12)


def test_progressive_sampling_goes_from_instance_to_class_balanced():
    np.testing.assert_allclose(class_probabilities(COUNTS, "progressive", 0.0), COUNTS / COUNTS.sum())
    np.testing.assert_allclose(class_probabilities(COUNTS, "progressive", 1.0), 1 / 7)
    np.testing.assert_allclose(
        class_probabilities(COUNTS, "progressive", 0.25), 0.75 * COUNTS / COUNTS.sum() + 0.25 / 7
    )
    plan = make_plan(q="progressive", batch_size=4000, epochs=3)
    share_of_largest = [np.mean(plan.split.samples["label"][plan.draws(epoch)[0].ids_B] == 0) for epoch in range(4)]
    expected = np.array([120 / 226, (120 / 226 + 1 / 7) / 2, 1 / 7, 1 / 7])  # it stays balanced beyond the last
    np.testing.assert_allclose(share_of_largest, expected, atol=5 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize("q", [-1.0, 0.0, 0.5, "progressive"])
def test_a_class_without_images_is_never_drawn(q):
    counts = np.array([0, 5, 0, 9, 0])
    assert (class_probabilities(counts, q)[[0, 2, 4]] == 0).all()
    plan = make_plan(counts, q=q, batch_size=5000)
    drawn = np.bincount(plan.split.samples["label"][plan.draws(0)[0].ids_B], minlength=5)
    assert drawn[[0, 2, 4]].sum() == 0
    assert (drawn[[1, 3]] > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "reversed"])
def test_an_exponent_that_is_none_is_named(bad):
    with pytest.raises(UserError, match=f"{bad}"):
        class_probabilities(COUNTS, bad)


def test_no_images_at_all_is_an_error():
    with pytest.raises(UserError, match="no class has a training image"):
        class_probabilities([0, 0], 1.0)
    with pytest.raises(UserError, match="'train' has no images"):
        make_plan(np.array([0, 0]))


def test_uniform_stream_visits_every_image_exactly_once_an_epoch():
    plan = make_plan(COUNTS, batch_size=113)  # 226 images: two full batches
    epochs = [epoch_ids(plan, epoch) for epoch in range(3)]
    for ids in epochs:
        np.testing.assert_array_equal(np.sort(ids), np.arange(226))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()


def test_uniform_stream_drops_a_different_rest_each_epoch():
    plan = make_plan(COUNTS, batch_size=50)
    missed = [set(range(226)) - set(epoch_ids(plan, epoch).tolist()) for epoch in range(2)]
    assert [len(rest) for rest in missed] == [26, 26]
    assert missed[0] != missed[1]


@pytest.mark.parametrize("counts", [[1], [1, 1], [3, 2]])
def test_a_batch_larger_than_the_split_repeats_images_evenly(counts):
    plan = make_plan(np.array(counts), batch_size=12)
    assert plan.steps_per_epoch == 1
    times = np.bincount(epoch_ids(plan, 0), minlength=sum(counts))
    assert times.max() - times.min() <= 1
    assert times.sum() == 12


def test_reversed_stream_follows_equation_4_within_five_standard_errors():
    plan = make_plan(q=-1.0, batch_size=1000)
    draws = np.concatenate([plan.draws(step)[0].ids_B for step in range(100)])
    expected = (1 / COUNTS) / (1 / COUNTS).sum()
    share = np.bincount(plan.split.samples["label"][draws], minlength=7) / len(draws)
    error = np.sqrt(expected * (1 - expected) / len(draws))
    assert (np.abs(share - expected) < 5 * error).all(), (share - expected) / error


def test_images_inside_a_class_are_drawn_uniformly():
    plan = make_plan(np.array([40, 4]), q=0.0, batch_size=1000)
    draws = np.concatenate([plan.draws(step)[0].ids_B for step in range(40)])
    labels = plan.split.samples["label"]
    expected = np.where(labels == 0, 0.5 / 40, 0.5 / 4)
    share = np.bincount(draws, minlength=44) / len(draws)
    assert (np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / len(draws))).all()


@pytest.mark.parametrize("q", [1.0, -1.0])
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_world_size_sees_the_same_global_batches(q, world_size):
    alone = make_plan(q=q, batch_size=16)
    ranks = [make_plan(q=q, batch_size=16, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {rank.steps_per_epoch for rank in ranks} == {alone.steps_per_epoch}
    for step in (0, 5, alone.steps_per_epoch + 1):
        whole, parts = alone.draws(step)[0], [rank.draws(step)[0] for rank in ranks]
        for attribute in ("ids_B", "windows_B4", "flips_B"):
            np.testing.assert_array_equal(
                getattr(whole, attribute), np.concatenate([getattr(part, attribute) for part in parts])
            )


def test_draws_depend_on_seed_epoch_step_and_stream_and_on_nothing_else():
    plan = make_plan(q=-1.0)
    first = plan.draws(7)[0].ids_B
    plan.draws(3)
    np.testing.assert_array_equal(first, plan.draws(7)[0].ids_B)
    np.testing.assert_array_equal(first, make_plan(q=-1.0).draws(7)[0].ids_B)
    for other in (plan.draws(8)[0], plan.draws(7 + plan.steps_per_epoch)[0], make_plan(q=-1.0, seed=4).draws(7)[0]):
        assert (first != other.ids_B).any()
    renamed = TrainPlan(plan.split, (Stream("other", q=-1.0),), 16, 24, 3, 10)
    assert (first != renamed.draws(7)[0].ids_B).any()


@pytest.mark.parametrize("batch_size", [0, 15])
def test_a_batch_that_ranks_cannot_share_is_an_error(batch_size):
    with pytest.raises(UserError, match=f"batch_size={batch_size} must be a positive multiple of the 2 processes"):
        make_plan(batch_size=batch_size, rank=0, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 300])
def test_evaluation_sees_every_sample_exactly_once_over_all_ranks(world_size):
    split = make_split(COUNTS)
    seen = [
        draw.ids_B
        for rank in range(world_size)
        for plan in [EvalPlan(split, 16, 24, rank=rank, world_size=world_size)]
        for step in range(plan.steps)
        for draw in plan.draws(step)
    ]
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(226))
    assert all(1 <= len(ids) <= 16 for ids in seen)


def test_plans_work_on_a_dataset_from_disk(digits: Dataset):
    plan = TrainPlan(digits.splits["train"], (Stream("u"), Stream("r", q=-1.0)), 16, 16, 0, 1)
    uniform, reverse = plan.draws(0)
    assert len(uniform.ids_B) == len(reverse.ids_B) == 16
    labels = digits.splits["train"].samples["label"]
    assert labels[reverse.ids_B].mean() > labels[uniform.ids_B].mean()  # later digits are rarer
