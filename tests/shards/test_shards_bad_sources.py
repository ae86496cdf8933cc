"""What a build does with sources that change, lack files or hold what cannot be kept."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from shards_pictures import encoded, picture

import shards.encode
from shards.build import build
from shards.copies import identical_images
from shards.errors import UserError
from shards.index import open_dataset
from shards.sources import open_source
from shards.sources.files import FileReader
from shards.verify import verify

JPEG = encoded(picture(), "JPEG")


def rejected(root: Path) -> dict[str, str]:
    lines = (root / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return {image["source"]: image["reason"] for image in map(json.loads, lines)}


@pytest.fixture
def listing(tmp_path):
    """Write images and a CSV file of them: listing({"a.jpg": b"…"}) -> the file; two classes in turn."""

    def write(images: dict[str, bytes | None]) -> Path:
        source = tmp_path / "source"
        source.mkdir()
        rows = ["path,label"]
        for i, (name, data) in enumerate(images.items()):
            rows.append(f"{name},{'xy'[i % 2]}")
            if data is not None:
                (source / name).write_bytes(data)
        (source / "list.csv").write_text("\n".join(rows), encoding="utf-8")
        return source / "list.csv"

    return write


def built(source: Path, out: Path, **options) -> Path:
    return build("csv", source=source, out=out, test_fraction=0, val_fraction=0, workers=1, **options)


def test_a_csv_builds_and_is_named_after_its_folder(tmp_path, listing):
    root = built(listing({f"{i}.jpg": JPEG for i in range(6)}), tmp_path / "birds")
    dataset = open_dataset(root)
    assert (dataset.name, dataset.manifest["preset"], dataset.classes) == ("birds", "small", ["x", "y"])
    assert verify(root, workers=1) == []


def test_missing_files_are_reported_before_and_listed_after(tmp_path, listing, capsys):
    source = listing({"0.jpg": JPEG, "1.jpg": JPEG, "ü2.jpg": None, "3.jpg": JPEG})
    root = built(source, tmp_path / "out")
    assert rejected(root) == {"ü2.jpg": "cannot be read"}
    err = capsys.readouterr().err
    assert "note: files that are listed and not there: 1 (ü2.jpg)\n" in err
    assert "note: images left out: 1 of 4 (1 cannot be read)" in err
    with pytest.raises(
        UserError, match=r"files that are listed and not there: 1 \(ü2\.jpg\); fix that or leave out --st"
    ):
        built(source, tmp_path / "strict", strict=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_a_source_that_changes_while_it_is_built(tmp_path, listing, monkeypatch):
    source = listing({"0.jpg": JPEG, "1.jpg": JPEG, "2.jpg": JPEG, "3.jpg": JPEG, "4.jpg": JPEG})
    changes = {"2.jpg": lambda path: path.write_bytes(JPEG + b"x"), "3.jpg": Path.unlink}

    class Meddler(FileReader):
        def __call__(self, name: str) -> bytes:
            if name in changes:
                changes[name](self.root / name)
            return super().__call__(name)

    monkeypatch.setattr("shards.sources.files.FileReader", Meddler)
    root = built(source, tmp_path / "out")
    assert rejected(root) == {"2.jpg": "changed since it was listed", "3.jpg": "cannot be read"}


def test_an_image_bomb_is_counted_and_stops_a_strict_build(tmp_path, listing, monkeypatch):
    monkeypatch.setattr(shards.encode, "MOST_PIXELS", 600)
    source = listing({"0.jpg": JPEG, "1.jpg": JPEG, "bomb.png": encoded(picture(size=(40, 40)), "PNG"), "3.jpg": JPEG})
    assert rejected(built(source, tmp_path / "out")) == {
        "bomb.png": "more than 0 megapixels; --shorter-side would shrink it"
    }
    with pytest.raises(
        UserError, match=r"bomb\.png: more than 0 megapixels; .*; fix or remove it, or leave out --strict"
    ):
        built(source, tmp_path / "strict", strict=True)


def test_keep_bytes_stores_originals_or_nothing(tmp_path, listing):
    images = {
        "0.jpg": JPEG,
        "1.jpg": encoded(picture(1), "PNG"),
        "cmyk.jpg": encoded(picture(2).convert("CMYK"), "JPEG"),
        "3.jpg": encoded(picture(3).convert("L"), "JPEG"),
        "bmp.jpg": encoded(picture(4), "BMP"),
    }
    source = listing(images)
    root = built(source, tmp_path / "out", keep_bytes=True)
    split = open_dataset(root).splits["train"]
    tar = split.shard_paths[0].read_bytes()
    stored = {n: tar[s["offset"] :][: s["size"]] for n, s in zip(split.sample_names(), split.samples, strict=True)}
    assert stored == {name: images[name] for name in ("0.jpg", "1.jpg", "3.jpg")}
    assert Counter(rejected(root).values()) == {
        "cannot be kept: not plain 8-bit RGB or grey": 1,
        "cannot be kept: neither a JPEG nor a PNG": 1,
    }
    with pytest.raises(UserError, match="built with keep-bytes True, not False"):
        built(source, root)
    with pytest.raises(UserError, match="--keep-bytes and --shorter-side 9 exclude each other; leave one of them out"):
        built(source, tmp_path / "other", keep_bytes=True, shorter_side=9)


def test_a_huge_file_is_named_and_not_read(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 4, "b": 4})
    huge = source / "a" / "huge.png"
    huge.touch()
    os.truncate(huge, 1 << 40)  # a hole
    out = build("folder", source=source, out=tmp_path / "out", workers=1, test_fraction=0, val_fraction=0)
    (line,) = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert (line["source"], line["reason"]) == ("a/huge.png", "more than a gigabyte")


def test_huge_files_are_not_read_to_look_for_copies(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 4, "b": 4})
    for name in ("huge.png", "other.png"):
        (source / "a" / name).touch()
        os.truncate(source / "a" / name, 1 << 40)  # a hole
    assert identical_images(open_source("folder", source)) == []


def test_a_pipe_that_somebody_may_write_to_is_an_empty_file(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 4, "b": 4})
    os.mkfifo(source / "a" / "pipe.png")
    writer = os.open(source / "a" / "pipe.png", os.O_RDWR | os.O_NONBLOCK)
    try:
        out = build("folder", source=source, out=tmp_path / "out", workers=1, test_fraction=0, val_fraction=0)
    finally:
        os.close(writer)
    assert rejected(out) == {"a/pipe.png": "empty file"}


def test_a_file_of_another_century_is_an_image(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 4, "b": 4})
    os.utime(source / "a" / "000.png", (1e10, 1e10))
    out = build("folder", source=source, out=tmp_path / "out", workers=1)
    assert open_dataset(out).manifest["rejected"]["total"] == 0


def test_names_in_notes_do_not_steer_the_terminal(tmp_path, listing, capsys):
    source = listing({"0.jpg": JPEG, "1.jpg": JPEG, "\x1b[2J.jpg": None, "3.jpg": JPEG})
    built(source, tmp_path / "out")
    assert r"note: files that are listed and not there: 1 (\x1b[2J.jpg)" in capsys.readouterr().err
