import errno
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pipeline.reader
from pipeline.reader import ShardReader
from shards.errors import UserError
from shards.index import Split, open_dataset


@pytest.fixture
def split(photos, tmp_path) -> Split:
    """The training split of a copy that may be damaged."""
    return open_dataset(shutil.copytree(photos.root, tmp_path / "a copy")).splits["train"]


def stored(split: Split, sample: int) -> bytes:
    row = split.samples[sample]
    return split.shard_paths[row["shard"]].read_bytes()[row["offset"] : row["offset"] + row["size"]]


def open_shards() -> int:
    links = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
    return sum(target.endswith(".tar") for target in links)


def test_reads_what_lies_there(split):
    ids = [3, 0, 27, 3]
    files = ShardReader(split).encoded(ids)
    assert [file.tobytes() for file in files] == [stored(split, sample) for sample in ids]
    assert all(file.dtype == np.uint8 and file.ndim == 1 for file in files)
    assert ShardReader(split).encoded([]) == []


def test_descriptors_are_bounded_and_closed(split, monkeypatch):
    assert len(split.shard_paths) == 4
    monkeypatch.setattr(pipeline.reader, "OPEN_SHARDS", 2)
    before = open_shards()
    reader = ShardReader(split)
    reader.encoded(np.arange(len(split)))
    assert open_shards() == before + 2
    reader.close()
    assert open_shards() == before
    assert reader.encoded([0])[0].tobytes() == stored(split, 0)
    assert open_shards() == before + 1
    del reader
    assert open_shards() == before


def test_the_shards_used_last_stay_open(split, monkeypatch):
    monkeypatch.setattr(pipeline.reader, "OPEN_SHARDS", 2)
    opened = []
    monkeypatch.setattr(Split, "local_shard", lambda split, shard: split.shard_paths[shard])
    really_open = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(Path(path).name) or really_open(path, flags))
    firsts = [int(np.flatnonzero(split.samples["shard"] == shard)[0]) for shard in range(3)]
    reader = ShardReader(split)
    for shards in ([1, 0], [0], [0, 2, 0], [0], [1]):  # within one call in the order of the shards
        reader.encoded([firsts[shard] for shard in shards])
    assert [name[6:12] for name in opened] == ["000000", "000001", "000002", "000001"]


def test_threads_that_close_each_others_shards_read_the_right_bytes(split, monkeypatch):
    monkeypatch.setattr(pipeline.reader, "OPEN_SHARDS", 1)
    reader, expected = ShardReader(split), [stored(split, sample) for sample in range(len(split))]

    def read(seed: int) -> bool:
        ids = np.random.default_rng(seed).integers(len(split), size=400)
        return all(file.tobytes() == expected[i] for file, i in zip(reader.encoded(ids), ids, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(8)))


def test_a_pickled_reader_opens_its_own_files(split):
    reader = ShardReader(split)
    reader.encoded([0])
    copy = pickle.loads(pickle.dumps(reader))
    reader.close()
    assert copy.encoded([5])[0].tobytes() == stored(split, 5)


def test_short_reads_are_gone_on_with(split, monkeypatch):
    really_read, into = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda descriptor, size, at: really_read(descriptor, min(size, 1000), at))
    monkeypatch.setattr(os, "preadv", lambda descriptor, places, at: into(descriptor, [places[0][:1000]], at))
    assert ShardReader(split).encoded([1])[0].tobytes() == stored(split, 1)
    assert ShardReader(split).padded([1])[0].tobytes() == stored(split, 1)


def test_padded_files_are_the_files_with_zeros_behind_them(split):
    ids = np.random.default_rng(0).integers(len(split), size=40)
    files = [stored(split, sample) for sample in ids]
    padded = ShardReader(split).padded(ids)
    assert padded.shape == (40, max(map(len, files)))
    assert [row.tobytes() for row in padded] == [file.ljust(padded.shape[1], b"\0") for file in files]


def test_a_shard_that_shrinks_while_it_is_open_is_named(split):
    reader = ShardReader(split)
    reader.encoded([0])
    os.truncate(split.shard_paths[0], 700)
    for read in (reader.encoded, reader.padded):
        with pytest.raises(
            UserError, match=r"train-000000.tar is 700 bytes long but .* run: tailstream verify '/.*a copy'$"
        ):
            read([0])


def test_a_missing_shard_is_named(split):
    split.shard_paths[0].unlink()
    with pytest.raises(UserError, match=r"train-000000.tar cannot be read \(.*No such file.* verify '/.*a copy'$"):
        ShardReader(split).encoded([0])


def test_a_folder_with_a_space_is_quoted_in_the_command_that_is_given(split, tmp_path):
    (tmp_path / "my birds").mkdir()
    paths = tuple(tmp_path / "my birds" / path.name for path in split.shard_paths)
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"run: tailstream verify '/.*/my birds'$"):
        ShardReader(replace(split, shard_paths=paths, edition=None)).encoded([0])


def test_a_shard_is_asked_for_again_where_no_thread_could_be_started(split, monkeypatch):
    reader = ShardReader(replace(split, remote=SimpleNamespace(fetch=lambda shard, path: None)))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            reader.encoded([0])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.encoded, [0])
        try:
            assert waiting.result(10)[0].tobytes() == stored(split, 0)
        finally:
            reader.close()


def test_failing_storage_is_named(split, monkeypatch):
    def fail(descriptor: int, size: int, at: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=r"train-000000.tar cannot be read \(.*Input/output error\); run"):
        ShardReader(split).encoded([0])
