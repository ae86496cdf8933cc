"""Building on a Dask cluster (extra `cluster`)."""

import sys

import pytest

from shards.build import build
from shards.errors import UserError
from shards.verify import verify


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        yield cluster


def test_a_cluster_builds_the_same_bytes(tmp_path, image_folder, cluster, monkeypatch):
    image_folder(tmp_path / "source", {"cat": 8, "dog": 6})
    (tmp_path / "source" / "cat" / "text.jpg").write_text("no image")
    monkeypatch.chdir(tmp_path)  # the cluster's workers are elsewhere, and relative paths still mean this folder
    options = {"source": tmp_path / "source", "shard_samples": 3}
    one = build("folder", out=tmp_path / "one" / "out", workers=1, **options)
    options["source"] = options["source"].relative_to(tmp_path)
    out = build(
        "folder",
        out=one.parents[1].relative_to(tmp_path) / "out",
        executor="dask",
        scheduler=cluster.scheduler_address,
        **options,
    )
    assert contents(out) == contents(one)
    assert verify(out, workers=1) == []


def test_what_a_worker_of_the_cluster_meets_is_reported_here(tmp_path, image_folder, cluster):
    source = image_folder(tmp_path / "source", {"a": 2, "b": 2})
    (source / "a" / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"a/text\.jpg: not an image; fix or remove it, or leave out --strict"):
        build(
            "folder",
            source=source,
            out=tmp_path / "out",
            strict=True,
            executor="dask",
            scheduler=cluster.scheduler_address,
        )


def test_a_scheduler_that_is_not_there(tmp_path, image_folder, monkeypatch):
    pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    monkeypatch.setattr("shards.parallel.CONNECT_SECONDS", 0.2)
    source = image_folder(tmp_path / "source", {"a": 2, "b": 2})
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        with pytest.raises(UserError, match=rf"--scheduler {address} cannot be reached \(.*\); give a running one's"):
            build("folder", source=source, out=tmp_path / "out", executor="dask", scheduler=address)


def test_without_dask_the_extra_is_named(tmp_path, image_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    source = image_folder(tmp_path / "source", {"a": 2, "b": 2})
    with pytest.raises(UserError, match=r"needs Dask; install it with: pip install 'tailstream\[cluster\]'"):
        build("folder", source=source, out=tmp_path / "out", executor="dask", scheduler="tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "dask"}, "--executor dask and --scheduler ADDRESS need each other"),
        ({"scheduler": "tcp://x"}, "--executor dask and --scheduler ADDRESS need each other"),
        ({"executor": "dask", "scheduler": "tcp://x", "workers": 2}, "--workers 2 has no effect with --executor dask"),
    ],
)
def test_options_that_do_not_fit_together(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build("digits", out=tmp_path / "out", **options)
