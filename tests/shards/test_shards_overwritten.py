"""A dataset that is built again while somebody reads it: the old images or an error, never other ones."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import shards.index
from pipeline.reader import ShardReader
from shards.build import build
from shards.errors import UserError
from shards.index import open_dataset

AGAIN = r"out was built again or removed while it was being read; start again"


@pytest.fixture
def out(tmp_path):
    """Pictures that are all of the same size, so that another seed's shards have the same bounds."""
    return build("digits", out=tmp_path / "out", workers=1, shard_samples=100)


def again(out, **options):
    return build("digits", out=out, workers=1, **{"shard_samples": 100, "seed": 1, "overwrite": True} | options)


def images_of(split):
    return [image.tobytes() for image in ShardReader(split).encoded(np.arange(len(split)))]


def test_at_whatever_moment(out, monkeypatch):
    """At every change on the disk: whoever opened the dataset before sees its own images or the error."""
    dataset = open_dataset(out)
    expected = {name: images_of(split) for name, split in dataset.splits.items()}
    names_before = dataset.splits["test"].sample_names()
    seen: list[object] = []

    def look():
        for name, split in dataset.splits.items():
            try:
                assert images_of(split) == expected[name]
                seen.append("images")
            except UserError as error:
                assert "built again or removed" in str(error)  # noqa: PT017
                seen.append("error")
        try:
            fresh = open_dataset(out).splits["test"]
            seen.append(of_one_build(fresh, images_of(fresh), fresh.sample_names()))
        except UserError:
            seen.append("closed")

    for name in ("replace", "unlink"):
        original = getattr(Path, name)

        def then_look(path, *args, original=original, **options):
            result = original(path, *args, **options)
            if path.suffix in (".json", ".tar", ".npy"):
                look()
            return result

        monkeypatch.setattr(Path, name, then_look)
    again(out)
    monkeypatch.undo()
    now = open_dataset(out).splits["test"]
    assert [what for what in ("images", "error", "closed") if what not in seen] == []
    assert {what for what in seen if not isinstance(what, str)} == {
        of_one_build(dataset.splits["test"], expected["test"], names_before),
        of_one_build(now, images_of(now), now.sample_names()),
    }


def of_one_build(split, images, names):
    return tuple(split.samples["label"].tolist()), tuple(names), tuple(images)


def test_a_network_drive_that_remembers_how_old_a_file_is(out, monkeypatch):
    """NFS answers a stat from its cache, for up to a minute; opening a file asks the server."""
    split = open_dataset(out).splits["test"]
    stat, remembered = os.stat, {str(out / "dataset.json"): os.stat(out / "dataset.json")}
    again(out)
    monkeypatch.setattr(os, "stat", lambda path, **how: remembered.get(str(path)) or stat(path, **how))
    with pytest.raises(UserError, match=AGAIN):
        images_of(split)


def test_between_opening_and_the_first_read_of_a_shard(out):
    split = open_dataset(out).splits["test"]
    reader = ShardReader(split)
    first = [i for i in range(len(split)) if split.samples["shard"][i] == 0]
    before = [image.tobytes() for image in reader.encoded(first)]
    again(out)
    assert [image.tobytes() for image in reader.encoded(first)] == before  # of the file that is still open
    with pytest.raises(UserError, match=AGAIN):
        reader.encoded([len(split) - 1])
    with pytest.raises(UserError, match=AGAIN):
        pickle.loads(pickle.dumps(reader)).encoded([0])
    with pytest.raises(UserError, match=AGAIN):
        split.sample_names()


def test_fewer_shards_are_no_missing_ones(out):
    split = open_dataset(out).splits["test"]
    again(out, shard_samples=1000)
    with pytest.raises(UserError, match=AGAIN):
        ShardReader(split).encoded([len(split) - 1])


def test_while_the_arrays_are_opened(out, monkeypatch):
    open_split = shards.index.open_split
    opened = []

    def slow(*args):
        if not opened:
            again(out)
        opened.append(open_split(*args))
        return opened[-1]

    monkeypatch.setattr(shards.index, "open_split", slow)
    with pytest.raises(UserError, match=AGAIN):
        open_dataset(out)


def test_the_same_build_again_disturbs_nobody(out):
    split = open_dataset(out).splits["train"]
    before = images_of(split)
    again(out, seed=0)
    assert images_of(split) == before


def test_it_costs_a_look_for_each_shard_and_nothing_for_an_image(out, monkeypatch):
    split = open_dataset(out).splits["train"]
    looks = []
    check = shards.index.Edition.check
    monkeypatch.setattr(shards.index.Edition, "check", lambda edition: looks.append(1) or check(edition))
    monkeypatch.setattr(shards.index.Edition, "read", lambda path: pytest.fail("its place has not changed"))
    reader = ShardReader(split)
    for _ in range(3):
        reader.encoded(np.arange(len(split)))
    assert len(looks) == len(split.shard_paths) > 3
