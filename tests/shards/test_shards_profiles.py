import numpy as np
import pytest

from shards.profiles import PROFILES, profile_counts


@pytest.mark.parametrize(
    ("n_classes", "n_max", "totals"),
    [
        (10, 5000, {10: 20431, 50: 13996, 100: 12406, 200: 11203}),
        (100, 500, {10: 19573, 50: 12608, 100: 10847, 200: 9502}),
    ],
)
def test_exp_gives_the_published_totals_of_long_tailed_cifar(n_classes, n_max, totals):
    for factor, total in totals.items():
        counts_C = profile_counts("exp", [n_max] * n_classes, factor)
        assert counts_C.sum() == total
        assert counts_C[0] == n_max
        assert counts_C[-1] == int(n_max * (1 / factor))


def test_step_halves_the_classes_and_gives_the_odd_one_to_the_tail():
    assert profile_counts("step", [50] * 5, 10).tolist() == [50, 50, 5, 5, 5]


def test_pareto_falls_from_n_max_to_n_max_over_factor():
    counts_C = profile_counts("pareto", [1280] * 1000, 256)
    assert (counts_C[0], counts_C[-1]) == (1280, 5)
    assert (np.diff(counts_C) <= 0).all()
    assert counts_C.sum() == 104_345  # the figures that the docstring compares with ImageNet-LT's
    groups = [(counts_C > 100).sum(), ((counts_C <= 100) & (counts_C >= 20)).sum(), (counts_C < 20).sum()]
    assert groups == [349, 488, 163]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("available", [[7, 7], [1, 1], [1, 9, 3]])
def test_no_class_is_ever_emptied(profile, available):
    assert profile_counts(profile, available, 1e6).min() >= 1


@pytest.mark.parametrize("profile", ["exp", "step", "pareto"])
def test_a_factor_of_one_keeps_everything(profile):
    assert profile_counts(profile, [9] * 4, 1).tolist() == [9] * 4


def test_natural_keeps_what_there_is_whatever_the_factor():
    assert profile_counts("natural", [3, 1, 2], 100).tolist() == [3, 1, 2]


def test_a_small_class_is_asked_for_more_than_it_has():
    assert profile_counts("exp", [100, 4, 5], 4).tolist() == [100, 25, 50]


def test_where_the_source_is_not_balanced_the_profile_goes_by_size():
    available_C = np.array([30, 400, 90, 400, 200])  # the first by name is the rarest
    counts_C = np.minimum(profile_counts("exp", available_C, 20), available_C)
    assert counts_C.tolist() == [20, 400, 42, 189, 89]
    assert counts_C.max() / counts_C.min() == 20


@pytest.mark.parametrize("available", [[100, 95, 98, 100], [90, 100, 100, 91]])
def test_nearly_balanced_sources_keep_the_order_of_their_classes(available):
    assert profile_counts("exp", available, 8).tolist() == [100, 50, 25, 12]
