"""inspect: copies among the images, and shards that are not there."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from shards_pictures import encoded
from sklearn.datasets import load_sample_image

import shards.duplicates
from shards.__main__ import main
from shards.build import build
from shards.duplicates import Group, Member, find_duplicates, report
from shards.errors import UserError
from shards.index import open_dataset


@pytest.fixture
def inspected(monkeypatch, capsys):
    """Run inspect: inspected(root, "--duplicates") -> (status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["shards", "inspect", *map(str, arguments)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        capsys.readouterr()
        try:
            main()
        except SystemExit as error:
            return error.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


def photographs(n):
    """Different parts of two photographs."""
    chance = np.random.default_rng(0)
    whole = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    for i in range(n):
        side = int(chance.integers(120, 300))
        left, top = int(chance.integers(0, 640 - side)), int(chance.integers(0, 427 - side))
        yield whole[i % 2].crop((left, top, left + side, top + side)).resize((260, 260))


@pytest.fixture
def photos(tmp_path):
    """Official splits: each of 24 test images is in train too, written again in one way or another."""
    ways = {
        "same.jpg": lambda image: encoded(image, "JPEG", quality=90),
        "half.jpg": lambda image: encoded(image.resize((130, 130)), "JPEG", quality=80),
        "double.png": lambda image: encoded(image.resize((520, 520)), "PNG"),
        "poor.jpg": lambda image: encoded(image, "JPEG", quality=40),
    }
    for i, image in enumerate(photographs(60)):
        for split in ("train", "test"):
            (tmp_path / "source" / split / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        data = encoded(image, "JPEG", quality=90)
        (tmp_path / "source" / "train" / f"class{i % 2}" / f"{i:02d}.jpg").write_bytes(data)
        if i < 24:
            way = list(ways)[i % 4]
            (tmp_path / "source" / "test" / f"class{i % 2}" / f"{i:02d}-{way}").write_bytes(ways[way](image))
    return tmp_path / "source"


def test_copies_and_resized_copies_are_found_and_nothing_else(tmp_path, photos):
    dataset = open_dataset(build("folder", source=photos, out=tmp_path / "out", workers=1, shard_samples=20))
    for workers in (1, 2):
        groups = find_duplicates(dataset, workers=workers)
        found = {tuple(sorted(member.name.split("/")[-1][:2] for member in group.members)) for group in groups}
        assert found == {(f"{i:02d}",) * 2 for i in range(24)}
        assert all(group.across and not group.torn for group in groups)
        exact = {member.name for group in groups if group.exact for member in group.members if member.split == "test"}
        assert exact == {f"test/class{i % 2}/{i:02d}-same.jpg" for i in range(0, 24, 4)}


def test_the_list_begins_with_copies_across_splits_and_different_labels(tmp_path, photos, inspected):
    train, test = photos / "train", photos / "test"
    for path in test.glob("*/*"):
        if path.name[:2] not in ("00", "01"):
            path.unlink()
    shutil.copy(train / "class0" / "40.jpg", train / "class0" / "within.jpg")
    shutil.copy(train / "class0" / "42.jpg", train / "class1" / "torn.jpg")
    out = build("folder", source=photos, out=tmp_path / "out", workers=1)
    status, text, _ = inspected(out, "--duplicates", "--workers", 1)
    assert status == 0
    lines = text.splitlines()
    assert lines[0] == "copies: 8 images; groups: 4, across splits: 2, with different labels: 1"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "identical, across splits",
        "alike, across splits",
        "identical, different labels",
        "identical",
    ]
    assert (
        lines[1]
        == "identical, across splits: train train/class0/00.jpg (class0) = test test/class0/00-same.jpg (class0)"
    )
    assert "train/class1/torn.jpg (class1)" in lines[3]


def test_without_copies(tmp_path, photos, inspected):
    shutil.rmtree(photos / "test")
    out = build("folder", source=photos, out=tmp_path / "out", workers=1)
    assert inspected(out, "--duplicates") == (0, "copies: none found\n", "")
    status, _, err = inspected(out, "--duplicates", "--workers", 0)
    assert (status, err) == (2, "python -m shards: error: --workers is 0; give a whole number of at least 1\n")


def test_blank_and_tiny_images_are_compared_too(tmp_path):
    for i, value in enumerate([0, 0, 1, 128, 255, 255]):
        for name, size in (("blank", (40, 30)), ("tiny", (1, 1))):
            (tmp_path / "source" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name / f"{i}.png").write_bytes(encoded(Image.new("L", size, value), "PNG"))
    out = build("folder", source=tmp_path / "source", out=tmp_path / "out", workers=1, test_fraction=0, val_fraction=0)
    dataset = open_dataset(out)
    groups = find_duplicates(dataset, workers=1)
    values = [sorted({member.name.split("/")[1][0] for member in group.members}) for group in groups]
    assert sorted(values) == [["0", "1", "2"], ["3"], ["4", "5"]]  # a blank image looks like a tiny one of its grey


def test_many_of_a_kind_are_one_group():
    marks = np.zeros(1000, shards.duplicates.MARK)
    marks["bytes"] = [b"%016d" % (i % 500) for i in range(1000)]
    marks["thumb"] = np.arange(1000)[:, None] // 900 * 200
    groups = list(shards.duplicates._groups(marks))
    assert sorted(map(len, groups)) == [1000]


def test_a_report_names_splits_and_classes():
    group = Group([Member("train", "a.jpg", 0), Member("val", "b.jpg", 1)], exact=True)
    assert list(report([group], ["x", "y"])) == [
        "copies: 2 images; groups: 1, across splits: 1, with different labels: 1",
        "identical, across splits, different labels: train a.jpg (x) = val b.jpg (y)",
    ]


def test_inspect_tells_of_a_missing_shard(tmp_path, digits, inspected):
    out = shutil.copytree(digits, tmp_path / "copy")
    assert inspected(out)[0] == 0
    (out / "train-000001.tar").unlink()
    with (out / "test-000000.tar").open("ab") as file:
        file.write(b"x")
    size = (out / "test-000000.tar").stat().st_size
    for arguments in ((), ("--duplicates",)):
        status, text, _ = inspected(out, *arguments)
        assert status == 1
        assert text.splitlines()[-2:] == [
            f"train-000001.tar: missing; run: tailstream verify {out}",
            f"test-000000.tar: {size:,} bytes long, not {size - 1:,}; run: tailstream verify {out}",
        ]


def test_a_shard_that_goes_while_it_is_compared(tmp_path, digits):
    dataset = open_dataset(shutil.copytree(digits, tmp_path / "copy"))
    dataset.splits["val"].shard_paths[0].unlink()
    with pytest.raises(UserError, match=r"val-000000\.tar cannot be read \(.*verify"):
        find_duplicates(dataset, workers=1)


@pytest.mark.parametrize("at", [0, 12, 45])  # the start of a PNG, its first chunk's name, its pixels
def test_a_picture_that_is_damaged_is_named(tmp_path, digits, at):
    dataset = open_dataset(shutil.copytree(digits, tmp_path / "copy"))
    split = dataset.splits["val"]
    with split.shard_paths[0].open("r+b") as file:
        file.seek(int(split.samples["offset"][0]) + at)
        file.write(b"\0\0\0\0")
    with pytest.raises(UserError, match=r"val-000000\.tar cannot be read \(.*verify"):
        find_duplicates(dataset, workers=1)
