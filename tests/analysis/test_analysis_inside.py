"""What runs keep of classifiers and features: read, and drawn for any number of classes."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from analysis.compare import group_runs
from analysis.drawing import inline_svg
from analysis.inside import by_class, diagnostic, embedding, lines_of, norm_lines, read_sample
from analysis.report import render
from analysis.runs import read_run, read_runs
from shards.errors import UserError


def write(path, **arrays):
    np.savez(path / "diagnostics.npz", **{name: np.asarray(array, np.float32) for name, array in arrays.items()})


def test_norms_are_relative_to_the_mean_of_the_whole_and_averaged_over_seeds(make_run):
    paths = [make_run(f"{seed}", seed=seed, train_counts=[30, 7]) for seed in range(2)]
    write(paths[0], norms=[3, 1], norms_conventional=[2, 0])
    write(paths[1], norms=[5, 3], norms_conventional=[4, 2])
    whole, half = norm_lines(group_runs(read_runs(paths)))
    assert (whole.style, half.style) == ("-", "--")
    assert whole.values_C.tolist() == pytest.approx([4 / 3, 2 / 3])
    assert half.values_C.tolist() == pytest.approx([3 / 3, 1 / 3])


def test_an_entry_of_which_one_seed_kept_nothing_is_left_out(make_run):
    paths = [make_run("a", title="CE"), make_run("b", title="CE", seed=1), make_run("c")]
    for path in paths[1:]:
        write(path, norms=np.ones(6), distances=np.ones(6))
    (line,) = lines_of(group_runs(read_runs(paths)), "distances")
    assert line.entry == 1  # it keeps its colour


def test_classes_that_nobody_measured_leave_gaps(make_run):
    path = make_run("a")
    write(path, distances=[0.5, np.nan, 0.5, np.nan, 0.25, 0.25])
    svg = inline_svg(by_class(lines_of(group_runs(read_runs([path])), "distances"), "distances"))
    assert "nan" not in svg
    write(path, distances=[np.nan] * 6)
    assert diagnostic(read_run(path), "distances") is None
    assert by_class([], "nothing") is None


@pytest.mark.parametrize("counts", [[7], [500, 3], [100] * 50, np.geomspace(1000, 2, 8142).astype(int).tolist()])
def test_any_number_of_classes_is_a_small_picture(make_run, counts):
    path = make_run("a", train_counts=counts, diagnostics=True)
    for lines in (norm_lines(group_runs(read_runs([path]))), lines_of(group_runs(read_runs([path])), "distances")):
        svg = inline_svg(by_class(lines, "picture"))
        assert ET.fromstring(svg).tag.endswith("svg")
        assert len(svg) < 40_000
        assert not re.search("#[0-9a-f]{6}", svg)  # all colours follow the page


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"norms": np.ones(5, np.float32)}, "norms must hold a number for each of 6 classes"),
        ({"norms": np.ones(6, np.int64)}, "norms must hold a number"),
        ({"norms": np.array([1, 1, 1, 1, 1, np.inf], np.float32)}, "must be finite and not negative"),
        ({"norms": np.full(6, -1, np.float32)}, "must be finite and not negative"),
        ({"norms": np.array([None] * 6)}, "allow_pickle=False"),
    ],
)
def test_damaged_diagnostics_are_named(make_run, arrays, why):
    path = make_run("a")
    np.savez(path / "diagnostics.npz", **arrays)
    with pytest.raises(UserError, match=rf"diagnostics\.npz is damaged \(.*{why}.*remove the file"):
        diagnostic(read_run(path), "norms")


def sample(path, **changes):
    arrays = {
        "features": np.random.default_rng(0).normal(size=(12, 4)).astype(np.float16),
        "labels": np.repeat([0, 5], 6),
        "generated": np.arange(12) % 2 == 0,
    }
    np.savez(path / "feature_sample.npz", **(arrays | changes))


def test_a_sample_is_drawn_by_class_and_kind(make_run):
    path = make_run("a")
    sample(path)
    found = read_sample(read_run(path))
    assert found.classes == [0, 5]
    svg = inline_svg(embedding(found))
    assert "var(--entry1)" in svg
    assert "var(--entry2)" not in svg
    assert inline_svg(embedding(found)) == svg  # the same every time


NOTHING = {"features": np.zeros((0, 4), np.float16), "labels": np.zeros(0, int), "generated": np.zeros(0, bool)}


@pytest.mark.parametrize("changes", [{"features": np.ones((12, 4), np.float16)}, NOTHING], ids=["all alike", "none"])
def test_what_makes_no_picture_is_left_out(make_run, changes):
    path = make_run("a")
    sample(path, **changes)
    assert read_sample(read_run(path)) is None
    assert "Generated features" not in render([read_run(path)])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"labels": np.repeat([0, 6], 6)}, "a label lies outside its 6 classes"),
        ({"labels": np.zeros(11, np.int64)}, "shapes of its arrays disagree"),
        ({"features": np.full((12, 4), np.nan, np.float16)}, "a feature is not finite"),
        ({"generated": np.zeros(12)}, "of the wrong type"),
    ],
)
def test_damaged_samples_are_named(make_run, changes, why):
    path = make_run("a")
    sample(path, **changes)
    with pytest.raises(UserError, match=rf"feature_sample\.npz is damaged \(.*{why}"):
        read_sample(read_run(path))


def test_a_sample_that_lacks_an_array(make_run):
    path = make_run("a")
    np.savez(path / "feature_sample.npz", features=np.zeros((9, 2)))
    with pytest.raises(UserError, match="it lacks generated"):
        read_sample(read_run(path))


def test_the_page_shows_what_runs_kept(make_run):
    paths = [make_run("bbn", diagnostics=True)]
    paths.append(make_run("afg", title="BBN + AFG", stage=2, diagnostics=True, **{"from": "bbn"}))
    page = render(read_runs(paths))
    for words in ("Classifier and features", "Generated features", "β of each class", "std σ", "crosses"):
        assert words in page
    only = render(read_runs(paths[:1]))
    assert "Generated features" not in only
    assert "β of each class" not in only
    assert "Classifier and features" not in render([read_run(make_run("old"))])
