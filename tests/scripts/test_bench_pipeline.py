"""The pipeline benchmark: what it measures, and that it runs from end to end."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import bench_pipeline
import bench_shards
from bench import gpu_sweep, pipeline_ours, pipeline_peers
from bench.common import header, peer_environments, reason
from bench.gpu_sweep import DECODING, Setting, markdown, sweep
from bench.loader_process import LoaderError, LoaderProcess
from bench.pipeline_data import make_data, make_index
from bench_pipeline import BARS, HERE, bench, judge, ratio
from shards.errors import UserError
from shards.index import open_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    make_data(folder, "small", 300)
    return folder


def contestant(code: str) -> LoaderProcess:
    """A process that serves steps from `open_steps`, which the code defines."""
    serve = "from bench.loader_process import serve\nserve(open_steps, 'cpu', dict)"
    return LoaderProcess([sys.executable, "-c", f"{code}\n{serve}"], HERE)


def comes_to(pid: str, state: str) -> bool:
    """Whether a process reaches a state, or is gone, within ten seconds: signals take a moment."""
    for _ in range(1000):
        try:
            if Path("/proc", pid, "stat").read_text().split()[2] == state:
                return True
        except FileNotFoundError:
            return state == "Z"
        time.sleep(0.01)
    return False


def test_it_runs_from_end_to_end(tmp_path):
    bench(
        tmp_path / "out.json",
        data="small",
        rounds=2,
        steps=4,
        only="dali",
        images=60,
        long_steps=20,
        index_samples=2000,
    )
    results = json.loads((tmp_path / "out.json").read_text())
    dali = results["small"]["contestants"]["dali"]
    assert dali["delivers"] == ["uint8 (128, 32, 32, 3)"] * 2
    assert [turn["images"] for turn in dali["rounds"]] == [4 * 2 * 128] * 2
    assert all(turn["seconds"] > 0 and turn["memory_mb"] > 50 for turn in dali["rounds"])
    assert results["small"]["memory"]["dali"]["late_mb"] > 50
    assert results["index"]["first_batch"]["dali"]["seconds"] > 0
    assert results["index"]["ids_ms"] > 0
    assert results["index"]["draws_ms"] > 0
    assert results["environment"]["cores"] == len(os.sched_getaffinity(0))
    judged = {bar["bar"]: bar["met"] for bar in results["bars"]}
    assert judged["small: dali at least 4 times papers"] is None
    assert judged["large index: dali's first batch within 3 s"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "dali,nobody"}, "--only 'nobody' is no contestant; choose from: dali, resident, torch, "),
        ({"images": 3}, "--images 3 is too small; give at least 60"),
        ({"rounds": 0}, "--rounds 0 is too small; give at least 1"),
    ],
)
def test_a_mistake_is_reported_in_one_line(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        bench(**options)


@pytest.mark.parametrize("options", [{"sweep_gpu": True}, {"device": "cuda"}])
def test_without_a_gpu_nothing_begins(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no NVIDIA GPU, which --sweep-gpu and --device cuda need"):
        bench(**options)


def test_a_process_takes_steps_on_command_and_its_children_count():
    code = """
import subprocess, sys
BURN = "import time\\nwhile time.process_time() < 0.3: pass"
def open_steps():
    print("a library says something")
    while True:
        subprocess.run([sys.executable, "-c", BURN])
        yield [([0] * 3, None), ([0] * 4, None)]
"""
    with contestant(code) as loader:
        assert loader.about["delivers"] == ["3 pictures of any size", "4 pictures of any size"]
        load = loader.load(2)
        assert load.images == 14
        assert load.cpu_seconds >= 0.5
        assert 1 < loader.memory_mb() < 100


def test_a_stopped_process_does_nothing_and_a_closed_one_leaves_nothing(tmp_path):
    code = f"""
import subprocess, time
def open_steps():
    child = subprocess.Popen(["sleep", "1000"])
    open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
    while True:
        yield [([0], None)]
"""
    with contestant(code) as loader:
        child = (tmp_path / "pid").read_text()
        loader.stop()
        assert comes_to(child, "T")
        loader.go_on()
        assert loader.load(1).images == 1
        loader.stop()
    assert comes_to(child, "Z")


def test_a_process_that_fails_says_why():
    with pytest.raises(LoaderError, match="ValueError: no such thing"):
        contestant("def open_steps():\n    raise ValueError('no such thing')")
    with (
        contestant("def open_steps():\n    yield [([0], None)]\n    raise OSError('gone')") as loader,
        pytest.raises(LoaderError, match="OSError: gone"),
    ):
        loader.load(3)


def test_a_contestant_that_fails_does_not_run_on_in_the_others_turns(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.loader_process.SECONDS_TO_ANSWER", 5)
    monkeypatch.setattr("bench.loader_process.SECONDS_TO_END", 0.1)
    monkeypatch.setattr(bench_pipeline, "what", str)
    pid = tmp_path / "pid"
    serve = "from bench.loader_process import serve\nserve(open_steps, 'cpu', dict)"
    hangs = f"""
import os, time
def open_steps():
    open({str(pid)!r}, "w").write(str(os.getpid()))
    yield [([0], None)]
    time.sleep(1000)
"""
    works = f"""
import time
from pathlib import Path
def open_steps():
    assert not Path("/proc", Path({str(pid)!r}).read_text()).exists()
    while True:
        time.sleep(0.01)
        yield [([0], None)]
"""
    commands = {name: [sys.executable, "-c", code + serve] for name, code in (("hangs", hangs), ("works", works))}
    skipped = {}
    found = bench_pipeline.race("small", commands, 1, 1, 1, 1.0, skipped)
    assert list(found["contestants"]) == ["works"]
    assert skipped == {"small, hangs": "no answer within 5 seconds"}


def test_this_checkout_is_measured_whichever_one_is_installed(tmp_path):
    (tmp_path / "scripts/bench").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/bench/__init__.py", tmp_path / "scripts/bench")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", "import bench, shards; print(shards.__file__)"],
        cwd=tmp_path / "scripts",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(tmp_path / "shards/__init__.py"), done.stderr


def test_too_few_images_for_the_builds_are_refused_before_any_is_made():
    with pytest.raises(UserError, match="--images 199 is too small; give at least 200"):
        bench_shards.bench(images=199)


def test_ratios_are_medians_of_rounds():
    results = {
        "a": {"rounds": [{"rate": 10.0}, {"rate": 40.0}, {"rate": 12.0}]},
        "b": {"rounds": [{"rate": 5.0}, {"rate": 10.0}, {"rate": 4.0}]},
        "c": {"rounds": [{"rate": 0.0}, {"rate": 1.0}, {"rate": 1.0}]},
    }
    assert ratio(results, "a", "b", "rate") == 3
    assert ratio(results, "a", "c", "rate") is None


def test_bars_are_met_missed_or_not_measured():
    results = {
        "photos": {
            "ratios": {"dali": {"papers": {"wall": 4.0, "cpu": 1.0}, "ffcv": {"wall": 1.1, "cpu": 2.0}}},
            "memory": {"dali": {"growth_mb": 17.0}, "torch": {"growth_mb": -3.0}},
        },
        "index": {"first_batch": {"dali": {"seconds": 2.9}, "resident": {"skipped": "too large"}}, "ids_ms": 0.3},
    }
    judged = {bar["bar"]: bar["met"] for bar in judge(results)}
    assert judged == {f"{bar.data}: {bar.ours} at least {bar.times:g} times {bar.peer}": None for bar in BARS} | {
        "photos: dali at least 4 times papers": True,
        "photos: dali at least 1.2 times ffcv": False,
        "photos: dali grows by at most 16 MB": False,
        "photos: torch grows by at most 16 MB": True,
        "large index: dali's first batch within 3 s": True,
        "large index: resident's first batch within 3 s": None,
        "large index: a step's ids within 0.2 ms": False,
    }


def test_the_reason_of_a_failed_installation_is_the_line_that_names_an_error():
    assert (
        reason("x\n  RuntimeError: Could not find opencv\nhint: see above\n") == "RuntimeError: Could not find opencv"
    )
    assert reason("x\nno space left\n") == "no space left"


def test_results_say_the_command_as_one_types_it(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "scripts/reproduce.py", "bbn-2", "--rows", "CE,BBN, 2x"])
    assert header()["command"] == "scripts/reproduce.py bbn-2 --rows 'CE,BBN, 2x'"


def test_without_uv_peers_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: str(tmp_path / name))
    skipped = {}
    assert peer_environments(tmp_path, {"plain": ["pillow"]}, skipped) == {}
    assert "No such file" in skipped["plain"]


def test_peers_are_in_the_bench_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["bench"], "pillow"]
    names = {re.split("[>=<;[]", requirement)[0] for requirement in listed}
    assert {package for _, packages in pipeline_peers.PEERS.values() for package in packages} <= names


def test_the_papers_second_image_is_of_a_class_drawn_by_reversed_probability(small):
    dataset = pipeline_peers.DualPictures(small, "small")
    assert dataset.counts.argmax() == 0
    drawn = np.bincount([dataset[0][1][1] for _ in range(2000)], minlength=20)
    expected = 2000 * (1 / dataset.counts) / (1 / dataset.counts).sum()
    assert np.abs(drawn - expected).max() < 6 * np.sqrt(expected.max())
    assert dataset[5][0][0].shape == (3, 32, 32)
    assert dataset[5][0][0].dtype == torch.float32


def test_the_textbook_indexes_repeat_samples_by_reversed_probability(small, tmp_path):
    split = open_dataset(small / "dataset").splits["train"]
    for q, tail_is_larger in ((1.0, False), (-1.0, True)):
        lines = []
        for path in pipeline_ours._repeating_indexes(split, q, tmp_path / f"q{q}"):
            head, *samples = Path(path).read_text().splitlines()
            assert head == f"v1.2 {len(samples)}"
            lines += samples
        assert len(lines) == len(split)
        offsets = {int(row["offset"]): int(row["label"]) for row in split.samples}
        drawn = np.bincount([offsets[int(line.split()[1])] for line in lines], minlength=20)
        assert (drawn[-1] > drawn[0]) == tail_is_larger
        assert tail_is_larger or drawn.tolist() == split.class_counts.tolist()


def test_prepared_feeds_are_the_plans_draws(small):
    plan = pipeline_ours.make_plan(small, "small", 16)
    uniform, reversed_ = pipeline_ours.prepared_feeds(plan)
    for step in (0, 1):
        for feed, draw in zip((uniform, reversed_), plan.draws(step), strict=True):
            files, starts, shapes, flips = feed()
            assert len(files) == 16
            np.testing.assert_array_equal(np.hstack([starts, shapes]), draw.windows_B4)
            np.testing.assert_array_equal(flips, draw.flips_B)
    for _ in range(pipeline_ours.PREPARED - 2):
        uniform()
    np.testing.assert_array_equal(uniform()[3], plan.draws(0)[0].flips_B)


def test_a_large_index_opens_and_its_images_can_be_read(tmp_path):
    make_index(tmp_path, 3000)
    train = open_dataset(tmp_path / "dataset").splits["train"]
    assert len(train) == train.class_counts.sum() == 3000
    assert len(train.class_counts) == 1500
    np.testing.assert_array_equal(train.class_counts, np.bincount(train.samples["label"]))
    np.testing.assert_array_equal(train.samples["label"][train.by_class], np.sort(train.samples["label"]))
    assert (np.diff(train.samples["shard"]) >= 0).all()


def test_the_sweep_takes_the_best_way_to_decode_on():
    def measure(setting: Setting) -> float:
        if setting.decode == "window":
            raise RuntimeError("not on this GPU\nmore")
        return setting.batch * setting.hw_decoder_load + setting.threads

    rows = sweep(measure)
    assert len(rows) == len(DECODING) + 12
    assert rows[0]["error"] == "not on this GPU"
    after = rows[len(DECODING) :]
    assert {(row["decode"], row["hw_decoder_load"], row["batch"]) for row in after} == {("whole", 0.9, 256)}
    assert {(row["threads"], row["decoded_ahead"]) for row in after} >= {(1, 2), (8, 3)}
    table = markdown(rows, "a GPU").splitlines()
    assert table[4] == "| whole | 0.9 | 256 | 8 | 2 | 238 |"
    assert table[-1].endswith("| not on this GPU |")


def test_a_sweep_of_which_nothing_runs_says_so():
    def measure(setting: Setting) -> float:
        raise RuntimeError("no decoder")

    with pytest.raises(UserError, match="none of 24 settings ran on this GPU: no decoder"):
        sweep(measure)
    assert gpu_sweep.Setting().threads == 4


@pytest.mark.gpu
def test_both_ways_to_decode_run_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sweep, "SECONDS", 0.2)
    make_data(tmp_path, "photos", 100)
    for decode in ("window", "whole"):
        assert gpu_sweep.measured(tmp_path)(Setting(decode, batch=16, threads=2)) > 0
