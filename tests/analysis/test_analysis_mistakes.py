"""Pictures of mistakes: the right ones, of the right dataset, or none."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from analysis.mistakes import reachable_split, thumbnail, worst_mistakes
from analysis.predictions import Answers, Predictions, read_predictions
from analysis.report import render
from analysis.runs import read_run, read_runs
from shards.index import open_dataset

COUNTS_C = np.array([500, 50, 5, 4])


def answered(labels, *runs):
    """Make the answers of runs, each a list of (predicted class, confidence)."""
    labels_N = np.array(labels)
    found = []
    for run in runs:
        top_N, sure_N = np.array(run).T
        found.append(Predictions(10 + np.arange(len(labels)), labels_N, top_N[:, None].astype(int), sure_N[:, None]))
    return Answers(found, np.mean([one.correct for one in found], axis=0))


def test_the_surest_mistakes_of_the_tail_come_first():
    group, worst = worst_mistakes(
        answered([0, 2, 2, 3, 3], [(1, 0.99), (0, 0.5), (2, 0.9), (1, 0.8), (3, 0.9)]), COUNTS_C
    )
    assert group == "few"
    assert [(one.image, one.true, one.predicted, one.confidence) for one in worst] == [(13, 3, 1, 0.8), (11, 2, 0, 0.5)]


def test_what_all_seeds_mistake_comes_before_what_one_does():
    first, second = [(0, 0.6), (0, 0.9)], [(1, 0.7), (2, 0.9)]
    _, worst = worst_mistakes(answered([2, 2], first, second), COUNTS_C)
    assert [(one.image, one.wrong) for one in worst] == [(10, 1.0), (11, 0.5)]
    assert worst[0].confidence == pytest.approx(0.65)


def test_a_hopeless_class_does_not_fill_the_sheet():
    _, worst = worst_mistakes(answered([2] * 9 + [3], [(0, 0.9)] * 10), COUNTS_C)
    assert [one.true for one in worst] == [2] * 6 + [3]
    counts_C = np.full(20, 4)
    labels = [0] * 9 + list(range(1, 20))
    _, worst = worst_mistakes(answered(labels, [(19, 0.9)] * 27 + [(0, 0.9)]), counts_C)
    assert [one.true for one in worst] == [0] * 3 + list(range(1, 10))


def test_without_few_shot_classes_the_middle_is_shown_and_the_head_never():
    assert worst_mistakes(answered([0, 1], [(1, 0.9), (0, 0.9)]), COUNTS_C)[0] == "medium"
    assert worst_mistakes(answered([0], [(1, 0.9)]), COUNTS_C) == ("many", [])


@pytest.fixture
def trained(digits, make_run):
    """A run on the digits whose predictions are wrong for every other test image of a class."""
    path = make_run("ce", title="CE", classes=digits.classes, train_counts=digits.train_counts.tolist())
    labels_N = np.array(digits.splits["test"].samples["label"])
    top_N = labels_N.copy()
    for label in range(10):
        wrong = np.flatnonzero(labels_N == label)[::2]
        top_N[wrong] = (label + 1) % 10
    rewrite(
        path / "per_class.json",
        correct=np.bincount(labels_N[top_N == labels_N], minlength=10).tolist(),
        total=np.bincount(labels_N, minlength=10).tolist(),
    )
    np.savez(
        path / "predictions.npz",
        test_ids=np.arange(len(labels_N)),
        test_labels=labels_N,
        test_topk_labels=top_N[:, None],
        test_topk_scores=np.linspace(0.5, 1, len(labels_N))[:, None],
    )
    config = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(config.replace("data/ce", str(digits.root)))
    return path


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_page_shows_the_pictures_and_still_needs_nothing_else(trained):
    page = render(read_runs([trained]))
    assert "Worst mistakes in the tail" in page
    images = page.split('<img src="')[1:]
    assert len(images) == 12
    for image in images:
        assert image.startswith("data:image/png;base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(image.split(",")[1].split('"')[0])))
        assert picture.size == (16, 16)


@pytest.mark.parametrize("case", ["moved", "url", "no place", "damaged", "other labels", "other counts"])
def test_without_the_same_dataset_there_are_no_pictures(trained, digits, case):
    config = (trained / "config.yaml").read_text()
    place = str(digits.root)
    changed = {"moved": f"{place}-moved", "url": "s3://bucket/digits", "no place": "null"}.get(case, place)
    (trained / "config.yaml").write_text(config.replace(place, changed) + "x: 2020-13-45\n" * (case == "damaged"))
    if case == "other labels":
        with np.load(trained / "predictions.npz") as arrays:
            content = dict(arrays)
        content["test_ids"] = content["test_ids"][::-1]
        np.savez(trained / "predictions.npz", **content)
    if case == "other counts":
        rewrite(trained / "per_class.json", train_counts=[*digits.train_counts.tolist()[:-1], 5])
    assert "Worst mistakes" not in render(read_runs([trained]))


def test_a_damaged_picture_is_left_out(trained, digits, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(digits.root, copy)
    run = read_run(trained)
    predictions = read_predictions(run)
    assert reachable_split(run, Answers([predictions], predictions.correct)) is not None
    split = open_dataset(copy).splits["test"]
    assert thumbnail(split, 0).startswith("data:image/png")
    with split.shard_paths[0].open("r+b") as file:
        file.seek(int(split.samples[0]["offset"]))
        file.write(b"\0" * 40)
    assert thumbnail(split, 0) is None
    split.shard_paths[0].unlink()
    assert thumbnail(split, 1) is None
