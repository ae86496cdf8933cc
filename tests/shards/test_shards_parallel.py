"""Jobs in this process and in others, and what is said while they run."""

import os

import pytest

import shards.cores
import shards.progress
from shards.errors import UserError
from shards.parallel import run_jobs
from shards.progress import Progress


@pytest.mark.parametrize("workers", [1, 2, None])
def test_results_keep_the_order_of_the_jobs(workers):
    seen = []
    results = run_jobs(int, ["3", "1", "2"], n_images=3, workers=workers, done=seen.append)
    assert results == [3, 1, 2]
    assert sorted(seen) == [1, 2, 3]


def test_no_job_is_no_result():
    assert run_jobs(int, [], n_images=0, workers=4, done=print) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_job_raises_arrives(workers):
    with pytest.raises(ValueError, match="invalid literal"):
        run_jobs(int, ["1", "x"], n_images=2, workers=workers, done=lambda _: None)


def test_a_dead_worker_is_reported():
    with pytest.raises(UserError, match=r"a worker process died, .* try fewer than --workers 2"):
        run_jobs(os._exit, [1, 1], n_images=2, workers=2, done=lambda _: None)


def test_progress_prints_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(shards.progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(shards.progress.time, "monotonic", iter([0.0, 10.0]).__next__)
    with Progress("build", 5000, done=1000) as progress:
        progress.add(2000, "1 rejected")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "build: 3,000 of 5,000 images, 200/s, 00:10 left, 1 rejected"


def test_progress_of_a_short_task_is_silent(capsys):
    with Progress("build", 5) as progress:
        progress.add(5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("files", "groups", "expected"),
    [
        ({"cpu.max": "max 100000"}, "0::/\n", 6),
        ({"cpu.max": "200000 100000\n"}, "0::/\n", 2),
        ({"job/cpu.max": "150000 100000", "cpu.max": "400000 100000"}, "0::/job/step\n", 2),
        ({"cpu.max": "5000 100000"}, "0::/not/mounted/here\n", 1),
        (
            {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            "3:cpu,cpuacct:/x\n2:memory:/\n",
            3,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "3:cpu,cpuacct:/x\n", 6),
        ({"cpu.max": "1600000 100000"}, "0::/\n", 6),
        ({}, None, 6),
    ],
)
def test_cores_are_those_that_control_groups_let_one_use(tmp_path, monkeypatch, files, groups, expected):
    for name, content in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(content)
    if groups is not None:
        (tmp_path / "groups").write_text(groups)
    monkeypatch.setattr(shards.cores, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(shards.cores, "MOUNTED", tmp_path / "mounted")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert shards.cores.cores() == expected
