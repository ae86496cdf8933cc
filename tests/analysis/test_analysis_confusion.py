"""Which classes are taken for which."""

import numpy as np

from analysis.confusion import confused_pairs, confusion_matrix
from analysis.predictions import Answers, Predictions


def predicted(labels, top):
    labels_N, top_N = np.array(labels), np.array(top)
    one = Predictions(np.arange(len(labels)), labels_N, top_N[:, None], np.ones((len(labels), 1), np.float32))
    return Answers([one], one.correct.astype(float))


def test_a_hand_counted_matrix():
    matrix_CC = confusion_matrix(predicted([0, 0, 0, 0, 2], [0, 0, 0, 1, 0]), 3)
    assert matrix_CC[[0, 2]].tolist() == [[0.75, 0.25, 0], [1, 0, 0]]
    assert np.isnan(matrix_CC[1]).all()  # a class without images


def test_pairs_are_those_of_the_last_entry_and_one_mistake_is_none():
    first = predicted([0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 2, 2])
    last = predicted([0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 2, 0, 0, 0, 0, 0])
    pairs = confused_pairs([first, last], 3)
    assert [(pair.true, pair.predicted) for pair in pairs] == [(1, 0), (2, 0)]
    assert [pair.shares for pair in pairs] == [[1 / 3, 1], [0, 1]]
    assert confused_pairs([first], 3) == []


def test_a_class_of_which_an_entry_has_no_images_has_no_share():
    first, last = predicted([0, 0], [0, 0]), predicted([0, 0, 1, 1], [0, 0, 0, 0])
    (pair,) = confused_pairs([first, last], 2)
    assert pair.shares == [None, 1]


def test_one_image_that_all_seeds_mistake_is_no_pattern():
    one = predicted([0, 0, 1], [1, 0, 1])
    assert confused_pairs([Answers(one.runs * 3, one.correct_N)], 2) == []
