"""Identical images stay in one split, whatever their names and labels."""

import shutil
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image
from shards_pictures import encoded
from test_shards_plan import plan_splits, source

from shards.build import build
from shards.copies import identical_images
from shards.index import open_dataset
from shards.sources import open_source


@pytest.fixture
def copied(tmp_path, image_folder):
    """Two classes of 40 images; 13 images have one or two copies, three of them in the other class."""
    root = image_folder(tmp_path / "source", {"cat": 40, "dog": 40})
    for i in range(10):
        shutil.copy(root / "cat" / f"{i:03d}.png", root / "cat" / f"copy-{i}.png")
    for i in range(3):
        shutil.copy(root / "cat" / f"{i:03d}.png", root / "dog" / f"copy-{i}.png")
    for i in range(3):
        shutil.copy(root / "dog" / f"{i:03d}.png", root / "dog" / f"again-{i}.png")
    return root


def splits_of_contents(root, out):
    """For each different image: the splits in which it lies."""
    found = defaultdict(set)
    for name, split in open_dataset(out).splits.items():
        for image in split.sample_names():
            found[(root / image).read_bytes()].add(name)
    return list(found.values())


@pytest.mark.parametrize("seed", range(3))
def test_no_image_lies_in_two_splits(tmp_path, copied, seed, capsys):
    out = build("folder", source=copied, out=tmp_path / "out", workers=1, seed=seed, val_fraction=0.2)
    splits = splits_of_contents(copied, out)
    assert len(splits) == 80
    assert all(len(where) == 1 for where in splits)
    dataset = open_dataset(out)
    assert sum(len(split) for split in dataset.splits.values()) == 96
    # A dog that is held out takes its copies among the cats along.
    assert (dataset.splits["test"].class_counts - np.array([13, 12]) <= [3, 0]).all()
    assert (
        "note: identical images: 29, groups: 13, such as cat/000.png = cat/copy-0.png = dog/copy-0.png;"
        " each group is kept in one split; 3 have different labels, such as cat/000.png = cat/copy-0.png = dog/copy-0"
    ) in capsys.readouterr().err


def test_copies_of_different_sizes_and_endings_are_found_once(tmp_path, image_folder):
    root = image_folder(tmp_path, {"a": 6, "b": 2})
    large = np.random.default_rng(0).bytes(5000)
    ends = {"1": b"x" + large, "2": b"y" + large, "3": b"x" + large, "4": b"y" + large, "5": large, "6": b"", "7": b""}
    for name, data in ends.items():
        (root / "a" / f"{name}.jpg").write_bytes(data)
    (root / "a" / "8.png").symlink_to(root / "a" / "001.png")
    source = open_source("folder", root)
    names = source.splits["train"].names
    assert [[names[i] for i in group] for group in identical_images(source)] == [
        ["a/001.png", "a/8.png"],
        ["a/1.jpg", "a/3.jpg"],
        ["a/2.jpg", "a/4.jpg"],
    ]


@pytest.mark.parametrize("official", [False, True])
def test_the_same_pixels_in_two_splits_are_told_whatever_their_bytes(tmp_path, image_folder, official, capsys):
    """A PNG compressed otherwise, a JPEG with an EXIF block, a GIF: other bytes, and for the last other stored ones."""
    train, test = ("train/", "test/") if official else ("", "")
    root = image_folder(tmp_path / "source", dict.fromkeys([f"{train}a", f"{train}b", f"{test}a", f"{test}b"], 12))
    for i in range(6):
        first = root / f"{test}a" / f"{i:03d}.png"
        image = Image.open(first)
        if i % 2:
            image = image.quantize(200)
            first.with_suffix(".gif").write_bytes(encoded(image, "GIF"))
            first.unlink()
        (root / f"{train}a" / f"copy-{i}.png").write_bytes(encoded(image, "PNG", compress_level=1 + i))
    out = build("folder", source=root, out=tmp_path / "o ut", workers=1, shard_samples=5)
    err = capsys.readouterr().err
    found = {}
    for name, split in open_dataset(out).splits.items():
        for sample in split.sample_names():
            found.setdefault(Image.open(root / sample).convert("RGB").tobytes(), set()).add(name)
    torn = sum({"train", "test"} <= where for where in found.values())
    assert torn == 6 if official else torn > 0
    assert f"note: train and test have pictures in common: {torn} such as {train}a/" in err
    assert f" = {test}a/" in err
    assert f"; python -m shards inspect '{out}' --duplicates lists them\n" in err


def test_nothing_is_told_where_no_two_splits_show_the_same(tmp_path, copied, capsys):
    build("folder", source=copied, out=tmp_path / "out", workers=1)
    assert "in common" not in capsys.readouterr().err


def test_official_splits_are_not_rearranged_and_not_read_for_it(tmp_path, image_folder, monkeypatch, capsys):
    root = image_folder(tmp_path / "source", {"train/a": 3, "train/b": 3, "test/a": 1, "val/a": 1})
    shutil.copy(root / "train/a/000.png", root / "test/a/000.png")
    monkeypatch.setattr("shards.build.identical_images", lambda source: pytest.fail("nothing is to be held out"))
    build("folder", source=root, out=tmp_path / "out", workers=1)


def test_groups_that_cannot_be_held_out_stay_in_train():
    def planned(counts, copies, test):
        return plan_splits(
            source(counts),
            profile="natural",
            imbalance_factor=1,
            test_fraction=test,
            val_fraction=0,
            seed=0,
            copies=copies,
        )

    everything = planned([4, 4], [[0, 1, 2, 3]], test=0.5)  # class 0 is one image four times
    assert everything.splits["train"].class_counts(2).tolist() == [4, 2]
    across = planned([2, 2], [[0, 2], [1, 3]], test=0.5)
    assert across.splits["test"].class_counts(2).tolist() == [1, 1]
    last = planned([9, 1], [[0, 9]], test=0.9)  # the only image of class 1 has a copy in class 0
    assert last.splits["train"].class_counts(2).tolist() == [1, 1]
    assert set(last.splits["train"].names) == {"train0-0", "train1-9"}


def test_without_copies_nothing_changes(digits):
    assert identical_images(open_source("digits", None)) == []
