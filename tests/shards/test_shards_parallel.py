"""Jobs in this process and in others, and what is said while they run."""

import os

import pytest

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
