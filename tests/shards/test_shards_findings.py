"""What is found out before shards are written: classes that are lost, splits that are, and the bits of grey images."""

import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from shards_pictures import encoded, png_of_16_bits

import shards.build
import shards.findings
from shards.build import build
from shards.errors import UserError
from shards.index import open_dataset
from shards.plan import plan_splits
from shards.sources import open_source
from shards.verify import verify
from shards.writer import write_shard


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def half_lost(tmp_path, image_folder):
    """Classes a, b, c and d; none of b's eight images is one."""
    source = image_folder(tmp_path / "source", {"a": 9, "b": 0, "c": 8, "d": 7})
    length = len((source / "a" / "000.png").read_bytes())
    for i in range(8):
        (source / "b" / f"{i}.jpg").write_bytes(f"no image {i}".encode().ljust(length))
    return source


def test_a_class_of_bad_images_is_left_out_and_reported(tmp_path, half_lost, capsys):
    out = build("folder", source=half_lost, out=tmp_path / "out", workers=1, shard_samples=4)
    err = capsys.readouterr().err
    assert "note: classes of which no training image can be read are left out: 1 (b), for" in err
    dataset = open_dataset(out)
    assert dataset.classes == ["a", "c", "d"]
    assert [len(split.class_counts) for split in dataset.splits.values()] == [3, 3, 3]
    for split in dataset.splits.values():
        expected = [dataset.classes.index(name.split("/")[0]) for name in split.sample_names()]
        assert split.samples["label"].tolist() == expected
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == dataset.manifest["rejected"]["total"] == 8
    assert {(image["class"], image["label"]) for image in rejected} == {("b", None)}
    assert {image["reason"] for image in rejected} == {"not an image", "its class is left out"}
    assert "note: images left out: 8 of 32 (" in err
    assert verify(out, workers=1) == []


def test_it_is_the_same_for_any_workers_and_after_an_interruption(tmp_path, half_lost, monkeypatch, capsys):
    options = {"source": half_lost, "shard_samples": 4}
    for name, workers in (("one", 1), ("two", 2)):
        build("folder", out=tmp_path / name / "out", workers=workers, **options)
    one = contents(tmp_path / "one" / "out")
    assert contents(tmp_path / "two" / "out") == one

    written = []

    def write(job):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(job)
        return write_shard(job)

    with monkeypatch.context() as patch:
        patch.setattr(shards.build, "write_shard", write)
        with pytest.raises(KeyboardInterrupt):
            build("folder", out=tmp_path / "cut" / "out", workers=1, **options)
    # What was found out is remembered: shards that are done count on it.
    (half_lost / "b" / "0.jpg").write_bytes((half_lost / "a" / "000.png").read_bytes())
    capsys.readouterr()
    build("folder", out=tmp_path / "cut" / "out", workers=1, **options)
    assert "continuing: 3 of " in capsys.readouterr().err
    assert contents(tmp_path / "cut" / "out") == one


def test_one_good_image_among_many_bad_ones_keeps_the_class(tmp_path, half_lost):
    good = (half_lost / "a" / "000.png").read_bytes()
    (half_lost / "b" / "good.png").write_bytes(good)
    for seed in range(3):
        out = build(
            "folder", source=half_lost, out=tmp_path / str(seed), workers=1, test_fraction=0, val_fraction=0, seed=seed
        )
        assert open_dataset(out).train_counts.tolist() == [9, 1, 8, 7]


def test_strict_names_an_image_of_the_class(tmp_path, half_lost):
    with pytest.raises(UserError, match=r"b/\d\.jpg: not an image; fix or remove it, or leave out --strict"):
        build("folder", source=half_lost, out=tmp_path / "out", workers=1, strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_held_out_split_of_one_bad_image_is_left_out(tmp_path, image_folder, capsys):
    source = image_folder(tmp_path / "source", {"a": 5, "b": 1})
    out = tmp_path / "out"
    options = {"source": source, "out": out, "workers": 1, "test_fraction": 0, "val_fraction": 0.1}
    build("folder", **options)
    (name,) = open_dataset(out).splits["val"].sample_names()
    (source / name).write_bytes(bytes((source / name).stat().st_size))
    build("folder", **options, overwrite=True)
    assert "note: no image that was held out for val can be read; there is no val split" in capsys.readouterr().err
    assert list(open_dataset(out).splits) == ["train"]
    assert verify(out, workers=1) == []


def grey(folder, values):
    """16-bit PNGs, each of one value and one black pixel."""
    for i, value in enumerate(values):
        values_HW = np.full((8, 8), value, np.uint16)
        values_HW[0, 0] = 0
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(encoded(Image.fromarray(values_HW), "PNG"))


@pytest.mark.parametrize(
    ("largest", "bits"), [(200, 8), (1023, 10), (1024, 12), (4095, 12), (16383, 14), (16384, 16), (65535, 16)]
)
def test_16_bit_images_share_one_scale(tmp_path, capsys, largest, bits):
    source = tmp_path / "source"
    grey(source / "bright", [largest, largest])
    grey(source / "dark", [largest // 10, largest // 5])
    out = build("folder", source=source, out=tmp_path / "out", workers=1, test_fraction=0, val_fraction=0)
    dataset = open_dataset(out)
    assert dataset.manifest["grey_bits"] == bits
    split = dataset.splits["train"]
    tar = split.shard_paths[0].read_bytes()
    for name, row in zip(split.sample_names(), split.samples, strict=True):
        value = {"bright/0.png": largest, "bright/1.png": largest, "dark/0.png": largest // 10}.get(name, largest // 5)
        shown = np.asarray(Image.open(BytesIO(tar[row["offset"] :][: row["size"]])))[4, 4]
        assert shown == round(value * 255 / ((1 << bits) - 1))
    note = f"note: 16-bit grey images use {bits} bits: value v is stored as v · 255 / {(1 << bits) - 1}\n"
    assert (note in capsys.readouterr().err) == (bits < 16)
    assert verify(out, workers=1) == []
    assert build("folder", source=source, out=out, workers=1, test_fraction=0, val_fraction=0) == out


@pytest.mark.parametrize("brightest", [15, 200])
def test_16_bit_colour_loses_its_lower_byte_and_that_is_told(tmp_path, image_folder, brightest, capsys):
    source = image_folder(tmp_path / "source", {"a": 3, "b": 3})
    build("folder", source=source, out=tmp_path / "none", workers=1)
    assert "16-bit" not in capsys.readouterr().err
    for i in range(3):
        (source / "b" / f"{i:03d}.png").write_bytes(png_of_16_bits(np.full((4, 5, 3), 256 * brightest + 77)))
    out = build("folder", source=source, out=tmp_path / "out", workers=1)
    err = capsys.readouterr().err
    assert "note: of 16-bit colour the upper byte is stored" in err
    assert ("; the brightest that was looked at is then 15 of 255: scale them first\n" in err) == (brightest == 15)
    assert verify(out, workers=1) == []


def test_a_few_16_bit_images_among_others_are_seen(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 9, "b": 9})
    grey(source / "a", [4000, 2000])
    for seed in range(3):
        options = {"workers": 1, "seed": seed, "test_fraction": 0, "val_fraction": 0}
        out = build("folder", source=source, out=tmp_path / str(seed), **options)
        assert open_dataset(out).manifest["grey_bits"] == 12


def test_one_32_bit_image_does_not_darken_the_others(tmp_path):
    for name in ("a", "b"):
        grey(tmp_path / "source" / name, [4000, 2000])
    mask = Image.fromarray(np.full((4, 4), 70000, np.int32))
    (tmp_path / "source" / "b" / "mask.tif").write_bytes(encoded(mask, "TIFF"))
    options = {"workers": 1, "test_fraction": 0, "val_fraction": 0}
    out = build("folder", source=tmp_path / "source", out=tmp_path / "out", **options)
    assert open_dataset(out).manifest["grey_bits"] == 12


def test_nothing_is_said_of_16_bit_images_that_are_turned_away(tmp_path, image_folder, capsys):
    source = image_folder(tmp_path / "source", {"a": 9, "b": 9})
    grey(source / "a", [4000, 2000])
    out = build("folder", source=source, out=tmp_path / "out", workers=1, keep_bytes=True)
    assert open_dataset(out).manifest["rejected"]["reasons"] == {"cannot be kept: not plain 8-bit RGB or grey": 2}
    assert "16-bit" not in capsys.readouterr().err


def test_a_class_is_not_lost_to_the_bad_images_that_the_profile_would_keep(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 20, "b": 20, "c": 20})
    options = {"source": source, "test_fraction": 0.1, "val_fraction": 0, "profile": "exp", "imbalance_factor": 18}
    bad, test = [], None
    for number in range(3):
        out = tmp_path / str(number)
        dataset = open_dataset(build("folder", out=out, workers=1 + number % 2, **options))
        assert dataset.classes == ["a", "b", "c"]
        assert dataset.splits["train"].class_counts.tolist() == [18, 4, 1]
        assert test in (None, dataset.splits["test"].sample_names())
        test = dataset.splits["test"].sample_names()
        (only,) = [name for name in dataset.splits["train"].sample_names() if name.startswith("c/")]
        rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        assert sorted(image["source"] for image in rejected) == sorted(bad)
        assert only not in bad
        bad.append(only)
        (source / only).write_bytes(b"no image")


@pytest.mark.parametrize("bad", [14, 16])
def test_each_bad_image_is_listed_once_where_too_few_others_are_left(tmp_path, image_folder, capsys, bad):
    source = image_folder(tmp_path / "source", {"a": 20, "b": 20, "c": 20})
    options = {"source": source, "workers": 1, "test_fraction": 0, "val_fraction": 0}
    options |= {"profile": "exp", "imbalance_factor": 2}  # of the classes 20, 14 and 10 are kept
    images = open_source("folder", source)
    plan = plan_splits(images, profile="exp", imbalance_factor=2, test_fraction=0, val_fraction=0, seed=0)
    names = [images.splits["train"].names[i] for i in plan.pools[1][:bad].tolist()]
    for name in names:
        (source / name).write_text("no image")
    for path in (source / "c").iterdir():
        path.write_text("no image")
    out = build("folder", out=tmp_path / "out", **options)
    rejected = [json.loads(line)["source"] for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert sorted(name for name in rejected if name.startswith("b/")) == sorted(names)
    assert open_dataset(out).train_counts.tolist() == [20, 20 - bad]
    assert "can be read are left out: 1 (c), for example c/" in capsys.readouterr().err
    assert verify(out, workers=1) == []


@pytest.mark.parametrize(("trained", "why"), [(3, "test/b/x.jpg: not an image"), (0, "no class of it is left")])
def test_a_test_split_of_which_nothing_can_be_read_says_why(tmp_path, image_folder, trained, why):
    source = image_folder(tmp_path / "source", {"train/a": 3, "train/b": trained, "train/c": 3, "test/b": 0})
    (source / "train" / "b" / "x.jpg").write_text("no image")
    (source / "test" / "b" / "x.jpg").write_text("no image")
    with pytest.raises(UserError, match=rf"no image of the test split can be read \({why}\); nothing was built"):
        build("folder", source=source, out=tmp_path / "out", workers=1)


def test_where_no_training_image_can_be_read_that_is_said_first(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"train/a": 0, "train/b": 0, "test/a": 0})
    for folder in ("train/a", "train/b", "test/a"):
        (source / folder / "x.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"classes with a training image that can be read: 0; .*train/a/x\.jpg: not an"):
        build("folder", source=source, out=tmp_path / "out", workers=1)


def test_images_that_are_kept_in_the_place_of_bad_ones_are_asked_how_deep_they_are(tmp_path, image_folder, monkeypatch):
    source = image_folder(tmp_path / "source", {"a": 20, "b": 20})
    options = {"profile": "exp", "imbalance_factor": 4, "test_fraction": 0, "val_fraction": 0}
    pool = plan_splits(open_source("folder", source), **options, seed=0).pools[1].tolist()
    names = sorted((source / "b").iterdir())
    for i in pool[:5]:  # as many as are kept
        names[i - 20].write_text("no image")
    grey(tmp_path / "deep", [4000])
    (tmp_path / "deep" / "0.png").replace(names[pool[9] - 20])
    monkeypatch.setattr(shards.findings, "AT_ONCE", 2)
    out = build("folder", source=source, out=tmp_path / "out", workers=1, **options)
    assert open_dataset(out).train_counts.tolist() == [20, 5]
    assert open_dataset(out).manifest["grey_bits"] == 12
