"""What a report says in words."""

import itertools
import json

import pytest

from analysis.compare import group_runs
from analysis.headline import headline
from analysis.predictions import Interval
from analysis.runs import read_runs


@pytest.fixture
def say(make_run):
    """Return `say(CE=[…], BBN=[…])`: the headline over entries of these balanced accuracies, one for each seed."""
    numbers = itertools.count()

    def reported(versus=None, **accuracies):
        number = next(numbers)
        runs = []
        for title, values in accuracies.items():
            for seed, value in enumerate(values):
                figures = {"many": 0.9, "medium": None, "few": value - 0.1, "ece": 0.1}
                last = figures | dict.fromkeys(("top1", "balanced_accuracy"), value)
                runs.append(make_run(f"{number}/{title}{seed}", title=title, seed=seed, last=last))
        return headline(group_runs(read_runs(runs)), "test", versus or {})

    return reported


def test_two_entries_and_their_single_seeds(say):
    assert say(CE=[0.7], BBN=[0.75]) == (
        "BBN does better than CE: counting every class equally, it recognises 75.0 % of the test images, 5.0 points"
        " more than CE with 70.0 %. It gains 5.0 points in the tail (few), and stays level in the head (many). CE"
        " and BBN have a single seed, and another may turn out differently: train two more to be sure."
    )


def test_the_best_of_several_is_not_the_last(say):
    reported = say(CE=[0.5, 0.51], BBN=[0.8, 0.81], AFG=[0.7])
    assert reported.startswith(
        "BBN (mean of 2 seeds) does best of 3 methods: counting every class equally, it recognises 80.5 % of the test"
        " images, 30.0 points more than CE with 50.5 %."
    )
    assert "seed, and" not in reported
    assert "within the spread" not in reported


def test_a_first_that_nobody_beats_is_reported_as_it_is(say):
    assert say(CE=[0.8], BBN=[0.7]).startswith(
        "BBN does worse than CE: counting every class equally, it recognises 70.0 % of the test images, 10.0 points"
        " fewer than CE with 80.0 %. It loses 10.0 points in the tail (few), and stays level in the head (many)."
    )
    assert say(CE=[0.8], BBN=[0.6], AFG=[0.7]).startswith(
        "CE does best of 3 methods. AFG comes next: counting every class equally, it recognises 70.0 %"
    )


def test_level_entries_need_no_caution(say):
    assert say(CE=[0.7], BBN=[0.7]) == (
        "BBN does as well as CE: counting every class equally, it recognises 70.0 % of the test images, as does CE."
    )


@pytest.mark.parametrize(
    ("low", "said"),
    [
        (0.01, "is more than the choice of test images explains (+5.0 [1.0, 9.0] points, 95 % interval)"),
        (-0.01, "may be chance: other test images could reverse it (+5.0 [−1.0, 9.0] points, 95 % interval)"),
    ],
)
def test_an_interval_says_how_sure_a_difference_is(say, low, said):
    versus = {"BBN": {"balanced_accuracy": Interval(0.05, low, 0.09)}}
    assert f"The difference {said}." in say(versus, CE=[0.7], BBN=[0.75])


def test_level_in_sum_but_not_in_its_groups_needs_one(make_run):
    level = dict.fromkeys(("top1", "balanced_accuracy"), 0.7) | {"ece": 0.1, "medium": None}
    runs = [
        make_run("a", title="CE", last=level | {"many": 0.9, "few": 0.5}),
        make_run("b", title="BBN", last=level | {"many": 0.7, "few": 0.7}),
    ]
    versus = {"BBN": {"balanced_accuracy": Interval(0.0, -0.1, 0.1)}}
    reported = headline(group_runs(read_runs(runs)), "test", versus)
    assert (
        "It gains 20.0 points in the tail (few), but loses 20.0 points in the head (many). CE and BBN have a"
        in reported
    )
    assert "interval" not in reported


def test_what_was_evaluated_is_reported_beside_what_was_not(make_run):
    runs = [make_run("a", title="CE", test_images_per_class=0), make_run("b"), make_run("c", title="AFG", recall=0.3)]
    assert "than BBN with" in headline(group_runs(read_runs(runs)), "test", {})
    assert headline(group_runs(read_runs(runs[:2])), "test", {}).startswith("BBN recognises ")
    assert headline(group_runs(read_runs(runs[:1])), "test", {}) == "No test images were evaluated."


def test_a_spread_is_said_to_be_of_its_own_figure(make_run):
    runs = [
        make_run(
            f"{title}{seed}", title=title, seed=seed, last={"many": 0.9, "medium": None, "few": 0.5, "ece": 0.1, **last}
        )
        for title, top1, balanced in (("CE", 0.80, 0.60), ("BBN", 0.81, 0.65))
        for seed, d in enumerate((-0.02, 0.02))
        for last in [{"top1": top1 + d, "balanced_accuracy": balanced + d / 4}]
    ]
    reported = headline(group_runs(read_runs(runs)), "test", {})
    assert "The difference overall is within the spread of the seeds." in reported
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        last = summary["last"]
        last["top1"], last["balanced_accuracy"] = last["balanced_accuracy"], last["top1"]
        (run / "summary.json").write_text(json.dumps(summary))
    reported = headline(group_runs(read_runs(runs)), "test", {})
    assert "The difference counting every class equally is within the spread of the seeds." in reported


def test_one_entry_alone(say):
    assert say(BBN=[0.7]) == (
        "BBN recognises 70.0 % of the test images. Averaged over classes, it recognises 90.0 % of the head (many) and"
        " 60.0 % of the tail (few). This is a single seed."
    )
    assert "single" not in say(BBN=[0.6, 0.7])


def test_only_one_side_has_a_single_seed(say):
    assert "BBN has a single seed, and another may" in say(CE=[0.7, 0.71], BBN=[0.8])


def test_gains_and_losses_are_one_sentence(make_run):
    first, second = (dict.fromkeys(("top1", "balanced_accuracy", "ece"), x) for x in (0.5, 0.6))
    runs = read_runs(
        [
            make_run("a", title="CE", last=first | {"many": 0.9, "medium": 0.5, "few": 0.2}),
            make_run("b", title="BBN", last=second | {"many": 0.8, "medium": 0.6, "few": 0.5}),
        ]
    )
    assert (
        "It gains 30.0 points in the tail (few) and 10.0 points in the middle (medium), but loses 10.0 points in the"
        " head (many)." in headline(group_runs(runs), "test", {})
    )


@pytest.mark.parametrize(("ce", "bbn"), [(0.84251, 0.84349), (0.84249, 0.84251), (0.8430, 0.8426)])
def test_the_best_is_never_beaten_by_the_next(say, ce, bbn):
    reported = say(CE=[ce], BBN=[bbn], AFG=[0.5])
    assert ("CE does best" in reported) == (bbn - ce < 0.0005)
    assert not ("CE does best" in reported and "more than CE" in reported)
    assert not ("BBN does best" in reported and "as does CE" in reported)
