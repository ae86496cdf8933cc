"""The mean of several runs' probabilities, by hand."""

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.ensemble import ensemble
from analysis.predictions import read_predictions
from analysis.runs import read_run
from shards.errors import UserError

FOUR = {"train_counts": [200, 60, 30, 5], "predictions": True}


def runs_of(make_run, *names, **changes):
    return [read_run(make_run(name, seed=i, **(FOUR | changes))) for i, name in enumerate(names)]


def test_it_is_the_mean_of_probabilities(make_run):
    runs = runs_of(make_run, "a", "b", "c")
    together = ensemble(runs)
    found = [read_predictions(run) for run in runs]
    right = np.zeros(4)
    for row, label in enumerate(found[0].labels_N):
        mean = np.zeros(4)
        for one in found:
            for k in range(4):
                mean[one.topk_labels_NK[row, k]] += one.topk_scores_NK[row, k]
        right[label] += mean.argmax() == label
    assert together["balanced_accuracy"] == pytest.approx(np.mean(right / np.bincount(found[0].labels_N)))
    assert together["few"] == pytest.approx((right / np.bincount(found[0].labels_N))[3])


def test_a_run_with_itself_is_itself(make_run):
    (run,) = runs_of(make_run, "a")
    assert ensemble([run, run])["top1"] == pytest.approx(run.last["top1"])


def test_the_command_shows_each_and_all_together(make_run, capsys):
    main(["ensemble", *(str(run.path) for run in runs_of(make_run, "a", "b"))])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["a", "b", "all"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"train_counts": [200, 60, 5]}, "b and a have different classes; an ensemble needs the same ones"),
        ({"test_images_per_class": 5}, "b and a were tested on different images"),
        ({"predictions": False}, "b holds no predictions.npz; train it again, or leave it out"),
    ],
)
def test_runs_that_do_not_fit(make_run, other, message):
    (first,) = runs_of(make_run, "a")
    (second,) = runs_of(make_run, "b", **other)
    with pytest.raises(UserError, match=message):
        ensemble([first, second])


def test_too_few_runs_or_classes_kept(make_run):
    (one,) = runs_of(make_run, "a")
    with pytest.raises(UserError, match="takes at least two runs, got 1; name another"):
        ensemble([one])
    many = runs_of(make_run, "b", "c", train_counts=[9] * 7)
    with pytest.raises(UserError, match="b kept 5 of 7 classes' probabilities; average the networks themselves"):
        ensemble(many)


def test_a_run_named_twice_is_one(make_run, capsys):
    (run,) = runs_of(make_run, "a")
    with pytest.raises(SystemExit):
        main(["ensemble", str(run.path), f"{run.path}/"])
    assert "at least two runs, got 1" in capsys.readouterr().err


def test_other_class_counts_are_noted(make_run, capsys):
    (one,), (other,) = runs_of(make_run, "a"), runs_of(make_run, "b", train_counts=[200, 60, 5, 30])
    main(["ensemble", str(one.path), str(other.path)])
    assert "were trained on different class counts" in capsys.readouterr().err
