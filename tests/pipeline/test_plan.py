import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.distortions.strong import DISTORTION
from pipeline.mix import CutMix, Mixup, Remix
from pipeline.plan import Draw, EvalPlan, Stream, TrainPlan
from pipeline.sampling import epoch_order
from shards.errors import UserError
from shards.index import SAMPLE, Split

COUNTS = np.array([120, 60, 24, 12, 6, 3, 1])  # 226 images
SHARD = 20  # samples

EVERY_KIND = (
    Stream("uniform", 1.0, "imagenet"),
    Stream("reversed", -1.0, "strong"),
    Stream("progressive", "progressive", "cifar"),
    Stream("chosen", augment="strong-cifar", probabilities=(0, 0, 0, 0, 0.25, 0.25, 0.5)),
    Stream("independent", augment="shift", replacement=True),
    Stream("windowed", augment="none", shard_window=3),
    Stream("view", augment="imagenet", repeats="uniform"),
    Stream("other view", augment="strong", repeats="reversed"),
    Stream("composed", augment="imagenet+rand(2,9)+autoaugment+trivial+cutout(6)"),
    Stream("mixed", augment="cifar", mix=Mixup()),
    Stream("cut", -1.0, mix=CutMix(per_image=True, probability=0.5)),
    Stream("mixed with another", mix=Remix(partner="reversed", hidden=True)),
)


def make_split(counts=COUNTS, name: str = "train") -> Split:
    """Images of many sizes in shards of SHARD samples, in memory."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    samples = np.zeros(len(labels), dtype=SAMPLE)
    samples["label"], samples["shard"] = labels, np.arange(len(labels)) // SHARD
    samples["height"], samples["width"] = generator.integers(20, 90, (2, len(labels)))
    shards = tuple(Path(f"{name}-{i:06}.tar") for i in range(-(-len(labels) // SHARD)))
    return Split(name, samples, np.argsort(labels, kind="stable"), np.asarray(counts), shards)


def make_plan(*specs: Stream, counts=COUNTS, batch_size: int = 16, **options) -> TrainPlan:
    options = {"image_size": 24, "seed": 3, "epochs": 10, **options}
    return TrainPlan(make_split(counts), specs or EVERY_KIND, batch_size, **options)


def epoch_ids(plan: TrainPlan, epoch: int, stream: int = 0) -> np.ndarray:
    first = epoch * plan.steps_per_epoch
    return np.concatenate([plan.draws(first + step)[stream].ids_B for step in range(plan.steps_per_epoch)])


ARRAYS = ("ids_B", "windows_B4", "flips_B", "distortions_B", "mixing_B")


def assert_same(ours: list[Draw], theirs: list[Draw]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.mix == other.mix
        for name in ARRAYS:
            array, expected = getattr(one, name), getattr(other, name)
            assert (array is None) == (expected is None)
            if array is not None:
                assert array.dtype == expected.dtype
                np.testing.assert_array_equal(array, expected)


def joined(parts: list[list[Draw]]) -> list[Draw]:
    """The global batch of each stream, from the draws of all ranks in turn."""
    together = []
    for draws in zip(*parts, strict=True):
        arrays = {n: [getattr(d, n) for d in draws] for n in ARRAYS if getattr(draws[0], n) is not None}
        together.append(Draw(**{n: np.concatenate(a) for n, a in arrays.items()}, mix=draws[0].mix))
    return together


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_of_any_number_share_the_same_global_batches_of_every_kind_of_stream(world_size):
    alone = make_plan()
    ranks = [make_plan(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(alone.steps_per_epoch - 1, alone.steps_per_epoch + 2):  # across an epoch's end
        whole = alone.draws(step)
        assert all(len(draw.ids_B) == 16 for draw in whole)
        assert_same(joined([plan.draws(step) for plan in ranks]), whole)


@pytest.mark.parametrize(
    ("stream", "digests"),
    [
        ("uniform", ["5a70965e8d08b85c", "f58efbd298124d00"]),
        ("reversed", ["358045d6054ae582", "9cf6ce12ab113245"]),
        ("progressive", ["7dfe9e8e87926701", "2ab95169ff9301cf"]),
        ("chosen", ["5618dae4dd88e4d6", "cdc7a5b0c4f9cb92"]),
        ("independent", ["bdfb2acc45cfaab4", "d84613e8e2e64644"]),
        ("windowed", ["5ab0aef3812ecd1e", "34038327cf2a2bb5"]),
        ("view", ["0a0afb5ad82efc69", "4d74fe36f93d88af"]),
        ("other view", ["649b53f233d655da", "d4cbc834e493f76a"]),
    ],
)
def test_draws_stay_what_they_were(stream, digests):
    """A run of an earlier version resumes with the images that it would have seen."""
    plan = make_plan()
    for step, expected in zip((0, 30), digests, strict=True):
        draw = plan.draws(step)[plan.streams.index(stream)]
        arrays = [getattr(draw, name) for name in ARRAYS[:4] if getattr(draw, name) is not None]
        assert hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16] == expected


def test_a_run_may_go_on_with_another_number_of_ranks_at_any_step():
    alone = make_plan()
    uninterrupted = [alone.draws(step) for step in range(20)]
    for world_size, steps in ((1, range(5)), (4, range(5, 11)), (2, range(11, 17)), (8, range(17, 20))):
        # A resumed run knows nothing but the step: its plans are new.
        ranks = [make_plan(rank=rank, world_size=world_size) for rank in range(world_size)]
        for step in steps:
            assert_same(joined([plan.draws(step) for plan in ranks]), uninterrupted[step])


def test_steps_may_be_asked_for_in_any_order():
    plan, order = make_plan(), np.random.default_rng(0).permutation(40).tolist()
    drawn = {step: plan.draws(step) for step in order}
    fresh = make_plan()
    for step in range(40):
        assert_same(drawn[step], fresh.draws(step))


def test_a_plan_in_another_process_draws_the_same():
    plan = make_plan()
    before = plan.draws(30)
    assert_same(pickle.loads(pickle.dumps(plan)).draws(30), before)


def test_worker_processes_get_a_plan_without_its_arrays(digits):
    plan = TrainPlan(digits.splits["train"], (Stream("u"), Stream("r", -1.0)), 16, 16, seed=0, epochs=2)
    drawn = plan.draws(0)
    sent = pickle.dumps(plan)
    assert len(sent) < min(5000, plan.split.samples.nbytes)
    copy = pickle.loads(sent)
    assert_same(copy.draws(0), drawn)
    np.testing.assert_array_equal(copy.split.samples, plan.split.samples)
    # What is no longer what the file holds is sent as it is.
    some = pickle.loads(pickle.dumps(replace(plan.split, samples=plan.split.samples[::-1])))
    np.testing.assert_array_equal(some.samples, plan.split.samples[::-1])
    np.testing.assert_array_equal(some.by_class, plan.split.by_class)


def test_explicit_probabilities_are_followed():
    chosen = np.array([0.05, 0.05, 0.1, 0.2, 0.3, 0.3, 0.0])
    plan = make_plan(Stream("s", probabilities=chosen), batch_size=1000)
    ids = np.concatenate([plan.draws(step)[0].ids_B for step in range(30)])
    share = np.bincount(plan.split.samples["label"][ids], minlength=7) / len(ids)
    assert (np.abs(share - chosen) <= 5 * np.sqrt(chosen * (1 - chosen) / len(ids))).all()
    assert share[6] == 0


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ([0.5, 0.5], "2 class probabilities for 7 classes; give one for each"),
        ([0.5, 0.5, 0.5, -0.5, 0, 0, 0], "must be finite and at least 0"),
        ([np.nan, 1, 0, 0, 0, 0, 0], "must be finite and at least 0"),
        ([1, 1, 1, 1, 1, 1, 1], "add up to 7 and must add up to 1; divide them by their sum"),
    ],
)
def test_probabilities_that_are_none_are_reported(probabilities, message):
    with pytest.raises(UserError, match=message):
        make_plan(Stream("s", probabilities=probabilities))


def test_a_class_without_images_takes_no_probability():
    with pytest.raises(UserError, match="class 1 has no training image, so its probability must be 0"):
        make_plan(Stream("s", probabilities=[0.5, 0.5]), counts=np.array([3, 0]))
    make_plan(Stream("s", probabilities=[1, 0]), counts=np.array([3, 0]), batch_size=2)


def test_uniform_with_replacement_is_uniform_and_repeats():
    plan = make_plan(Stream("s", replacement=True), batch_size=226)
    times = np.bincount(np.concatenate([epoch_ids(plan, epoch) for epoch in range(100)]), minlength=226)
    assert (np.abs(times - 100) < 5 * np.sqrt(100)).all()
    once = np.bincount(epoch_ids(plan, 0), minlength=226)
    assert abs((once == 0).mean() - np.exp(-1)) < 5 * np.sqrt(0.25 / 226)  # what is left out by chance


def test_a_second_view_has_the_same_ids_and_windows_flips_and_distortions_of_its_own():
    plan = make_plan(
        Stream("first", -1.0, "strong"), Stream("second", augment="strong", repeats="first"), batch_size=64
    )
    for step in (0, 1, 30):
        first, second = plan.draws(step)
        np.testing.assert_array_equal(first.ids_B, second.ids_B)
        assert (first.windows_B4 != second.windows_B4).any(axis=1).mean() > 0.9
        assert (first.flips_B != second.flips_B).any()
        assert (first.distortions_B["strong"]["order"] != second.distortions_B["strong"]["order"]).any()


def test_a_second_view_may_come_before_the_first_and_changes_nothing_for_it():
    first, second = Stream("first", -1.0, "imagenet"), Stream("second", augment="none", repeats="first")
    forwards, backwards, alone = make_plan(first, second), make_plan(second, first), make_plan(first)
    assert_same(forwards.draws(5), backwards.draws(5)[::-1])
    assert_same(forwards.draws(5)[:1], alone.draws(5))


@pytest.mark.parametrize(("shard_window", "counts"), [(1, COUNTS), (3, COUNTS), (5, COUNTS), (100, COUNTS), (2, [1])])
def test_a_windowed_epoch_is_an_exact_permutation_of_few_shards_at_a_time(shard_window, counts):
    plan = make_plan(Stream("s", shard_window=shard_window), counts=np.asarray(counts), batch_size=1)
    orders = [epoch_ids(plan, epoch) for epoch in range(2)]
    for ids in orders:
        np.testing.assert_array_equal(np.sort(ids), np.arange(len(plan.split)))
        shards, visited = plan.split.samples["shard"][ids], []
        while len(shards):  # window by window: its shards, each seen as a whole, and never again
            window = list(dict.fromkeys(shards))[:shard_window]
            size = np.isin(shards, window).sum()
            assert np.isin(shards[:size], window).all()
            visited += window
            shards = shards[size:]
        assert len(set(visited)) == len(visited)
    if len(plan.split) > 1:
        assert (orders[0] != orders[1]).any()


def test_a_window_of_all_shards_mixes_them_all():
    order = epoch_order(0, "s", 0, [500] * 4, shard_window=4)
    assert np.bincount(order[:500] // 500, minlength=4).min() > 80
    narrow = epoch_order(0, "s", 0, [500] * 4, shard_window=1)
    assert all(len(set(narrow[i : i + 500] // 500)) == 1 for i in range(0, 2000, 500))


def test_empty_shards_do_no_harm():
    order = epoch_order(0, "s", 0, [0, 3, 0, 2, 0], shard_window=2)
    np.testing.assert_array_equal(np.sort(order), np.arange(5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q": -1, "probabilities": [1]}, "stream 's' has both q=-1 and probabilities; give one of them"),
        (
            {"q": 0.5, "shard_window": 4},
            "has shard_window=4, which orders an epoch of q=1, and q=0.5, which draws with",
        ),
        ({"replacement": True, "shard_window": 4}, "and replacement, which draws with replacement; leave one out"),
        ({"probabilities": [1], "shard_window": 4}, "and probabilities, which draws with replacement; leave one out"),
        ({"shard_window": 0}, "shard_window=0; it must be at least 1 shard"),
        ({"repeats": "a", "q": 0}, "stream 's' repeats the ids of 'a' and has q=0; leave one out"),
        ({"repeats": "a", "replacement": True}, "repeats the ids of 'a' and has replacement; leave one out"),
        ({"repeats": "a", "shard_window": 2}, "repeats the ids of 'a' and has shard_window; leave one out"),
    ],
)
def test_fields_that_exclude_each_other_are_reported(fields, message):
    with pytest.raises(UserError, match=message) as raised:
        Stream("s", **fields)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ((Stream("a"), Stream("b", repeats="c")), "'b' repeats 'c', which is no stream; the streams are: a, b"),
        ((Stream("a", repeats="a"),), "'a' repeats 'a', which has no sampler of its own; name another"),
        (
            (Stream("a"), Stream("b", repeats="a"), Stream("c", repeats="b")),
            "'c' repeats 'b', which has no sampler of its own; name another",
        ),
    ],
)
def test_a_stream_that_repeats_none_is_reported(streams, message):
    with pytest.raises(UserError, match=message):
        make_plan(*streams)


def test_rows_have_a_field_for_each_distortion():
    for stream, draw in zip(EVERY_KIND, make_plan().draws(0), strict=True):
        if stream.augment.startswith("strong"):
            assert draw.distortions_B.dtype == [("strong", DISTORTION)]
            assert draw.distortions_B.shape == (16,)
        elif stream.name == "composed":
            assert draw.distortions_B.dtype.names == ("rand(2,9)", "autoaugment", "trivial", "cutout(6)")
        else:
            assert draw.distortions_B is None


def test_progressive_sampling_of_one_epoch_stays_instance_balanced():
    plan = make_plan(Stream("s", "progressive"), batch_size=4000, epochs=1)
    share = np.mean(plan.split.samples["label"][plan.draws(0)[0].ids_B] == 0)
    assert abs(share - 120 / 226) < 5 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize("samples", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("world_size", [1, 2, 5, 9])
@pytest.mark.parametrize("augment", ["eval", "strong"])
def test_evaluation_of_fewer_samples_than_ranks(samples, world_size, augment):
    split = make_split(np.array([samples]))
    plans = [EvalPlan(split, 2, 24, augment, rank, world_size) for rank in range(world_size)]
    draws = [draw for plan in plans for step in range(plan.steps) for draw in plan.draws(step)]
    np.testing.assert_array_equal(np.concatenate([d.ids_B for d in draws] or [[]]), np.arange(samples))
    assert all(1 <= len(draw.ids_B) <= 2 for draw in draws)
    assert all((draw.distortions_B is not None) == (augment == "strong") for draw in draws)
    assert sum(plan.steps > 0 for plan in plans) == min(samples, world_size)


def test_one_image_is_enough_for_every_kind_of_stream():
    streams = [replace(spec, probabilities=None if spec.probabilities is None else (1.0,)) for spec in EVERY_KIND]
    plan = make_plan(*streams, counts=np.array([1]), batch_size=2)
    for draw in plan.draws(0) + plan.draws(7):
        np.testing.assert_array_equal(draw.ids_B, [0, 0])


@pytest.mark.parametrize("mix", [None, Mixup(), Remix(), Mixup(partner="reversed")])
def test_the_classes_of_a_whole_step_are_known_on_every_rank(mix):
    streams = (Stream("uniform", mix=mix), Stream("reversed", q=-1.0))
    alone, *ranks = (make_plan(*streams, rank=rank, world_size=world) for rank, world in ((0, 1), (0, 4), (3, 4)))
    for step in (0, 5):
        whole = alone.draws(step)
        for plan in ranks:
            for ours, theirs in zip(plan.draws(step), whole, strict=True):
                np.testing.assert_array_equal(ours.step_counts_C, theirs.step_counts_C)
        labels = [alone.split.samples["label"][draw.ids_B].astype(np.int64) for draw in whole]
        counts = [np.bincount(labels_B, minlength=len(COUNTS)) for labels_B in labels]
        np.testing.assert_array_equal(whole[1].step_counts_C, counts[1])
        assert whole[0].step_counts_C.sum() == pytest.approx(16)
        # Neighbours that are mixed with each other by one share hold together what they are.
        alike = mix is None or mix == Mixup()
        assert np.allclose(whole[0].step_counts_C, counts[0], rtol=0, atol=1e-5) == alike


@pytest.mark.parametrize(
    ("share", "epochs", "first"),
    [(0.8, 10, 8), (0.8, 200, 160), (0.29, 100, 29), (0.0, 10, 0), (0.9, 2, 1), (0.999, 1, 0)],
)
def test_a_deferred_sampler_applies_from_its_epoch_on(share, epochs, first):
    """Deferred re-sampling: until then each image once per epoch, in the order of an ordinary stream of that name."""
    deferred = make_plan(Stream("train", 0.0, from_share=share), epochs=epochs)
    plain, balanced = make_plan(Stream("train"), epochs=epochs), make_plan(Stream("train", 0.0), epochs=epochs)
    for epoch in {max(0, first - 1), first, epochs - 1}:
        expected = plain if epoch < first else balanced
        np.testing.assert_array_equal(epoch_ids(deferred, epoch), epoch_ids(expected, epoch))


def test_deferral_of_every_sampler():
    for spec in (
        Stream("train", "progressive", from_share=0.5),
        Stream("train", probabilities=[0, 0, 0, 0, 0, 0.5, 0.5], from_share=0.5),
        Stream("train", replacement=True, from_share=0.5),
    ):
        ids = [epoch_ids(make_plan(spec), epoch) for epoch in (0, 4, 5, 9)]
        assert [len(set(part.tolist())) == len(part) for part in ids] == [True, True, False, False]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match=r"stream 'train' has from_share=.*; it must be at least 0, and below 1"):
        Stream("train", 0.0, from_share=share)


def test_a_cutout_that_hides_whole_pictures_is_refused():
    with pytest.raises(UserError, match=r"cutout\(16\) hides all of a picture of 8 pixels"):
        make_plan(Stream("s", augment="shift+cutout(16)"), image_size=8)
    make_plan(Stream("s", augment="shift+cutout(15)"), image_size=8)
