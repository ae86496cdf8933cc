"""Several processes: the same run as one process, which ends together and goes on together."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline import resident_loader
from train.bbn import BBN
from train.engine import session
from train.engine.interrupts import EXIT_STATUS, Consensus
from train.engine.launch import run
from train.engine.loop import Training
from train.engine.machine import make_accelerator
from train.erm import ERM

ROOT = Path(__file__).parents[2]
# Unset, accelerate warns on every rank.
os.environ.setdefault("OMP_NUM_THREADS", "1")
SETTINGS = ["--input.batch_size", "48", "--input.image_size", "8", "--input.augment", "none", "--optim.epochs", "2"]
SETTINGS += ["--optim.lr", "0.001", "--optim.warmup_epochs", "1", "--loop.eval_every", "1"]
STEPS = 8  # an epoch, of 412 images


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _rank(function, rank: int, ranks: int, port: int, folder: str, *arguments) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (
        open(f"rank-{rank}.log", "w", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        function(rank, *arguments)


def on_ranks(folder: Path, function, *arguments, ranks: int = 2) -> list[int]:
    """Call a function in so many processes, which find each other; return their exit statuses."""
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(function, rank, ranks, port, str(folder), *arguments), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _make_accelerator_as_under_slurm(rank: int) -> None:
    del os.environ["OMP_NUM_THREADS"]
    accelerator = make_accelerator("no", threads=3)
    print(torch.get_num_threads(), "threads")
    accelerator.wait_for_everyone()  # the first one keeps what the other still asks for


def test_threads_that_are_asked_for_are_taken_among_several_processes_too(workplace):
    assert on_ranks(workplace, _make_accelerator_as_under_slurm) == [0, 0]
    assert [(workplace / f"rank-{rank}.log").read_text() for rank in range(2)] == ["3 threads\n"] * 2


def _train_and_record(rank: int, argv: list[str]) -> None:
    """Train, and keep the ids and the loss of every step in steps-RANK.npz."""
    steps: dict[str, np.ndarray] = {}
    original = Training._step

    def step_and_keep(self, batch, *arguments):
        steps.update({f"{name} {self._counters.step}": part.ids_B for name, part in batch.items()})
        loss = original(self, batch, *arguments)
        steps[f"loss {self._counters.step}"] = loss.numpy()
        np.savez(f"steps-{rank}.npz", **steps)
        return loss

    Training._step = step_and_keep
    run(BBN, argv)


def test_two_processes_are_one(workplace):
    # At ten times this rate rounding grows from 1e-7 to 1e-3 within eight steps.
    settings = [*SETTINGS, "--optim.lr", "0.0001", "--loop.sync_batch_norm", "true", "--run"]
    for name, ranks in (("one", 1), ("two", 2)):
        assert on_ranks(workplace, _train_and_record, [*settings, f"runs/{name}"], ranks=ranks) == [0] * ranks
        for rank in range(ranks):
            (workplace / f"steps-{rank}.npz").rename(workplace / f"{name}-{rank}.npz")
    one, first, second = (np.load(workplace / name) for name in ("one-0.npz", "two-0.npz", "two-1.npz"))
    assert len(one.files) == 3 * 2 * STEPS
    for step in one.files:
        if "loss" in step:
            assert (first[step] + second[step]) / 2 == pytest.approx(
                one[step], rel=3e-4
            )  # rounding grows to 2e-5; without an exchange 1e-2
        else:
            np.testing.assert_array_equal(one[step], np.concatenate([first[step], second[step]]))
    for ours, theirs in zip(rows(workplace / "runs/one"), rows(workplace / "runs/two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)  # rounding: 2e-6; without an exchange 8e-4
        assert (ours["lr"], ours["alpha"], ours["step"]) == (theirs["lr"], theirs["alpha"], theirs["step"])
        for figure in ("top1", "balanced_accuracy", "ece"):  # of 136 images
            assert ours["eval"][figure] == pytest.approx(theirs["eval"][figure], abs=0.05)
    per_class = [json.loads((workplace / f"runs/{name}/per_class.json").read_text()) for name in ("one", "two")]
    assert per_class[0]["total"] == per_class[1]["total"]
    assert sum(per_class[1]["total"]) == 451  # no image of the test split twice
    summary = json.loads((workplace / "runs/two/summary.json").read_text())
    assert summary["environment"]["processes"] == 2
    kept = [dict(np.load(workplace / f"runs/{name}/diagnostics.npz")) for name in ("one", "two")]
    for name, values_C in kept[0].items():  # each image's features counted once
        assert values_C == pytest.approx(kept[1][name], rel=0.02), name
    lines = (workplace / "rank-0.log").read_text().splitlines()
    assert len(lines) == len(set(lines)), lines  # said once
    assert (workplace / "rank-1.log").read_text() == ""


def _train_until_signalled(rank: int, argv: list[str], step: int, signalled: int, method=BBN) -> None:
    original = Training._step

    def step_and_signal(self, *arguments):
        if rank == signalled and self._counters.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    Training._step = step_and_signal
    run(method, argv)


def _train(rank: int, argv: list[str], method=BBN) -> None:
    run(method, argv)


def test_a_signal_to_any_rank_stops_all_after_the_same_step_and_they_go_on_together(workplace):
    assert on_ranks(workplace, _train, [*SETTINGS, "--run", "runs/whole"]) == [0, 0]
    stopped = on_ranks(workplace, _train_until_signalled, [*SETTINGS, "--run", "runs/cut"], 4, 1)
    assert stopped == [EXIT_STATUS, EXIT_STATUS]
    assert "stopped by SIGTERM after step 5, with a checkpoint" in (workplace / "rank-0.log").read_text()
    assert on_ranks(workplace, _train, ["--resume", "--run", "runs/cut"]) == [0, 0]
    for ours, theirs in zip(rows(workplace / "runs/cut"), rows(workplace / "runs/whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["eval"] == theirs["eval"]
    ours, theirs = (load_file(workplace / f"runs/{name}/model.safetensors") for name in ("cut", "whole"))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key])


def test_ranks_go_on_in_mid_epoch_with_an_objective_that_adds_up_other_things(workplace):
    settings = ["--method.objective", "gradual", "--run", "runs/cut"]
    stopped = on_ranks(workplace, _train_until_signalled, [*SETTINGS, *settings], 4, 1, ERM)
    assert stopped == [EXIT_STATUS, EXIT_STATUS]
    resumed = ["--resume", "--run", "runs/cut", "--method.objective", "ce", "--optim.epochs", "1"]
    assert on_ranks(workplace, _train, resumed, ERM) == [0, 0], (workplace / "rank-0.log").read_text()


def _train_and_keep_statistics(rank: int, argv: list[str]) -> None:
    """Train, and keep the batch-norm statistics of every evaluation in statistics-RANK.npz."""
    seen: dict[str, np.ndarray] = {}
    predict = BBN.predict

    def predict_and_keep(self, images_BHWC):
        buffers = dict(self.model.named_buffers())
        seen.update({f"{name} {len(seen)}": buffer.numpy().copy() for name, buffer in buffers.items()})
        np.savez(f"statistics-{rank}.npz", **seen)
        return predict(self, images_BHWC)

    BBN.predict = predict_and_keep
    run(BBN, argv)


@pytest.mark.parametrize("more", [[], ["--optim.ema", "0.9"]])
def test_all_ranks_evaluate_the_model_that_is_saved(workplace, more):
    # What a run takes is measured on a network of its own, whose predictions are none of the run's.
    settings = [*SETTINGS, "--input.batch_size", "200", "--loop.estimate", "false", *more, "--run", "runs/a"]
    assert on_ranks(workplace, _train_and_keep_statistics, settings) == [0, 0], (workplace / "rank-0.log").read_text()
    first, second = (dict(np.load(workplace / f"statistics-{rank}.npz")) for rank in range(2))
    assert len(first) == len(second) > 0
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(workplace, before, after):
    settings = [*SETTINGS, "--optim.lr", "0.0001", "--loop.sync_batch_norm", "true", "--run"]
    assert on_ranks(workplace, _train, [*settings, "runs/whole"], ranks=1) == [0]
    stopped = on_ranks(workplace, _train_until_signalled, [*settings, "runs/cut"], 4, 0, ranks=before)
    assert stopped == [EXIT_STATUS] * before
    assert on_ranks(workplace, _train, ["--resume", "--run", "runs/cut"], ranks=after) == [0] * after
    for ours, theirs in zip(rows(workplace / "runs/cut"), rows(workplace / "runs/whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)  # rounding: 2e-6; without an exchange 8e-4


def _train_in_folders_of_their_own(rank: int, argv: list[str]) -> None:
    os.makedirs(f"rank-{rank}")
    os.chdir(f"rank-{rank}")
    session.SEEN_WITHIN_S = 0.0
    run(BBN, argv)


def test_a_run_that_not_all_processes_see_is_refused(workplace):
    settings = [*SETTINGS, "--data", str(workplace / "data/digits"), "--run", "runs/a"]
    first, second = on_ranks(workplace, _train_in_folders_of_their_own, settings)
    assert (first != 0, second) == (True, 2)
    assert "process 1 does not see runs/a, where the first process writes" in (workplace / "rank-1.log").read_text()


def _agree(rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    consensus = Consensus(2)
    reported = [consensus(15 * rank, rank == 0), consensus(0, False), consensus(0, False)]
    assert reported == [[0, 0], [15, 1], [0, 0]]
    assert consensus.wait() == [0, 0]
    assert consensus.wait() is None
    torch.distributed.destroy_process_group()


def test_ranks_agree_a_call_later(tmp_path):
    assert on_ranks(tmp_path, _agree) == [0, 0], (tmp_path / "rank-0.log").read_text()


def _train_with_no_room(rank: int, argv: list[str], without: int) -> None:
    if rank == without:
        resident_loader.free_memory = lambda device: 0
    run(BBN, argv)


@pytest.mark.parametrize("without", [0, 1])
def test_all_ranks_take_one_loader(workplace, without):
    settings = [*SETTINGS, "--optim.epochs", "1", "--run", "runs/auto"]
    assert on_ranks(workplace, _train_with_no_room, settings, without) == [0, 0]
    assert json.loads((workplace / "runs/auto/summary.json").read_text())["environment"]["loader"] == "dali"
    assert "loader: dali (" in (workplace / "rank-0.log").read_text()


def test_a_batch_must_be_shared_evenly(workplace):
    assert on_ranks(workplace, _train, [*SETTINGS, "--input.batch_size", "47"]) == [2, 2]
    assert "input.batch_size=47 must be a positive multiple of the 2 processes" in (
        (workplace / "rank-0.log").read_text()
    )
    assert "train/bbn.py (rank 1): error: " in (workplace / "rank-1.log").read_text()


def start_nodes(folder: Path, *argv: str) -> list[subprocess.Popen]:
    """Start a run on two "nodes" of one process each, as one would on two machines."""
    port = free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [*launch, "--node-rank", str(rank), "--", str(ROOT / "train/bbn.py"), *argv],
            cwd=folder,
            env=environment,
            stdout=(folder / f"node-{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]


def worker_of(agent: subprocess.Popen) -> int:
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    (worker,) = [int(pid) for pid in children if b"bbn.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return worker


def test_on_two_nodes_a_killed_process_ends_the_run_within_a_minute_and_resume_goes_on(workplace):
    argv = [*SETTINGS, "--data", "data/digits", "--run", "runs/a"]
    nodes = start_nodes(workplace, *argv, "--optim.epochs", "10000", "--loop.checkpoint_steps", "1")
    try:
        deadline = time.monotonic() + 100
        while not list(workplace.glob("runs/a/checkpoints/step-*")):
            assert time.monotonic() < deadline
            assert [node.poll() for node in nodes] == [None, None], (workplace / "node-0.log").read_text()
            time.sleep(0.1)
        os.kill(worker_of(nodes[1]), signal.SIGKILL)
        assert all(node.wait(60) != 0 for node in nodes)
    finally:
        for node in nodes:
            node.kill()
    assert "error: lost another process of this run (" in (workplace / "node-0.log").read_text()
    done = len(rows(workplace / "runs/a")) if (workplace / "runs/a/metrics.jsonl").exists() else 0
    assert on_ranks(workplace, _train, ["--resume", "--run", "runs/a", "--optim.epochs", str(done + 1)]) == [0, 0]
    assert "resuming runs/a after epoch" in (workplace / "rank-0.log").read_text()
    assert len(rows(workplace / "runs/a")) == done + 1


def test_two_nodes_are_one_process(workplace):
    argv = [*SETTINGS, "--optim.lr", "0.0001", "--loop.sync_batch_norm", "true", "--data", "data/digits", "--run"]
    nodes = start_nodes(workplace, *argv, "runs/nodes")
    try:
        assert [node.wait(100) for node in nodes] == [0, 0], (workplace / "node-0.log").read_text()
    finally:
        for node in nodes:
            node.kill()
    logs = [(workplace / f"node-{rank}.log").read_text() for rank in range(2)]
    assert ["runs/nodes" in log or "epoch" in log for log in logs] == [True, False], logs[1]
    assert on_ranks(workplace, _train, [*argv, "runs/one"], ranks=1) == [0]
    for ours, theirs in zip(rows(workplace / "runs/nodes"), rows(workplace / "runs/one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=3e-5)
