"""Reading what training left, whole or damaged."""

import json
import re

import pytest

from analysis.runs import read_run, read_runs
from shards.errors import UserError


def edit(path, **changes):
    table = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in table.items() if v != "gone"}), encoding="utf-8")


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        read_run(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_whole_run(make_run):
    run = read_run(make_run("bbn", seed=3, extra="an unknown key"))
    assert (run.name, run.title, run.dataset, run.summary["seed"]) == ("bbn", "BBN", "digits", 3)
    assert [row["epoch"] for row in run.epochs] == [1, 2, 3]
    assert run.train_counts_C.tolist() == [500, 101, 100, 20, 19, 3]
    assert run.last["top1"] == pytest.approx(run.correct_C.sum() / run.total_C.sum())
    assert "epochs: 3" in run.config


def test_a_folder_named_twice_counts_once_and_order_is_kept(make_run):
    one, two = make_run("b"), make_run("a")
    assert [run.name for run in read_runs([one, two, one.parent / "a" / ".." / "b"])] == ["b", "a"]


def test_what_is_no_run(tmp_path, make_run):
    refused(tmp_path / "nowhere", "is not a folder; name the folder of a run")
    refused(tmp_path, "is not a run: it has no config.yaml")
    unfinished = make_run("bbn")
    (unfinished / "summary.json").unlink()
    refused(unfinished, "is not finished: it has no summary.json; resume its training first")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "per_class.json"])
def test_a_missing_file(make_run, name):
    path = make_run("bbn")
    (path / name).unlink()
    refused(path, rf"{name} cannot be read \(No such file or directory\); repeat that run or leave it out")


@pytest.mark.parametrize(
    ("name", "content"),
    [("summary.json", '{"title": "B'), ("summary.json", "[]"), ("per_class.json", ""), ("per_class.json", "{}")],
)
def test_damaged_json(make_run, name, content):
    path = make_run("bbn")
    (path / name).write_text(content, encoding="utf-8")
    refused(path, rf"{name} is damaged \(.*\); repeat that run or leave it out")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"title": "gone"}, "'title' is missing"),
        ({"seed": "four"}, "'seed' is missing or of the wrong type"),
        ({"last": {"top1": 0.5}}, "'last' must hold fractions"),
        ({"last": dict.fromkeys(("top1", "balanced_accuracy", "many", "medium", "few", "ece"), 84.2)}, "'last' must"),
        ({"selected": dict.fromkeys(("top1", "balanced_accuracy", "many", "medium", "few", "ece"))}, "no epoch"),
    ],
)
def test_a_summary_that_breaks_the_contract(make_run, changes, why):
    path = make_run("bbn")
    edit(path / "summary.json", **changes)
    refused(path, re.escape("summary.json is damaged (") + ".*" + why)


def test_a_run_without_selection_and_with_empty_groups(make_run):
    path = make_run("bbn", selected=None, selected_on=None, train_counts=[7])
    assert read_run(path).last["many"] is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"correct": [1, 2]}, "differ in length"), ({"total": ["x"] * 6}, "invalid literal")],
)
def test_class_lists_that_do_not_fit(make_run, changes, why):
    path = make_run("bbn")
    edit(path / "per_class.json", **changes)
    refused(path, why)


def test_a_last_line_cut_off_by_a_kill(make_run):
    path = make_run("bbn")
    log = path / "metrics.jsonl"
    log.write_text(log.read_text(encoding="utf-8") + '{"epoch": 4, "lo', encoding="utf-8")
    assert [row["epoch"] for row in read_run(path).epochs] == [1, 2, 3]


def test_a_damaged_line_before_the_last(make_run):
    path = make_run("bbn")
    log = path / "metrics.jsonl"
    log.write_text('{"epoch": 1, "lo\n' + log.read_text(encoding="utf-8"), encoding="utf-8")
    refused(path, r"metrics.jsonl is damaged \(line 1: ")
    log.write_text('{"loss": 1}\n', encoding="utf-8")
    refused(path, r"metrics.jsonl is damaged \(line 1 names no epoch\)")


def test_an_epoch_repeated_by_a_resume_counts_as_it_was_last(make_run):
    path = make_run("bbn")
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"epoch": 2, "loss": NaN}\n')
    epochs = read_run(path).epochs
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert list(epochs[1]) == ["epoch", "loss"]


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("per_class.json", {"correct": [21, 0, 0, 0, 0, 0]}, "more images are correct than there are"),
        ("per_class.json", {"train_counts": [-1, 1, 1, 1, 1, 1]}, "a count is negative"),
        ("summary.json", {"seconds": float("nan")}, "'seconds' is not finite"),
        ("summary.json", {"images_per_second": float("inf")}, "'images_per_second' is not finite"),
    ],
)
def test_figures_that_cannot_be(make_run, name, changes, why):
    path = make_run("bbn")
    edit(path / name, **changes)
    refused(path, re.escape(f"{name} is damaged (") + f".*{why}")
