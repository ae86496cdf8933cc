"""CSV files that list images."""

import pytest
from shards_pictures import encoded, picture

from shards.errors import UserError
from shards.sources import open_source

JPEG = encoded(picture(), "JPEG")


@pytest.fixture
def csv(tmp_path):
    """Write a CSV file and images a.jpg, b.jpg, sub folder/ü, c.jpg beside it."""
    (tmp_path / "sub folder").mkdir()
    for name in ("a.jpg", "b.jpg", "sub folder/ü, c.jpg"):
        (tmp_path / name).write_bytes(JPEG)

    def write(text: str | bytes):
        path = tmp_path / "list.csv"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def opened(path):
    return open_source("csv", path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r\n , \r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_paths_and_labels(csv, start, end):
    source = opened(
        csv(start + end.join(["path,label", "a.jpg,kein Riß", '"sub folder/ü, c.jpg",crack', "b.jpg,crack"]))
    )
    assert source.classes == ["crack", "kein Riß"]
    assert source.splits["train"].names == ["a.jpg", "b.jpg", "sub folder/ü, c.jpg"]
    assert source.splits["train"].labels.tolist() == [1, 0, 0]
    assert list(source.splits) == ["train"]
    assert source.read("sub folder/ü, c.jpg") == JPEG
    assert (source.preset, source.val_fraction) == (None, 0.1)


def test_splits_in_any_column_and_case(csv):
    text = 'Split,label,PATH,size\ntest,x,a.jpg,1\nTrain,x,b.jpg,2\ntrain,y,"sub folder/ü, c.jpg",3\n'
    source = opened(csv(text))
    assert {split: listing.labels.tolist() for split, listing in source.splits.items()} == {
        "train": [0, 1],
        "test": [0],
    }


def test_number_labels_are_sorted_as_numbers(csv):
    assert opened(csv("path,label\na.jpg,10\nb.jpg,9\n")).classes == ["9", "10"]


def test_an_image_listed_again_and_a_missing_one_are_counted(csv):
    rows = [
        "a.jpg,x,train",
        "./a.jpg,x,val",
        "b.jpg,y,train",
        ".//a.jpg,x,train",
        '"sub folder/ü, c.jpg",x,train',
        "d.jpg,y,train",
    ]
    source = opened(csv("\n".join(["path,label,split", *rows])))
    assert source.splits["val"].names == ["a.jpg"]
    assert source.splits["train"].names == ["b.jpg", "d.jpg", "sub folder/ü, c.jpg"]
    assert source.skipped == (
        "images that are listed again are left out: 2 (a.jpg, a.jpg)",
        "files that are listed and not there: 1 (d.jpg)",
    )


def test_labels_that_would_steer_a_terminal_are_stored_with_escapes(csv):
    source = opened(csv('path,label\na.jpg,"x\x1b[2J"\nb.jpg,"y\u2028\nz"\n'))
    assert source.classes == [r"x\x1b[2J", r"y\u2028\nz"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"list\.csv: the first line has no column 'path' \(\); it needs path,label"),
        ("path;label\na.jpg;x", r"no column 'path' \(path;label\)"),
        ("path,class\na.jpg,x", r"no column 'label' \(path, class\)"),
        ("path,path,label\na.jpg,b.jpg,x", r"the column 'path' more than once \(path, path, label\)"),
        ("path,label,split,split\na.jpg,x,train,test", "the column 'split' more than once"),
        ("path,label", "lists no training images"),
        ("path,label,split\na.jpg,x,test", "lists no training images"),
        ("path,label,split\na.jpg,x,rest", "line 2: split 'rest' is none of train, val and test"),
        ("path,label\n\na.jpg,x,y", "line 3: values: 3, columns: 2"),
        ("path,label\na.jpg,", "line 2: the label is empty"),
        ("path,label\n,x", "line 2: the path is empty"),
        ("path,label\na.jpg,x", "classes with training images: 1; a"),
        ("path,label\na.jpg,x\na.jpg,y", "a.jpg is listed as 'x' and as 'y'; keep one of them"),
        ("path,label\nx.jpg,x\ny.jpg,y", r"no train image is there \(listed: 2\): \S+/x\.jpg is missing"),
        ('path,label\n"a.jpg,x', "line 2: unexpected end of data"),
        (b"path,label\n\xff.jpg,x", r"list\.csv is not UTF-8 text \(invalid start byte at byte 11\)"),
    ],
)
def test_files_that_will_not_do(csv, text, message):
    with pytest.raises(UserError, match=message) as error:
        opened(csv(text))
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="csv needs --source FILE"):
        opened(None)
    with pytest.raises(UserError, match="is a folder; give a CSV file"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"x\.csv is missing"):
        opened(tmp_path / "x.csv")


def test_images_anywhere_on_this_machine(tmp_path):
    """Absolute paths and ones that begin with ../; what is stored does not name this machine, and may be moved."""

    def written(root):
        for folder in ("lists", "cam1/may", "cam2"):
            (root / "photos" / folder).mkdir(parents=True)
        for i, name in enumerate(("lists/a.jpg", "cam1/may/b.jpg", "cam2/c.jpg", "cam2/d.jpg")):
            (root / "photos" / name).write_bytes(encoded(picture(i), "JPEG"))
        rows = ["a.jpg,x", "../cam1/may/b.jpg,y", f"{root}/photos/cam2/c.jpg,x", "../lists/../cam2/d.jpg,y"]
        (root / "photos" / "lists" / "list.csv").write_text("\n".join(["path,label", *rows]))
        return root / "photos" / "lists" / "list.csv"

    source = opened(written(tmp_path / "here"))
    assert source.splits["train"].names == ["cam1/may/b.jpg", "cam2/c.jpg", "cam2/d.jpg", "lists/a.jpg"]
    assert source.splits["train"].labels.tolist() == [1, 0, 1, 0]
    assert source.read("lists/a.jpg") == encoded(picture(0), "JPEG")
    assert opened(written(tmp_path / "there")).fingerprint == source.fingerprint


def test_two_dots_behind_a_link_lead_where_the_system_would_go(tmp_path, image_folder):
    """The folder of the list is a link, and beside the link lie other images of the same names."""
    image_folder(tmp_path / "disk" / "photos", {".": 4})
    image_folder(tmp_path / "other" / "photos", {".": 4})
    (tmp_path / "disk" / "lists" / "deep").mkdir(parents=True)
    (tmp_path / "other" / "link").symlink_to(tmp_path / "disk" / "lists", target_is_directory=True)
    names = ["../photos/000.png", "../photos/001.png", "deep/../../photos/002.png", "./../photos/003.png"]
    csv = tmp_path / "other" / "link" / "images.csv"
    csv.write_text("path,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))
    for i in range(4):
        (tmp_path / "other" / "photos" / f"{i:03d}.png").write_bytes(b"not this")
    source = open_source("csv", csv)
    for split in source.splits.values():
        assert [source.read(name)[:4] for name in split.names] == [b"\x89PNG"] * len(split)
        assert split.names == [f"{i:03d}.png" for i in range(4)]


def test_the_same_image_by_two_paths_is_one(csv, tmp_path):
    source = opened(csv(f"path,label\na.jpg,x\n{tmp_path}/a.jpg,x\nb.jpg,y\n"))
    assert source.splits["train"].names == ["a.jpg", "b.jpg"]
    assert source.skipped == ("images that are listed again are left out: 1 (a.jpg)",)


def test_a_list_from_elsewhere_names_only_what_came_with_it(csv, tmp_path, monkeypatch):
    monkeypatch.setenv("TAILSTREAM_CACHE", str(tmp_path))
    for name in ("../a.jpg", "/a.jpg"):
        with pytest.raises(UserError, match=r"a\.jpg' leads out of the source's folder"):
            opened(csv(f"path,label\n{name},x\nb.jpg,y"))
