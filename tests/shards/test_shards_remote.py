"""Datasets and images behind URLs, on a real S3-compatible server on loopback (moto) and in fsspec's memory."""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import shards.build
import shards.progress
import shards.remote
import shards.source_copy
from pipeline.loader import open_loader
from pipeline.plan import Stream, TrainPlan
from pipeline.preview import preview
from pipeline.reader import ShardReader
from shards.build import build
from shards.duplicates import find_duplicates
from shards.errors import UserError
from shards.index import open_dataset
from shards.remote import RemoteStore
from shards.show import lost_shards
from shards.source_copy import kept_copy
from shards.staging import STAGING, staged
from shards.verify import verify
from shards.writer import write_shard

fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")


@pytest.fixture(scope="module")
def server():
    """The address of an S3 server."""
    pytest.importorskip("s3fs", reason="the extra `remote` is not installed")
    program = shutil.which("moto_server") or shutil.which("moto_server", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("moto[server] is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while True:
            assert process.poll() is None, "moto_server ended"
            assert time.monotonic() < until
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TAILSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bucket(request, tmp_path, monkeypatch):
    """The URL of an empty folder."""
    server = request.getfixturevalue("server")
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    name = f"bucket-{tmp_path.name[-30:].replace('_', '-').lower().strip('-')}"
    files.mkdir(name)
    return f"s3://{name}/some/where"


@pytest.fixture
def memory():
    """The URL of an empty folder in this process's memory."""
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]
    return "memory://bucket/some/where"


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def remote_contents(url):
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return {path.removeprefix(root).lstrip("/"): files.cat_file(path) for path in files.find(root)}


def images(dataset):
    """Every sample's label and bytes, as training reads them."""
    read = []
    for split in dataset.splits.values():
        data = ShardReader(split).encoded(np.arange(len(split)))
        read += [(label, bytes(file)) for label, file in zip(split.samples["label"].tolist(), data, strict=True)]
    return read


def test_a_bucket_holds_the_same_bytes_and_training_reads_them(tmp_path, pets, bucket, cache, capsys):
    local = build("folder", source=pets, out=tmp_path / "where", shard_samples=4, workers=1)
    assert build("folder", source=pets, out=bucket, shard_samples=4, workers=2) == bucket
    assert f"built in {bucket}; next: tailstream train bbn --data {bucket}" in capsys.readouterr().out
    assert remote_contents(bucket) == contents(local)

    dataset = open_dataset(bucket)
    assert not list(cache.rglob("*.tar"))  # opening fetches no shard
    assert images(dataset) == images(open_dataset(local))
    assert len(list(cache.rglob("*.tar"))) == len(list(local.glob("*.tar")))
    # A run remembers the folder in the cache; it opens the same.
    assert images(open_dataset(dataset.root)) == images(open_dataset(local))
    build("folder", source=pets, out=bucket, shard_samples=4)
    assert "already built" in capsys.readouterr().err


def test_images_in_a_bucket_are_built_from(tmp_path, pets, bucket):
    files, root = fsspec.core.url_to_fs(bucket)
    files.put(f"{pets}/", root, recursive=True)
    local = build("folder", source=pets, out=tmp_path / "one" / "out", workers=1)
    out = build("folder", source=bucket, out=tmp_path / "two" / "out", workers=1)
    assert contents(out) == contents(local)
    files.rm_file(f"{root}/cat/text.jpg")  # gone there, gone here
    again = build("folder", source=bucket, out=tmp_path / "three" / "out", workers=1)
    assert open_dataset(again).manifest["rejected"]["total"] == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_build_goes_on_in_a_bucket(tmp_path, pets, memory, monkeypatch, capsys, overwrite):
    options = {"dataset": "folder", "source": pets, "out": memory, "shard_samples": 4, "workers": 1}
    if overwrite:
        build(**{**options, "seed": 1, "shard_samples": 1})
    written = []

    def write(job):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(job.name)
        return write_shard(job)

    with monkeypatch.context() as patch:
        patch.setattr(shards.build, "write_shard", write)
        with pytest.raises(KeyboardInterrupt):
            build(**options, overwrite=overwrite)
    assert ("dataset.json" in remote_contents(memory)) == overwrite
    with pytest.raises(UserError, match="holds an unfinished build with seed 0, not 2" if not overwrite else "seed 1"):
        build(**{**options, "seed": 2})
    capsys.readouterr()
    build(**options, overwrite=overwrite)
    assert "continuing: 3 of" in capsys.readouterr().err
    local = build("folder", source=pets, out=tmp_path / "where", shard_samples=4, workers=1)
    assert remote_contents(memory) == contents(local)


def test_a_second_builder_whose_shards_the_first_one_put_in_place_is_one_line(pets, memory, monkeypatch):
    def write_late(job):
        written = write_shard(job)
        if job.name == "train-000002":
            monkeypatch.undo()
            monkeypatch.setenv("TAILSTREAM_CACHE", cache_before)
            build("folder", source=pets, out=memory, shard_samples=4, workers=1)
        return written

    cache_before = os.environ["TAILSTREAM_CACHE"]
    monkeypatch.setattr(shards.build, "write_shard", write_late)
    with pytest.raises(UserError, match="another build was at work in the same place; give the same command again"):
        build("folder", source=pets, out=memory, shard_samples=4, workers=1)
    build("folder", source=pets, out=memory, shard_samples=4, workers=1)
    assert verify(memory, workers=1) == []


def test_a_build_that_was_being_moved_is_completed(tmp_path, pets, memory, monkeypatch):
    options = {"dataset": "folder", "source": pets, "out": memory, "shard_samples": 4, "workers": 1}
    move = RemoteStore.move

    def move_some(self, names):
        move(self, list(names)[:2])
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "move", move_some)
        with pytest.raises(UserError, match="memory://bucket/some/where cannot be written: Input/output error"):
            build(**options)
    monkeypatch.setattr(shards.build, "write_shard", None)  # everything is there
    build(**options)
    monkeypatch.undo()
    local = build("folder", source=pets, out=tmp_path / "where", shard_samples=4, workers=1)
    assert remote_contents(memory) == contents(local)


@pytest.fixture
def remote(pets, memory, monkeypatch, tmp_path):
    monkeypatch.setenv("TAILSTREAM_CACHE", str(tmp_path / "cache"))
    return build("folder", source=pets, out=memory, shard_samples=4, workers=1)


def test_a_spoiled_shard_in_the_cache_is_fetched_again(remote, cache):
    expected = images(open_dataset(remote))
    for path in cache.rglob("*.tar"):
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(data)
    assert images(open_dataset(remote)) == expected


def test_a_spoiled_shard_in_the_bucket_is_named_and_not_kept(remote, cache):
    dataset = open_dataset(remote)
    files, root = fsspec.core.url_to_fs(remote)
    files.pipe_file(f"{root}/train-000000.tar", b"something else")
    with pytest.raises(UserError, match=r"where/train-000000\.tar is not the file that the manifest describes"):
        images(dataset)
    assert not list(cache.rglob("train-000000.tar"))
    files.rm_file(f"{root}/train-000000.tar")
    with pytest.raises(UserError, match=r"where/train-000000\.tar cannot be fetched to "):
        images(dataset)


def test_a_shard_is_checked_once_and_again_when_it_changed(remote, cache, monkeypatch):
    hashed = []
    sha256 = shards.remote._sha256
    monkeypatch.setattr(shards.remote, "_sha256", lambda path: hashed.append(path.name) or sha256(path))
    expected = images(open_dataset(remote))
    assert hashed
    hashed.clear()
    assert images(open_dataset(remote)) == expected  # as at the next evaluation, or in another process
    assert hashed == []
    (shard,) = cache.rglob("train-000000.tar")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert images(open_dataset(remote)) == expected
    assert set(hashed) == {shard.name}


def test_what_a_killed_download_left_is_cleared(remote, cache):
    dataset = open_dataset(remote)
    left = dataset.root / "train-000000.tar.99999999.tmp"
    left.write_bytes(b"half of it")
    images(dataset)
    assert not left.exists()


def test_shards_are_read_while_others_come(remote, monkeypatch):
    split = open_dataset(remote).splits["train"]
    firsts = [int(np.flatnonzero(split.samples["shard"] == shard)[0]) for shard in range(len(split.shard_paths))]
    coming, go_on, together = set(), threading.Event(), threading.Barrier(len(firsts) - 1)
    fetch = shards.remote.copy_file

    def slow(url, name, path):
        if name != "train-000000.tar":
            coming.add(name)
            together.wait(20)  # they come at the same time
            assert go_on.wait(20)
        fetch(url, name, path)

    monkeypatch.setattr(shards.remote, "copy_file", slow)
    reader = ShardReader(split)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.encoded, firsts[1:])
        assert len(reader.encoded(firsts[:1])) == 1
        go_on.set()
        assert len(waiting.result()) == len(firsts) - 1
    assert len(coming) == len(firsts) - 1 > 1
    reader.close()


def test_many_shards_take_a_few_threads(tmp_path, memory, image_folder, monkeypatch):
    source = image_folder(tmp_path / "source", {"a": 20, "b": 20})
    build("folder", source=source, out=memory, workers=1, shard_samples=1, test_fraction=0, val_fraction=0)
    split, go_on = open_dataset(memory).splits["train"], threading.Event()
    fetch, begun = shards.remote.copy_file, []
    monkeypatch.setattr(shards.remote, "copy_file", lambda *of: begun.append(of) or (go_on.wait(20) and fetch(*of)))
    reader, before = ShardReader(split), threading.active_count()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(reader.encoded, np.arange(40))
        while len(begun) < shards.remote.TRANSFERS:
            time.sleep(0.01)
        assert threading.active_count() - before == shards.remote.TRANSFERS + 1
        go_on.set()
        assert len(coming.result(20)) == len(begun) == 40
    reader.close()


def test_nobody_waits_for_a_slow_link_once_the_reader_is_closed(remote, monkeypatch):
    split, begun, go_on = open_dataset(remote).splits["train"], threading.Event(), threading.Event()
    fetch = shards.remote.copy_file

    def slow(*where):
        begun.set()
        assert go_on.wait(20)
        fetch(*where)

    monkeypatch.setattr(shards.remote, "copy_file", slow)
    reader = ShardReader(split)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.encoded, [0])
        assert begun.wait(20)
        reader.close()
        with pytest.raises(CancelledError):
            waiting.result(20)
    go_on.set()
    assert len(reader.encoded([0])) == 1  # reading afterwards waits for it again
    reader.close()


def test_a_reader_that_is_closed_before_anybody_waits_fetches_nothing_more(remote, monkeypatch):
    split, go_on = open_dataset(remote).splits["train"], threading.Event()
    fetch, fetching = shards.remote.copy_file, ShardReader._fetching
    monkeypatch.setattr(shards.remote, "copy_file", lambda *where: (go_on.wait(3), fetch(*where)))

    def close_next(self, wanted):
        monkeypatch.setattr(ShardReader, "_fetching", fetching)
        coming = fetching(self, wanted)
        self.close()
        return coming

    monkeypatch.setattr(ShardReader, "_fetching", close_next)
    with pytest.raises(CancelledError):
        ShardReader(split).encoded([0])
    go_on.set()


def test_what_the_first_steps_want_is_fetched_when_a_loader_is_opened(remote, cache, monkeypatch, capsys):
    """Before the guard against stalls begins to count, and with a line of progress."""
    split = open_dataset(remote).splits["train"]
    monkeypatch.setattr(shards.progress, "SECONDS_BETWEEN_LINES", 0)
    plan = TrainPlan(split, (Stream("uniform"), Stream("reversed", q=-1.0)), 8, 16, seed=0, epochs=1)
    with open_loader(plan, "dali", threads=1):
        assert len(list(cache.rglob("train-*.tar"))) == len(split.shard_paths)
    assert f"fetching train from {remote}: 1 of {len(split.shard_paths)} shards" in capsys.readouterr().err
    with open_loader(plan, "torch", threads=0):
        assert capsys.readouterr().err == ""


def test_a_preview_fetches_what_its_one_step_shows(remote, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(ShardReader, "fetch", lambda reader, ids_B: fetched.append(len(ids_B)))
    preview(remote, tmp_path / "p.png", batch_size=4, loader="resident")
    assert fetched == [8]  # of two streams


def test_builds_from_one_url_copy_it_by_turns(tmp_path, pets, memory, monkeypatch):
    files, root = fsspec.core.url_to_fs(memory)
    files.put(f"{pets}/", root, recursive=True)
    fetch, begun, copied = shards.remote.copy_file, threading.Event(), []

    def slow(url, name, path):
        temporary = path.with_name(f"{path.name}.1.tmp")  # of another process
        temporary.write_bytes(b"half")
        begun.set()
        time.sleep(0.01)
        temporary.unlink()
        copied.append(name)
        fetch(url, name, path)

    def copy():
        with kept_copy(memory) as folder:
            return folder

    monkeypatch.setattr(shards.source_copy, "copy_file", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(copy)
        assert begun.wait(20)
        second = pool.submit(copy)
        assert first.result() == second.result()
    assert len(copied) == len(set(copied))


def test_nobody_changes_a_copy_while_a_build_reads_it(memory, capsys):
    files, root = fsspec.core.url_to_fs(memory)
    files.pipe({f"{root}/a/1.png": b"one", f"{root}/b/2.png": b"two"})

    def copy():
        with kept_copy(memory) as folder:
            return {path.name for path in folder.rglob("*.png")}

    with ThreadPoolExecutor(2) as pool:
        with kept_copy(memory) as folder:
            assert pool.submit(copy).result(20) == {"1.png", "2.png"}  # where nothing has changed nobody waits
            files.rm_file(f"{root}/a/1.png")
            other = pool.submit(copy)
            with pytest.raises(TimeoutError):
                other.result(0.2)
            assert (folder / "a" / "1.png").read_bytes() == b"one"
        assert other.result(20) == {"2.png"}
    assert capsys.readouterr().err == (
        f"waiting for another build, which reads the copy of {memory}: other files lie there now\n"
    )


def test_a_build_holds_its_copy_to_the_end(tmp_path, pets, memory, monkeypatch):
    files, root = fsspec.core.url_to_fs(memory)
    files.put(f"{pets}/", root, recursive=True)

    def held(job):
        (lock,) = (tmp_path / "cache").glob("source-*.lock")
        with lock.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return write_shard(job)

    monkeypatch.setattr(shards.build, "write_shard", held)
    build("folder", source=memory, out=tmp_path / "out", workers=1)


def test_a_class_whose_copying_was_interrupted_may_be_gone(tmp_path, pets, memory, monkeypatch):
    files, root = fsspec.core.url_to_fs(memory)
    files.put(f"{pets}/", root, recursive=True)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards.source_copy, "copy_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build("folder", source=memory, out=tmp_path / "out", workers=1)
    files.rm(f"{root}/eel", recursive=True)
    assert open_dataset(build("folder", source=memory, out=tmp_path / "out", workers=1)).classes == ["cat", "dog"]


def test_a_cache_that_cannot_be_written_is_named(pets, memory, cache):
    files, root = fsspec.core.url_to_fs(memory)
    files.put(f"{pets}/", root, recursive=True)
    cache.write_text("a file")
    with pytest.raises(UserError, match=f"the cache {cache} cannot be written: .*; set TAILSTREAM_CACHE"):
        build("folder", source=memory)


def test_a_file_that_was_replaced_by_one_of_its_size_is_copied_anew(memory, monkeypatch):
    files, root = fsspec.core.url_to_fs(memory)
    files.pipe({f"{root}/labels.csv": b"a.png,cat", f"{root}/a.png": b"pixels"})
    fetch, copied = shards.remote.copy_file, []
    monkeypatch.setattr(shards.source_copy, "copy_file", lambda *what: copied.append(what[1]) or fetch(*what))
    for labels, names in ((b"a.png,cat", ["a.png", "labels.csv"]), (b"a.png,cat", []), (b"a.png,dog", ["labels.csv"])):
        if files.cat_file(f"{root}/labels.csv") != labels:
            files.pipe_file(f"{root}/labels.csv", labels)
        with kept_copy(memory) as folder:
            assert (folder / "labels.csv").read_bytes() == labels
        assert sorted(copied) == names
        copied.clear()
    (folder / "a.png").write_bytes(b"pix")
    with kept_copy(memory) as folder:
        assert (folder / "a.png").read_bytes() == b"pixels"
    assert copied == ["a.png"]


def test_containers_that_share_a_cache_may_have_the_same_process_number(remote, cache, monkeypatch):
    monkeypatch.setattr(shards.remote.os, "getpid", lambda: 1)
    replace = Path.replace

    def late(path, place):  # each has written before one takes the name
        barrier.wait(20)
        return replace(path, place)

    barrier = threading.Barrier(2)
    monkeypatch.setattr(Path, "replace", late)
    with ThreadPoolExecutor(2) as pool:
        folders = {pool.submit(shards.remote.cached_dataset, remote, "dataset.json") for _ in range(2)}
        assert len({folder.result() for folder in folders}) == 1


def test_verify_names_what_is_wrong_behind_a_url(remote):
    assert verify(remote, workers=1) == []
    files, root = fsspec.core.url_to_fs(remote)
    shutil.rmtree(open_dataset(remote).root)
    data = bytearray(files.cat_file(f"{root}/train-000000.tar"))
    data[600] ^= 1
    files.pipe_file(f"{root}/train-000000.tar", bytes(data))
    files.rm_file(f"{root}/train-000001.idx")
    problems = verify(remote, workers=1)
    for wanted in (
        "train-000000.tar is not the file that",
        "train-000001.idx cannot be fetched",
        "train-000000.tar: mis",
    ):
        assert any(wanted in problem for problem in problems), problems


def test_a_list_of_images_behind_a_url(tmp_path, pets, memory):
    files, root = fsspec.core.url_to_fs(memory)
    files.put(f"{pets}/", root, recursive=True)
    lines = [f"{path.relative_to(pets)},{path.parent.name}" for path in sorted(pets.rglob("*.png"))]
    files.pipe_file(f"{root}/list.csv", "\n".join(["path,label", *lines]).encode())
    out = build("csv", source=f"{memory}/list.csv", out=tmp_path / "out", test_fraction=0, val_fraction=0, workers=1)
    assert open_dataset(out).train_counts.tolist() == [9, 6, 4]


def test_another_dataset_at_the_same_url_is_another_one_in_the_cache(tmp_path, remote, pets):
    before = open_dataset(remote)
    expected = images(before)
    options = {"dataset": "folder", "source": pets, "shard_samples": 4, "seed": 1, "workers": 1}
    build(**options, out=remote, overwrite=True)
    assert images(open_dataset(remote)) == images(open_dataset(build(**options, out=tmp_path / "other")))
    assert images(before) == expected


def test_no_dataset_behind_a_url(memory):
    with pytest.raises(UserError, match=r"memory://bucket/some/where has no dataset\.json, so it is not a dataset"):
        open_dataset(memory)
    with pytest.raises(UserError, match="--source memory://bucket/some/where holds no files"):
        build("folder", source=memory)


def test_folders_that_somebody_made_in_a_bucket_are_no_files(tmp_path, pets, bucket, cache):
    files, root = fsspec.core.url_to_fs(bucket)
    files.put(f"{pets}/", root, recursive=True)
    name, _, key = root.partition("/")
    files.pipe_file(f"{name}/some/other.bin", b"of somebody else")
    for folder in (f"{key}/", f"{key}/cat/", key, f"{key}/dog"):  # consoles end its name with a slash, others do not
        files.call_s3("put_object", Bucket=name, Key=folder, Body=b"")
    local = build("folder", source=pets, out=tmp_path / "one" / "out", workers=1)
    out = build("folder", source=bucket, out=tmp_path / "two" / "out", workers=1)
    assert contents(out) == contents(local)
    assert not list(cache.rglob("other.bin"))


@pytest.mark.parametrize(("text", "message"), [("{", "is damaged"), ("[]", "says format None")])
def test_verify_of_a_manifest_that_will_not_do_behind_a_url(remote, text, message):
    files, root = fsspec.core.url_to_fs(remote)
    files.pipe_file(f"{root}/dataset.json", text.encode())
    with pytest.raises(UserError, match=message):
        verify(remote, workers=1)


def test_a_web_server_that_tells_no_sizes_has_not_lost_its_shards(tmp_path, pets):
    root = build("folder", source=pets, out=tmp_path / "out", shard_samples=4, workers=1)
    handler = partial(SimpleHTTPRequestHandler, directory=root)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert lost_shards(open_dataset(f"http://127.0.0.1:{server.server_port}")) == []
        finally:
            server.shutdown()


@pytest.mark.parametrize("below", ["", "/shards"])
def test_source_and_out_lie_apart_behind_urls_too(pets, memory, below):
    files, root = fsspec.core.url_to_fs(memory)
    files.put(f"{pets}/", root, recursive=True)
    with pytest.raises(UserError, match="lies inside --source"):
        build("folder", source=memory, out=f"{memory}{below}", workers=1)


def test_a_class_that_is_gone_behind_a_url_is_gone_here(tmp_path, pets, memory):
    files, root = fsspec.core.url_to_fs(memory)
    files.put(f"{pets}/", root, recursive=True)
    build("folder", source=memory, out=tmp_path / "one", workers=1)
    files.rm(f"{root}/eel", recursive=True)
    assert open_dataset(build("folder", source=memory, out=tmp_path / "two", workers=1)).classes == ["cat", "dog"]


def test_verify_knows_a_remote_datasets_folder_in_the_cache(remote):
    assert verify(open_dataset(remote).root, workers=1) == []


def test_an_unknown_dataset_copies_nothing(pets, memory, cache):
    files, root = fsspec.core.url_to_fs(memory)
    files.put(f"{pets}/", root, recursive=True)
    with pytest.raises(UserError, match="unknown dataset 'foldr'"):
        build("foldr", source=memory)
    assert not cache.exists()


def test_a_resident_loader_is_closed_while_a_shard_comes(remote, cache, monkeypatch):
    split, begun, go_on = open_dataset(remote).splits["train"], threading.Event(), threading.Event()
    fetch = shards.remote.copy_file

    def slow(url, name, path):
        begun.set()
        assert go_on.wait(20)
        fetch(url, name, path)

    monkeypatch.setattr(shards.remote, "copy_file", slow)
    monkeypatch.setattr("pipeline.loader._fetch_first", lambda *_: None)
    loader = open_loader(TrainPlan(split, (Stream("s"),), 4, 16, seed=0, epochs=1), "resident", threads=1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, loader)
        assert begun.wait(20)
        closing = threading.Thread(target=loader.close)
        closing.start()
        closing.join(5)
        hung = closing.is_alive()
        go_on.set()
        closing.join(20)
        assert not hung
        with pytest.raises(CancelledError):
            waiting.result(20)


def test_a_file_server_that_renames_and_does_not_copy(pets, memory, monkeypatch):
    server = type(fsspec.filesystem("memory"))

    def rename(self, old, new, **_):
        self.store[self._strip_protocol(new)] = self.store.pop(self._strip_protocol(old))

    def lacking(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(server, "cp_file", lacking)
    monkeypatch.setattr(server, "mv", rename)
    assert verify(build("folder", source=pets, out=memory, workers=1), workers=1) == []


def test_an_unknown_kind_of_url():
    with pytest.raises(UserError, match=r"nothing://x cannot be opened: Protocol not known"):
        open_dataset("nothing://x")


def test_without_fsspec_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"s3://x needs fsspec; install it with: pip install 'tailstream\[remote\]'"):
        open_dataset("s3://x")


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(UserError, match=r"s3://no-such-bucket/x has no dataset\.json"):
        open_dataset("s3://no-such-bucket/x")


def test_a_server_that_is_not_there(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"s3://bucket/x cannot be read: .*127\.0\.0\.1:1"):
        open_dataset("s3://bucket/x")


def test_files_of_an_object_store_appear_whole(memory):
    store = RemoteStore(memory)

    def fail():
        with staged(store) as staging, staging.writing("a", "b") as (path, _):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert store.sizes(STAGING) == {}


def test_inspect_finds_copies_and_misses_shards_behind_a_url(remote, memory):
    dataset = open_dataset(memory)
    assert lost_shards(dataset) == []
    assert find_duplicates(dataset, workers=1) == []
    files, shard = fsspec.filesystem("memory"), "/bucket/some/where/train-000000.tar"
    data = files.cat_file(shard)
    files.pipe_file(shard, data[:-512])
    (line,) = lost_shards(dataset)
    assert line.startswith(f"train-000000.tar: {len(data) - 512:,} bytes long, not {len(data):,}; run: ")
    files.rm_file(shard)
    assert lost_shards(dataset) == [f"train-000000.tar: missing; run: tailstream verify {memory}"]


def test_a_source_image_of_the_same_size_is_another_one_behind_a_url_too(tmp_path, memory, image_folder):
    source = image_folder(tmp_path / "own", {"a": 3, "b": 3})
    build("folder", source=source, out=memory, workers=1)
    build("folder", source=source, out=memory, workers=1)
    image = source / "a" / "000.png"
    image.write_bytes(bytes(image.stat().st_size))
    with pytest.raises(UserError, match=r"from other images \(a/000\.png has changed since\)"):
        build("folder", source=source, out=memory, workers=1)
