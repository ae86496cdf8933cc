"""The folder source: which layouts it reads, and what it says about the others."""

import os
from pathlib import Path

import pytest
from shards_pictures import encoded, picture

from shards.errors import UserError
from shards.sources import open_source


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


@pytest.mark.parametrize("val", ["val", "validation"])
def test_official_splits(tmp_path, image_folder, val):
    source = opened(image_folder(tmp_path, {"train/a": 2, "train/b": 1, "train/c": 1, "test/b": 3, f"{val}/a": 1}))
    assert source.classes == ["a", "b", "c"]
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {
        "train": [0, 0, 1, 2],
        "test": [1, 1, 1],
        "val": [0],
    }


def test_a_class_named_train_is_no_split(tmp_path, image_folder):
    assert opened(image_folder(tmp_path, {"car": 1, "train": 1})).classes == ["car", "train"]


def test_extensions_in_any_case_count_and_other_files_are_told(tmp_path, image_folder):
    root = image_folder(tmp_path, {"a": 1, "b": 1})
    (root / "a" / "X.JPG").write_bytes(encoded(picture(), "JPEG"))
    (root / "a" / "notes.txt").write_text("no image")
    (root / "b" / "README").write_text("no image")
    (root / "b" / ".hidden.png").write_text("hidden")
    (root / ".cache").mkdir()
    (root / "list.csv").write_text("beside the classes")
    source = opened(root)
    assert source.splits["train"].names == ["a/000.png", "a/X.JPG", "b/000.png"]
    assert source.notes == ("files that this PIL does not read as images are skipped: 1 .txt, 1 without extension",)


def test_images_beside_the_class_folders_are_told(tmp_path, image_folder):
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
        ({"train/a": 1, "train/b": 1, "val/a": 1, "rest/a": 1}, r"holds splits \(train, val\) beside 'rest'"),
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


@pytest.mark.parametrize(("name", "why"), [(b"a\nb.png", "a line break"), (b"\xff.png", "not valid UTF-8")])
def test_names_that_no_text_file_can_list(tmp_path, image_folder, name, why):
    root = image_folder(tmp_path, {"a": 1, "b": 1})
    with open(os.path.join(os.fsencode(root), b"a", name), "wb") as file:
        file.write(encoded(picture(), "PNG"))
    with pytest.raises(UserError, match=why):
        opened(root)


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
