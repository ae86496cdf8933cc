"""iNaturalist's official layout, made small, with the quirks of the real files."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from shards_pictures import encoded, picture

from shards.errors import UserError
from shards.sources import open_source
from shards.sources.source import Source

JPEG = encoded(picture(), "JPEG")
# Not in order, ids with gaps, a category that nothing uses; label 0 is the smallest id in use.
CATEGORIES = [
    {"id": 70, "name": "Turdus merula", "supercategory": "Aves"},
    {"id": 3, "name": "Ängelchen", "supercategory": "Plantae"},
    {"id": 41, "name": "unused", "supercategory": "Fungi"},
    {"id": 12, "name": "Lynx lynx", "supercategory": "Mammalia"},
]
TRAIN = {7: 70, 5: 3, 900: 12, 1: 70, 12: 3, 30: 70}  # image id -> category id, annotations in this order
VAL = {11: 12, 2: 70, 4: 3}


def content(labels: dict[int, int], folder: str) -> dict[str, Any]:
    def file(image: int) -> str:
        return f"{folder}/Group {labels[image]}/ß-{image}.jpg"

    return {
        "info": {"year": 2018},
        "images": [
            {"id": image, "file_name": file(image), "license": 3, "rights_holder": "someone", "width": 24}
            for image in sorted(labels)
        ],
        "annotations": [{"id": i, "image_id": image, "category_id": c} for i, (image, c) in enumerate(labels.items())],
        "categories": deepcopy(CATEGORIES),
    }


Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def inat(tmp_path: Path) -> Callable[..., Path]:
    """Write a source: inat(train=change, val=change) changes what the JSON files say; the images stay."""

    def write(train: Change = lambda _: None, val: Change = lambda _: None) -> Path:
        for file, labels, change in (("train2018.json", TRAIN, train), ("val2018.json", VAL, val)):
            data = content(labels, "train_val2018")
            for image in data["images"]:
                path = tmp_path / image["file_name"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(JPEG)
            change(data)
            (tmp_path / file).write_text(json.dumps(data), encoding="utf-8")
        return tmp_path

    return write


def listed(source: Source, split: str) -> list[tuple[str, str]]:
    listing = source.splits[split]
    return [(source.classes[j], name) for name, j in zip(listing.names, listing.labels.tolist(), strict=True)]


def test_the_official_layout(inat):
    source = open_source("inat2018", inat())
    assert source.classes == ["Ängelchen", "Lynx lynx", "Turdus merula"]
    assert listed(source, "train") == [
        ("Lynx lynx", "train_val2018/Group 12/ß-900.jpg"),
        ("Ängelchen", "train_val2018/Group 3/ß-12.jpg"),
        ("Ängelchen", "train_val2018/Group 3/ß-5.jpg"),
        ("Turdus merula", "train_val2018/Group 70/ß-1.jpg"),
        ("Turdus merula", "train_val2018/Group 70/ß-30.jpg"),
        ("Turdus merula", "train_val2018/Group 70/ß-7.jpg"),
    ]
    assert [name for name, _ in listed(source, "test")] == ["Lynx lynx", "Ängelchen", "Turdus merula"]
    assert sorted(source.splits) == ["test", "train"]
    assert (source.preset, source.profile, source.val_fraction) == ("inat2018", "natural", 0)
    assert source.skipped == ("classes without a training image are left out: 1 (unused)",)
    assert source.splits["train"].sizes.tolist() == [len(JPEG)] * 6
    assert source.read("train_val2018/Group 12/ß-900.jpg") == JPEG


@pytest.mark.parametrize(
    ("dataset", "files", "preset"),
    [
        ("inat2017", ("train2017.json", "val2017.json"), "inat2017"),
        ("inat2019", ("train2019.json", "val2019.json"), "inat2018"),
        ("inat2021", ("train.json", "val.json"), "inat2018"),
    ],
)
def test_the_other_years(inat, dataset, files, preset):
    root = inat()
    for old, new in zip(("train2018.json", "val2018.json"), files, strict=True):
        (root / old).rename(root / new)
    assert len(open_source(dataset, root).splits["train"]) == 6
    assert open_source(dataset, root).preset == preset


def test_the_order_of_annotations_plays_no_part(inat):
    first = open_source("inat2018", inat())
    again = open_source("inat2018", inat(train=lambda data: data["annotations"].reverse()))
    assert listed(again, "train") == listed(first, "train")
    assert again.fingerprint == first.fingerprint


def test_a_label_that_changed_is_another_collection(inat):
    first = open_source("inat2018", inat()).fingerprint
    assert (
        open_source("inat2018", inat(train=lambda data: data["annotations"][0].update(category_id=3))).fingerprint
        != first
    )


def test_a_byte_order_mark_is_no_obstacle(inat):
    root = inat()
    (root / "train2018.json").write_bytes(b"\xef\xbb\xbf" + (root / "train2018.json").read_bytes())
    assert len(open_source("inat2018", root).splits["train"]) == 6


def test_names_that_two_categories_share_get_their_label_behind(inat):
    source = open_source("inat2018", inat(train=lambda data: data["categories"][0].update(name="Lynx lynx")))
    assert source.classes == ["Ängelchen", "Lynx lynx (1)", "Lynx lynx (3)"]


def skipped(source: Source) -> list[str]:
    return [line for line in source.skipped if "(unused)" not in line]


def test_what_can_be_left_out_is_counted_and_named(inat):
    root = inat(
        train=lambda data: (
            data["annotations"].append({"id": 9, "image_id": 555, "category_id": 3}),
            data["annotations"].append({"id": 10, "image_id": 7, "category_id": 70}),
            data["images"].append({"id": 77, "file_name": "train_val2018/x.jpg"}),
        )
    )
    source = open_source("inat2018", root)
    assert len(source.splits["train"]) == 6
    assert skipped(source) == [
        "annotations of images that train2018.json does not list are left out: 1 (555)",
        "images without an annotation in train2018.json are left out: 1 (train_val2018/x.jpg)",
        "images that are listed again are left out: 1 (train_val2018/Group 70/ß-7.jpg)",
    ]


def test_a_training_image_that_is_also_a_test_image_stays_with_the_test(inat):
    def same(data):
        data["images"][0]["file_name"] = "train_val2018/Group 70/ß-2.jpg"

    source = open_source("inat2018", inat(train=same))
    assert len(source.splits["test"]) == 3
    assert len(source.splits["train"]) == 5
    assert skipped(source) == ["images that are listed again are left out: 1 (train_val2018/Group 70/ß-2.jpg)"]


def test_a_missing_image_is_named_and_stays_listed_to_be_rejected(inat):
    root = inat()
    (root / "train_val2018/Group 3/ß-5.jpg").unlink()
    source = open_source("inat2018", root)
    assert skipped(source) == ["files that are listed and not there: 1 (train_val2018/Group 3/ß-5.jpg)"]
    assert sorted(source.splits["train"].sizes.tolist()) == [-1] + [len(JPEG)] * 5


def test_test_images_of_a_class_without_training_images_go_with_it(inat):
    source = open_source("inat2018", inat(val=lambda data: data["annotations"][1].update(category_id=41)))
    assert len(source.splits["test"]) == 2
    assert source.skipped == (
        "classes without a training image are left out: 1 (unused)",
        "test images of such classes are left out: 1",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("annotations"), "train2018.json lacks the key 'annotations' with a list"),
        (lambda t: t.update(images={}), "train2018.json lacks the key 'images' with a list"),
        (lambda t: t["images"][2].pop("file_name"), "entry 2 of 'images' lacks the key 'file_name'"),
        (lambda t: t["annotations"].append([]), "entry 6 of 'annotations' lacks the key 'image_id'"),
        (lambda t: t["images"][1].update(id="5"), "entry 1 of 'images' has the id '5', which is not a whole number"),
        (lambda t: t["images"][1].update(file_name=None), "has the file_name None, which is not text"),
        (lambda t: t["images"][1].update(id=1), "two of the images have the id 1"),
        (lambda t: t["categories"][1].update(id=70), "two of the categories have the id 70"),
        (lambda t: t["annotations"][0].update(category_id=4), "image 7 is of category 4, which the training file does"),
        (
            lambda t: t["annotations"].append({"image_id": 7, "category_id": 3}),
            "ß-7.jpg is listed as '(Ängelchen|Turdus merula)' and as '(Ängelchen|Turdus merula)'; keep one of them",
        ),
        (lambda t: t["images"][0].update(file_name="../secret.jpg"), r"'\.\./secret\.jpg' leads out of the source's"),
        (lambda t: t["images"][0].update(file_name="/etc/x.jpg"), "'/etc/x.jpg' leads out of the source's folder"),
        (lambda t: t["images"][0].update(file_name="a\0b.jpg"), "leads out of the source's folder"),
        (lambda t: t["images"][0].update(file_name=""), "'': the name is empty"),
        (lambda t: t["images"][0].update(file_name="\ud800.jpg"), "no file can have that name"),
    ],
)
def test_files_that_will_not_do(inat, change, message):
    with pytest.raises(UserError, match=message) as error:
        open_source("inat2018", inat(train=change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1, 2", "", "nothing"])
def test_no_json(inat, text):
    root = inat()
    (root / "val2018.json").write_text(text)
    with pytest.raises(UserError, match=r"val2018\.json is not JSON \(.*\); fetch it again"):
        open_source("inat2018", root)


def test_what_is_missing_is_named(inat):
    root = inat()
    with pytest.raises(
        UserError, match=r"train2017\.json is missing; give --source the folder that holds train2017\.json"
    ):
        open_source("inat2017", root)
    with pytest.raises(UserError, match=r"inat2018 needs --source DIR, the folder that holds train2018\.json"):
        open_source("inat2018", None)
    (root / "train_val2018").rename(root / "elsewhere")
    with pytest.raises(UserError, match=r"no test image is there \(listed: 3\): \S+/train_val2018/Group 12/ß-11\.jpg"):
        open_source("inat2018", root)
    (root / "val2018.json").unlink()
    with pytest.raises(UserError, match=r"val2018\.json is missing"):
        open_source("inat2018", root)


def test_a_class_that_lost_all_its_images_stops_before_any_work(inat):
    root = inat()
    (root / "train_val2018/Group 12/ß-900.jpg").unlink()
    with pytest.raises(UserError, match=r"no training image of class 'Lynx lynx' is there \(listed: 1\): .*ß-900"):
        open_source("inat2018", root)


def test_a_file_that_may_not_be_read(inat, monkeypatch):
    def refuse(self: Path, **_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse, raising=True)
    root = inat()
    with pytest.raises(UserError, match=r"train2018\.json cannot be read: Permission denied"):
        open_source("inat2018", root)
