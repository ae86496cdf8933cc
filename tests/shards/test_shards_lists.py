"""ImageNet-LT's and Places-LT's lists, made small, with the quirks that such files have."""

from pathlib import Path

import pytest
from shards_pictures import encoded, picture

from shards.errors import UserError
from shards.sources import open_source

JPEG = encoded(picture(), "JPEG")
PLACES = {
    "train": ["data_256/a/attic/1 b.jpg 0", "data_256/b/bar/indoor/2.jpg 1", "data_256/b/bar/indoor/3.jpg 1"],
    "val": ["val_256/P_1.jpg 1"],
    "test": ["val_256/P_2.jpg 0", "val_256/P_3.jpg 1"],
}


def write(
    root: Path, lists: dict[str, list[str]], prefix: str = "Places_LT", end: str = "\n", images: str = ""
) -> Path:
    for split, lines in lists.items():
        root.mkdir(exist_ok=True)
        (root / f"{prefix}_{split}.txt").write_bytes((end.join(lines) + end).encode())
        for line in lines:
            name = line.strip().rpartition(" ")[0].strip()
            if name and ".." not in name and not name.startswith("/"):
                path = root / images / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(JPEG)
    return root


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "  \n"])
def test_the_official_layout(tmp_path, end):
    source = open_source("places-lt", write(tmp_path, PLACES, end=end))
    assert source.classes == ["a/attic", "b/bar/indoor"]
    assert {split: (listing.names, listing.labels.tolist()) for split, listing in source.splits.items()} == {
        "train": (
            ["data_256/a/attic/1 b.jpg", "data_256/b/bar/indoor/2.jpg", "data_256/b/bar/indoor/3.jpg"],
            [0, 1, 1],
        ),
        "val": (["val_256/P_1.jpg"], [1]),
        "test": (["val_256/P_2.jpg", "val_256/P_3.jpg"], [0, 1]),
    }
    assert (source.preset, source.profile, source.skipped, source.notes) == ("places-lt", "natural", (), ())
    assert source.read("val_256/P_2.jpg") == JPEG


def test_lists_in_a_sub_folder_and_images_in_another(tmp_path):
    write(tmp_path / "lists", PLACES)
    (tmp_path / "images").mkdir()
    for name in ("data_256", "val_256"):
        (tmp_path / "lists" / name).rename(tmp_path / "images" / name)
    source = open_source("imagenet-lt", tmp_path)
    assert source.read("val_256/P_2.jpg") == JPEG
    assert source.preset == "imagenet-lt"


def test_classes_that_share_folders_are_called_by_their_labels(tmp_path):
    lists = {**PLACES, "train": ["x/1.jpg 0", "x/2.jpg 1"]}
    assert open_source("places-lt", write(tmp_path, lists)).classes == ["0", "1"]


def test_a_label_that_no_training_image_has_is_left_out(tmp_path):
    lists = {"train": ["t/é/1.jpg 0", "t/o/2.jpg 3"], "val": ["v/1.jpg 3"], "test": ["v/2.jpg 3", "v/3.jpg 5"]}
    source = open_source("imagenet-lt", write(tmp_path, lists, "ImageNet_LT"))
    assert source.classes == ["é", "o"]
    assert source.splits["test"].labels.tolist() == [1]
    assert source.skipped == (
        "classes without a training image are left out: 4 (1, 2, 4, …)",
        "test images of such classes are left out: 1",
    )


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train": ["a.jpg"]}, r"_train\.txt line 1 is 'a\.jpg', not a path and a label from 0 up"),
        ({"train": ["a.jpg 0", "b.jpg x"]}, r"_train\.txt line 2 is 'b\.jpg x'"),
        ({"train": ["a.jpg -1"]}, "line 1 is"),
        ({"train": ["a.jpg 99999999999"]}, "line 1 is"),
        ({"train": ["x/a.jpg 0", "x/b.jpg 0"]}, "classes with training images: 1; a dataset needs at least two"),
        ({"train": []}, "classes with training images: 0; a"),
        ({"train": ["a.jpg 0", "a.jpg 1"]}, r"a\.jpg is listed as '0' and as '1'; keep one of them"),
        ({"train": ["../a.jpg 0", "b.jpg 1"]}, r"'\.\./a\.jpg' leads out of the source's folder"),
        ({"train": ["/a.jpg 0", "b.jpg 1"]}, r"'/a\.jpg' leads out of the source's folder"),
    ],
)
def test_lists_that_will_not_do(tmp_path, lists, message):
    with pytest.raises(UserError, match=message):
        open_source("places-lt", write(tmp_path, {"val": [], "test": [], **lists}))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="places-lt needs --source DIR, the folder that holds the lists"):
        open_source("places-lt", None)
    with pytest.raises(UserError, match=r"hold no list \*_train\.txt"):
        open_source("places-lt", tmp_path)
    write(tmp_path, PLACES)
    (tmp_path / "data_256").rename(tmp_path / "gone")
    with pytest.raises(
        UserError, match=r"no train image is there \(listed: 3\): \S+/data_256/a/attic/1 b\.jpg is missing"
    ):
        open_source("places-lt", tmp_path)
    (tmp_path / "Places_LT_val.txt").unlink()
    with pytest.raises(UserError, match=r"Places_LT_val\.txt is missing"):
        open_source("places-lt", tmp_path)
    (tmp_path / "ImageNet_LT_train.txt").write_text("")
    with pytest.raises(UserError, match=r"several training lists \(ImageNet_LT_train\.txt, Places_LT_train\.txt\)"):
        open_source("places-lt", tmp_path)


def test_a_list_that_is_no_text(tmp_path):
    write(tmp_path, PLACES)
    (tmp_path / "Places_LT_train.txt").write_bytes(b"\xff\xfe 0\n")
    with pytest.raises(UserError, match=r"_train\.txt is not UTF-8 text"):
        open_source("places-lt", tmp_path)
