"""Predictions of each image: reading them, and how sure a difference is."""

import numpy as np
import pytest
from scipy import stats

from analysis.compare import group_runs
from analysis.predictions import against_first, answers, intervals, read_predictions
from analysis.runs import read_run, read_runs
from shards.errors import UserError

COUNTS_C = [500, 50, 5]


def test_what_was_written_is_read_by_rising_id(make_run):
    run = read_run(make_run("a", predictions=True))
    found = read_predictions(run)
    assert found is not None
    assert (np.diff(found.ids_N) > 0).all()
    assert found.labels_N.tolist() == np.repeat(np.arange(6), 20).tolist()
    assert np.bincount(found.labels_N[found.correct], minlength=6).tolist() == run.correct_C.tolist()
    assert (found.confidence == found.topk_scores_NK.max(axis=1)).all()
    assert found.topk_scores_NK.dtype == np.float32


def test_a_run_without_predictions(make_run):
    assert read_predictions(read_run(make_run("a"))) is None
    other = make_run("b", predictions=True, evaluated_on="val")
    assert read_predictions(read_run(other)) is not None
    np.savez(other / "predictions.npz", test_ids=np.arange(3))  # of another split only
    assert read_predictions(read_run(other)) is None


def changed(path, **changes):
    with np.load(path / "predictions.npz") as arrays:
        content = {name: arrays[name] for name in arrays.files}
    for name, change in changes.items():
        content[name] = change(content[name])
    np.savez(path / "predictions.npz", **content)


def set_first(value):
    def change(array):
        array = array.copy()
        array[0] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"test_labels": lambda a: a[1:]}, "shapes of its arrays disagree"),
        ({"test_topk_scores": lambda a: a[:, 1:]}, "shapes of its arrays disagree"),
        ({"test_topk_labels": lambda a: a[:, 0]}, "shapes of its arrays disagree"),
        ({"test_topk_labels": lambda a: a.astype(float)}, "must be whole numbers"),
        ({"test_topk_scores": lambda a: a.astype(int)}, "must be floating-point"),
        ({"test_ids": lambda a: a * 0}, "an image occurs twice"),
        ({"test_labels": set_first(6)}, "lies outside its 6 classes"),
        ({"test_topk_labels": set_first(-1)}, "lies outside its 6 classes"),
        ({"test_topk_scores": lambda a: a[:, ::-1]}, "descending probabilities"),
        ({"test_topk_scores": set_first(np.nan)}, "descending probabilities"),
        ({"test_labels": lambda a: a[::-1] * 0}, r"does not hold the images of per_class.json"),
        ({"test_topk_labels": lambda a: (a + 1) % 6}, r"disagrees with per_class.json about \d+ of 120 images"),
        ({"test_ids": lambda a: np.array([None] * len(a))}, "allow_pickle=False"),
    ],
)
def test_damaged_predictions_are_reported_in_one_line(make_run, changes, why):
    path = make_run("a", predictions=True)
    changed(path, **changes)
    with pytest.raises(UserError, match=rf"predictions.npz is damaged \(.*{why}.*remove the file") as caught:
        read_predictions(read_run(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no", b"\x93NUMPY"])
def test_a_file_that_was_cut_off(make_run, content):
    path = make_run("a")
    (path / "predictions.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"predictions\.npz is damaged"):
        read_predictions(read_run(path))


def recalls(values_N, labels_N):
    return [values_N[labels_N == c].mean() for c in np.unique(labels_N)]


def test_estimates_are_the_figures_themselves():
    rng = np.random.default_rng(1)
    labels_N = np.repeat([0, 1, 2], [60, 30, 10])
    correct_N = rng.random(100) < 0.7
    found = intervals(correct_N, labels_N, COUNTS_C)
    many, medium, few = recalls(correct_N, labels_N)
    reported = {key: interval.estimate for key, interval in found.items()}
    expected = {"top1": correct_N.mean(), "balanced_accuracy": (many + medium + few) / 3}
    assert reported == pytest.approx(expected | {"many": many, "medium": medium, "few": few})
    assert all(interval.low < interval.estimate < interval.high for interval in found.values())
    assert found == intervals(correct_N, labels_N, COUNTS_C)  # the same each time
    order = rng.permutation(100)
    assert found == intervals(correct_N[order], labels_N[order], COUNTS_C)


def test_the_interval_agrees_with_scipys():
    rng = np.random.default_rng(2)
    values = [rng.choice([-1.0, 0.0, 1.0], size=n, p=p) for n, p in ((300, (0.1, 0.7, 0.2)), (200, (0.2, 0.5, 0.3)))]
    theirs = stats.bootstrap(
        values,
        lambda a, b, axis: (a.mean(axis=axis) + b.mean(axis=axis)) / 2,
        n_resamples=5000,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    found = intervals(np.concatenate(values), np.repeat([0, 1], [300, 200]), [500, 50], resamples=5000)
    ours = found["balanced_accuracy"]
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert ours.high - ours.low == pytest.approx(theirs.high - theirs.low, rel=0.06)


def test_classes_of_three_test_images_have_an_unbiased_variance():
    # Resampling 3 of 3 images would tell two thirds of the variance. 8,000 classes are also many to draw for.
    rng = np.random.default_rng(4)
    labels_N = np.repeat(np.arange(8000), 3)
    correct_N = (rng.random(24000) < 0.6).astype(float)
    found = intervals(correct_N, labels_N, np.full(8000, 5))["balanced_accuracy"]
    variance = correct_N.reshape(8000, 3).var(axis=1, ddof=1).mean() / 3 / 8000
    assert found.high - found.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.06)


def test_a_paired_interval_is_narrower_than_two_apart():
    rng = np.random.default_rng(5)
    labels_N = np.repeat(np.arange(3), 200)
    one_N = rng.random(600) < 0.7
    other_N = one_N | (rng.random(600) < 0.1)  # never worse
    difference = intervals(other_N.astype(float) - one_N, labels_N, COUNTS_C)["balanced_accuracy"]
    assert difference.is_clear
    alone = intervals(one_N, labels_N, COUNTS_C)["balanced_accuracy"]
    assert difference.high - difference.low < 0.5 * (alone.high - alone.low)


def test_edges():
    assert intervals([], [], COUNTS_C) == {}
    one = intervals([1.0] * 6, [1] * 6, COUNTS_C)
    assert set(one) == {"top1", "balanced_accuracy", "medium"}
    assert (one["medium"].low, one["medium"].high, one["medium"].is_clear) == (1.0, 1.0, True)
    none = intervals([0.0] * 8, [0, 0, 0, 0, 1, 2, 2, 2], COUNTS_C)
    assert not none["top1"].is_clear
    # Even if five images all turned, that could be chance.
    assert set(none) == {"top1", "balanced_accuracy"}
    assert intervals([1.0] * 5, [1] * 5, COUNTS_C) == {}


def test_classes_of_a_single_image_still_add_their_variance():
    # A user's tail: forty few-shot classes with one test image each. Alone, each would seem to be without error.
    rng = np.random.default_rng(6)
    values_N = (rng.random(40) < 0.6).astype(float)
    found = intervals(values_N, np.arange(40), np.full(40, 4))
    assert found["few"].estimate == pytest.approx(values_N.mean())
    error = values_N.std(ddof=1) / 40**0.5
    assert found["few"].high - found["few"].low == pytest.approx(2 * 1.96 * error, rel=0.15)
    # Beside classes with more, they weigh as much as before.
    both = intervals(np.append(values_N, [1.0] * 10), np.append(np.arange(40), [40] * 10), [4] * 40 + [500])
    assert both["balanced_accuracy"].estimate == pytest.approx((values_N.sum() + 1) / 41)
    assert both["top1"].estimate == pytest.approx((values_N.sum() + 10) / 50)


def test_a_difference_over_seeds_is_that_of_the_means(make_run):
    ce = [make_run(f"ce{seed}", title="CE", recall=0.3, seed=seed, predictions=True) for seed in range(2)]
    bbn = [make_run(f"bbn{seed}", recall=0.8, seed=seed, predictions=True) for seed in range(3)]
    entries = group_runs(read_runs([*ce, *bbn]))
    reported = against_first(entries, {entry.title: answers(entry) for entry in entries})
    (difference,) = reported.values()
    for key in ("balanced_accuracy", "few", "many", "top1"):
        expected = entries[1].last.mean[key] - entries[0].last.mean[key]
        assert difference[key].estimate == pytest.approx(expected)
    assert difference["few"].is_clear


@pytest.mark.parametrize("case", ["lacking", "other ids", "other counts"])
def test_without_the_same_images_there_is_no_comparison(make_run, case):
    counts = [400, 90, 80, 30, 12, 4] if case == "other counts" else None
    paths = [
        make_run("ce", title="CE", predictions=True),
        make_run("bbn", predictions=case != "lacking", train_counts=counts),
    ]
    if case == "other ids":
        changed(paths[1], test_ids=lambda a: a + 1)
    entries = group_runs(read_runs(paths))
    assert against_first(entries, {entry.title: answers(entry) for entry in entries}) == {}


def test_classes_without_training_images_belong_to_no_group():
    found = intervals(np.repeat([1.0, 1.0, 0.0], 10), np.repeat([0, 1, 2], 10), [200, 5, 0])
    assert found["few"].estimate == 1.0
    assert found["balanced_accuracy"].estimate == pytest.approx(2 / 3)


@pytest.mark.parametrize("at", [8, 10])  # the flags, and the compression method
def test_a_changed_byte_in_an_archives_header(make_run, at):
    path = make_run("a", predictions=True) / "predictions.npz"
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + at] = 99
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        read_predictions(read_run(path.parent))
