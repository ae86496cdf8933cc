"""The figures that every result rests on."""

import numpy as np
import pytest

from analysis.metrics import Tally, summarize, tally
from shards.groups import class_groups

RNG = np.random.default_rng(0)
LOGITS_BC = RNG.normal(size=(200, 5)).astype(np.float32)
LABELS_B = RNG.integers(0, 5, size=200)
COUNTS_C = np.array([500, 101, 100, 20, 19])  # many, many, medium, medium, few


def test_a_hand_counted_batch():
    logits_BC = np.log(np.array([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]))
    result = tally(logits_BC, [0, 1, 1])
    assert result.correct_C.tolist() == [1, 1]
    assert result.total_C.tolist() == [1, 2]
    summary = summarize(result, [200, 5])
    assert summary["top1"] == pytest.approx(2 / 3)
    assert summary["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert (summary["many"], summary["medium"], summary["few"]) == (1.0, None, 0.5)
    # Three bins of one image each: |1 - 0.8|, |0 - 0.6|, |1 - 0.7|.
    assert summary["ece"] == pytest.approx((0.2 + 0.6 + 0.3) / 3)


def test_group_means_weigh_classes_and_not_images():
    total = Tally.zeros(5) + Tally(np.array([10, 0, 5, 1, 0]), np.array([10, 90, 10, 1, 3]), np.zeros((3, 15)))
    summary = summarize(total, COUNTS_C)
    assert summary["many"] == pytest.approx(0.5)
    assert summary["medium"] == pytest.approx(0.75)
    assert summary["few"] == 0.0
    assert summary["balanced_accuracy"] == pytest.approx((1 + 0 + 0.5 + 1 + 0) / 5)
    assert summary["top1"] == pytest.approx(16 / 114)


@pytest.mark.parametrize("cuts", [[], [1], [0, 0, 64, 64, 200]])
def test_any_cutting_into_batches_gives_the_same_figures(cuts):
    whole = tally(LOGITS_BC, LABELS_B)
    parts = zip(np.split(LOGITS_BC, cuts), np.split(LABELS_B, cuts), strict=True)
    total = sum((tally(logits, labels) for logits, labels in parts), Tally.zeros(5))
    assert (total.correct_C == whole.correct_C).all()
    assert (total.total_C == whole.total_C).all()
    np.testing.assert_allclose(total.bins_3K, whole.bins_3K)
    assert summarize(total, COUNTS_C) == pytest.approx(summarize(whole, COUNTS_C))


def test_ece_agrees_with_its_definition():
    probs_BC = np.exp(LOGITS_BC.astype(np.float64))
    probs_BC /= probs_BC.sum(1, keepdims=True)
    confidence_B, right_B = probs_BC.max(1), probs_BC.argmax(1) == LABELS_B
    expected = 0.0
    for k in range(15):
        inside_B = (confidence_B > k / 15) & (confidence_B <= (k + 1) / 15)
        if inside_B.any():
            gap = abs(right_B[inside_B].mean() - confidence_B[inside_B].mean())
            expected += inside_B.mean() * gap
    assert summarize(tally(LOGITS_BC, LABELS_B), COUNTS_C)["ece"] == pytest.approx(expected)


def test_a_vector_carries_a_tally_over_an_all_reduce():
    one, two = tally(LOGITS_BC[:60], LABELS_B[:60]), tally(LOGITS_BC[60:], LABELS_B[60:])
    vector = one.to_vector() + two.to_vector()
    assert vector.dtype == np.float64
    assert vector.shape == (2 * 5 + 45,)
    back, whole = Tally.from_vector(vector, 5), one + two
    assert back.correct_C.dtype == back.total_C.dtype == np.int64
    assert (back.correct_C == whole.correct_C).all()
    assert (back.total_C == whole.total_C).all()
    np.testing.assert_array_equal(back.bins_3K, whole.bins_3K)


def test_no_images():
    empty = tally(np.zeros((0, 5), np.float32), np.zeros(0, np.int64))
    assert empty.total_C.dtype == np.int64
    assert (empty.to_vector() == Tally.zeros(5).to_vector()).all()
    assert set(summarize(empty, COUNTS_C).values()) == {None}


def test_one_class():
    summary = summarize(tally(np.array([[3.0], [-2.0]]), [0, 0]), [7])
    expected = {"top1": 1.0, "balanced_accuracy": 1.0, "many": None, "medium": None, "few": 1.0, "ece": 0.0}
    assert summary == expected


def test_classes_without_test_images_do_not_count():
    total = tally(np.eye(5)[[0, 2]] * 9, [0, 2])
    summary = summarize(total, COUNTS_C)
    assert summary["balanced_accuracy"] == 1.0
    assert (summary["many"], summary["medium"], summary["few"]) == (1.0, 1.0, None)


def test_classes_without_training_images_belong_to_no_group():
    assert class_groups([101, 20, 19, 1, 0]).tolist() == ["many", "medium", "few", "few", ""]
    total = tally(np.eye(3)[[0, 1, 1]] * 9, [0, 1, 2])
    summary = summarize(total, [200, 5, 0])
    assert (summary["many"], summary["few"]) == (1.0, 1.0)
    assert summary["balanced_accuracy"] == pytest.approx(2 / 3)


def test_huge_logits_stay_stable():
    result = tally(np.array([[3e38, -3e38], [-3e38, 3e38]], np.float32), [0, 0])
    np.testing.assert_array_equal(result.bins_3K[:, -1], [2, 2, 1])


def test_equal_logits_fall_into_the_bin_of_their_confidence():
    result = tally(np.zeros((2, 2), np.float32), [0, 1])
    assert result.correct_C.tolist() == [1, 0]
    np.testing.assert_array_equal(result.bins_3K[:, 7], [2, 1, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diverged_model_is_an_error(bad):
    logits_BC = LOGITS_BC.copy()
    logits_BC[3, 1] = bad
    with pytest.raises(ValueError, match=r"logits hold nan or inf: .*; lower optim\.lr"):
        tally(logits_BC, LABELS_B)


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(AssertionError, match="outside"):
        tally(LOGITS_BC[:1], [5])
