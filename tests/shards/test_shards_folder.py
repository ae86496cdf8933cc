"""The folder source: which layouts it reads, and what it says about the others."""

import os
import shutil
from pathlib import Path

import pytest
from shards_pictures import encoded, picture

import shards.progress
from shards.build import build
from shards.errors import UserError
from shards.index import open_dataset
from shards.sources import open_source
from shards.verify import verify


def opened(root):
    return open_source("folder", root)


def test_a_folder_per_class(tmp_path, image_folder):
    root = image_folder(tmp_path, {"zebra": 2, "Äpfel": 1, "ant/deep/down": 3})
    source = opened(root)
    assert source.classes == ["ant", "zebra", "Äpfel"]
    assert list(source.splits) == ["train"]
    assert source.splits["train"].names[:2] == ["ant/deep/down/000.png", "ant/deep/down/001.png"]
    assert source.splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert source.read("Äpfel/000.png") == (root / "Äpfel/000.png").read_bytes()


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("TRAINING", "validation", "testing"),
        ("train", "dev", "test"),
    ],
)
def test_official_splits(tmp_path, image_folder, train, val, test):
    counts = {f"{train}/a": 2, f"{train}/b": 1, f"{train}/c": 1, f"{test}/b": 3, f"{val}/a": 1}
    source = opened(image_folder(tmp_path, counts))
    assert source.classes == ["a", "b", "c"]
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {
        "train": [0, 0, 1, 2],
        "test": [1, 1, 1],
        "val": [0],
    }


def test_a_class_named_train_is_no_split_and_is_reported(tmp_path, image_folder):
    source = opened(image_folder(tmp_path, {"car": 1, "train": 1}))
    assert source.classes == ["car", "train"]
    assert source.notes == ("taken for a class, not for a split, as no folders lie in it: 'train'",)


@pytest.mark.parametrize("name", ["trail", "chest", "test tube", "vale", "van", "Train_station"])
def test_classes_that_only_resemble_splits_are_classes(tmp_path, image_folder, name):
    assert opened(image_folder(tmp_path, {f"{name}/2024": 1, "road/2024": 1})).classes == sorted([name, "road"])


def test_a_train_folder_alone_is_the_training_split(tmp_path, image_folder):
    source = opened(image_folder(tmp_path / "pets", {"Train/cat": 2, "Train/dog": 1}))
    assert source.classes == ["cat", "dog"]
    assert list(source.splits) == ["train"]
    assert source.notes == ("pets holds Train alone: what is to be held out is taken from it",)


def test_extensions_in_any_case_count_and_other_files_are_reported(tmp_path, image_folder):
    root = image_folder(tmp_path, {"a": 1, "b": 1})
    (root / "a" / "X.JPG").write_bytes(encoded(picture(), "JPEG"))
    (root / "a" / "notes.txt").write_text("no image")
    (root / "b" / "README").write_text("no image")
    (root / "b" / ".hidden.png").write_text("hidden")
    (root / ".cache").mkdir()
    (root / "list.csv").write_text("beside the classes")
    source = opened(root)
    assert source.splits["train"].names == ["a/000.png", "a/X.JPG", "b/000.png"]
    assert source.notes == ("files that are not images are skipped: 1 .txt, 1 without extension",)


def test_thumbnails_that_a_network_drive_made_are_no_images(tmp_path, image_folder):
    counts = dict.fromkeys(["a", "b", "a/deep", "@eaDir/a", "a/@eaDir/000.png", "a/deep/@eaDir"], 2)
    source = opened(image_folder(tmp_path, counts))
    assert source.classes == ["a", "b"]
    assert sorted(source.splits["train"].names) == [
        f"{folder}/{i:03d}.png" for folder in ("a", "a/deep", "b") for i in range(2)
    ]


def test_images_beside_the_class_folders_are_reported(tmp_path, image_folder):
    root = image_folder(tmp_path, {"a": 1, "b": 1})
    (root / "loose.png").write_bytes(encoded(picture(), "PNG"))
    assert opened(root).notes == ("images that lie in no class folder are skipped: 1",)


def test_linked_class_folders_are_followed(tmp_path, image_folder):
    root = image_folder(tmp_path / "source", {"a": 1})
    image_folder(tmp_path / "elsewhere", {"x": 2})
    (root / "b").symlink_to(tmp_path / "elsewhere" / "x")
    assert opened(root).splits["train"].labels.tolist() == [0, 1, 1]


def test_the_fingerprint_follows_names_and_sizes(tmp_path, image_folder):
    first = opened(image_folder(tmp_path / "1", {"a": 2, "b": 1})).fingerprint
    assert opened(image_folder(tmp_path / "2", {"a": 2, "b": 1})).fingerprint == first
    assert opened(image_folder(tmp_path / "3", {"a": 1, "b": 1})).fingerprint != first
    with (tmp_path / "2/a/000.png").open("ab") as file:
        file.write(b"x")
    assert opened(tmp_path / "2").fingerprint != first


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "holds no class folders"),
        ({"a": 3}, "holds only one class, 'a'; a dataset needs at least two"),
        ({"a": 3, "b": 0}, "/b holds no images; add some"),
        ({"train/a": 1, "train/b": 1, "test/a": 1, "test/c": 1}, "class 'c' has no training images"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "validation/a": 1}, "holds both val and validation"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "rest/a": 1}, "holds 'rest', which looks like 'test'"),
        (
            {"train/a": 1, "train/b": 1, "val/a": 1, "more/a": 1},
            r"holds splits \(train, val\) beside 'more'; move that",
        ),
        ({"Train/a": 1, "Train/b": 1, "TEST": 2}, "/TEST holds no class folders"),
        ({"train/a": 1, "train/b": 1, "Training/a": 1}, "holds both Training and train; merge them"),
        ({"train/a": 1, "train/b": 1, "testt/a": 1}, "holds 'testt', which looks like 'test'"),
        ({"train/a": 1, "train/b": 1, "trian/a": 1}, "holds 'trian', which looks like 'train'"),
        (
            {"trian/a": 1, "tset/b": 1},
            "holds 'trian', which looks like 'train' and is not the name of a split; rename",
        ),
        ({"train2018/a": 1, "val2018/b": 1}, "holds 'train2018', which looks like 'train'"),
        ({"train_images/a": 1, "test-set/b": 1}, "holds 'test-set', which looks like 'test'"),
        ({"train/a": 1, "train/b": 1, "unlabelled": 4}, r"holds splits \(train\) beside 'unlabelled'; move that away"),
        ({"train/a": 1, "trian/b": 1, "x": 1}, r"beside 'trian' \(did you mean 'train'\?\); move that away"),
        ({"val/a": 1, "Test/a": 1}, "holds Test, val and no train; add the training images as /"),
        ({"val": 1, "test": 1}, "holds test, val and no train"),
        ({"test/a": 1, "b": 1, "c": 1}, r"holds splits \(test\) beside 'b'"),
        ({"train/a": 1, "train/b": 1, "test": 2}, "/test holds no class folders"),
    ],
)
def test_layouts_that_will_not_do(tmp_path, image_folder, layout, message):
    with pytest.raises(UserError, match=message) as error:
        opened(image_folder(tmp_path, layout))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_folder_with_other_files_only_says_what_is_there(tmp_path, image_folder):
    root = image_folder(tmp_path, {"a": 1, "b": 0})
    (root / "b" / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"/b holds no images \(only 1 .txt\)"):
        opened(root)


def test_no_source_a_missing_one_and_a_file(tmp_path):
    with pytest.raises(UserError, match="folder needs --source DIR"):
        opened(None)
    with pytest.raises(UserError, match=r"--source \S+/nowhere does not exist"):
        opened(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--source \S+/file is not a folder"):
        opened(tmp_path / "file")


def test_names_that_no_text_file_can_list_are_stored_with_escapes(tmp_path, image_folder):
    root = image_folder(tmp_path / "source", {"a": 1, "b": 1})
    os.mkdir(os.fsencode(root) + b"/caf\xe9")
    for i, name in enumerate((b"a/a\nb.png", b"a/\xff.png", b"caf\xe9/x.png")):
        with open(os.fsencode(root) + b"/" + name, "wb") as file:
            file.write(encoded(picture(i), "PNG"))
    with open(os.fsencode(root) + b"/b/bad\xff.png", "wb") as file:
        file.write(b"no image")
    source = opened(root)
    assert source.notes == (
        "names with bytes that are not UTF-8 text, or control codes, are stored with escapes:"
        r" 4 (a/a\nb.png, a/\xff.png, b/bad\xff.png, …)",
    )
    out = build("folder", source=root, out=tmp_path / "out", workers=2, test_fraction=0, val_fraction=0)
    dataset = open_dataset(out)
    assert dataset.classes == ["a", "b", r"caf\xe9"]
    train = dataset.splits["train"]
    assert sorted(train.sample_names()) == ["a/000.png", r"a/\xff.png", r"a/a\nb.png", "b/000.png", r"caf\xe9/x.png"]
    assert r'"b/bad\\xff.png"' in (out / "rejected.jsonl").read_text(encoding="utf-8")
    assert verify(out, workers=1) == []
    assert build("folder", source=root, out=out, workers=1, test_fraction=0, val_fraction=0) == out


def test_a_link_back_is_not_followed_for_ever(tmp_path, image_folder):
    root = image_folder(tmp_path, {"a/deep": 1, "b": 1})
    (root / "a" / "deep" / "up").symlink_to(root / "a")
    assert opened(root).splits["train"].names == ["a/deep/000.png", "b/000.png"]


def test_photographs_that_this_pil_does_not_read_are_reported_with_a_remedy(tmp_path, image_folder):
    root = image_folder(tmp_path / "source", {"a": 2, "b": 2})
    for name in ("x.heic", "y.HEIC", "z.jxl"):
        (root / "a" / name).write_bytes(b"picture")
    (root / "a" / "notes.txt").write_text("no image")
    source = opened(root)
    assert source.notes == ("files that are not images are skipped: 1 .txt",)
    assert source.skipped == (
        "images that this PIL does not read are left out: 2 .heic, 1 .jxl;"
        " for .heic: pip install pi-heif; ImageMagick turns .jxl into JPEG: magick mogrify -format jpg *.jxl",
    )
    options = {"source": root, "out": tmp_path / "out", "workers": 1}
    for _ in range(2):  # also where the dataset is there already
        with pytest.raises(UserError, match=r"2 \.heic, 1 \.jxl; .*; fix that or leave out --strict"):
            build("folder", **options, strict=True)
        build("folder", **options)
    shutil.rmtree(tmp_path / "out")
    for name in ("x.heic", "y.HEIC", "z.jxl"):
        (root / "a" / name).unlink()
    build("folder", **options, strict=True)  # files that are no images at all are no loss


def test_listing_shows_how_far_it_is(tmp_path, image_folder, monkeypatch, capsys):
    root = image_folder(tmp_path, {"a": 2, "b": 1})
    monkeypatch.setattr(shards.progress, "SECONDS_BETWEEN_LINES", 0.0)
    opened(root)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "list: 2 images so far",
        "list: 3 images so far",
    ]


def test_listing_looks_at_each_file_once(tmp_path, image_folder, monkeypatch):
    root = image_folder(tmp_path, {"a": 20, "b": 10})
    looks = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *path, **options: looks.append(path) or stat(*path, **options))
    assert len(opened(root).splits["train"]) == 30
    assert len(looks) < 30  # of folders; files are looked at as their folder is scanned


def test_unknown_dataset_lists_the_known():
    with pytest.raises(UserError, match="unknown dataset 'mnist'; choose one of: digits, fashion-mnist, cifar10, "):
        open_source("mnist", None)


def test_digits_take_no_source(tmp_path):
    with pytest.raises(UserError, match="leave out --source"):
        open_source("digits", tmp_path)


@pytest.mark.parametrize("dataset", ["folder", "places-lt"])
def test_a_folder_that_may_not_be_read(tmp_path, image_folder, monkeypatch, dataset):
    image_folder(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "P_train.txt").write_text("")
    for split in ("val", "test"):
        (tmp_path / f"P_{split}.txt").write_text("")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=rf"--source {tmp_path} cannot be read: {tmp_path}: Permission denied"):
        open_source(dataset, tmp_path)


def test_names_that_would_steer_a_terminal_are_stored_with_escapes(tmp_path, image_folder):
    root = image_folder(tmp_path, {"a": 1, "\x1b[31mred": 1, "日本\u3000猫": 1, "e\u0301te\u200d": 1})
    assert opened(root).classes == [r"\x1b[31mred", "a", "e\u0301te\u200d", "日本\u3000猫"]


@pytest.mark.parametrize("layout", ["", "train/"])
def test_the_source_may_be_the_current_folder(tmp_path, image_folder, monkeypatch, layout):
    root = image_folder(tmp_path / "pets", {f"{layout}cat": 2, f"{layout}dog": 1})
    elsewhere = opened(root)
    monkeypatch.chdir(root)
    here = opened(Path())
    assert here.splits["train"].names == elsewhere.splits["train"].names
    assert here.fingerprint == elsewhere.fingerprint
    assert here.read(here.splits["train"].names[0])
