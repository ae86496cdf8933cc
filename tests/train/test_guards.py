"""What goes wrong in a run of three days is reported in one line."""

import errno
import json
import math
import os
import signal
import time

import numpy as np
import pytest
import torch

from pipeline.batch import Batch
from pipeline.faults import Faults
from pipeline.plan import EvalPlan
from shards.errors import UserError
from train.engine import guards, runs
from train.engine.guards import LossGuard, StallGuard, check_devices, errors_in_one_line
from train.engine.launch import run
from train.engine.loop import Training
from train.erm import ERM

SHORT = ["--optim.epochs", "1", "--input.batch_size", "64", "--input.image_size", "8", "--optim.lr", "0.02"]
WHERE = {"epoch": 2, "step": 9, "lr": 0.1}


def fails_with(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(ERM, [*SHORT, *arguments])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2, error
    assert error.startswith("train/erm.py: error: ")
    assert "\n" not in error
    return error


def step_of(*ids: int) -> dict[str, Batch]:
    return {"train": Batch(torch.zeros(len(ids), 1, 1, 3), torch.zeros(len(ids)), np.array(ids))}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_one_step_later_and_names_its_own_images(tmp_path, digits, value):
    guard = LossGuard(tmp_path, digits.splits["train"], rank=3)
    guard.seen(torch.tensor(1.0), WHERE, step_of(0))
    guard.seen(torch.tensor(value), WHERE, step_of(4, 2))
    with pytest.raises(
        UserError, match=r"the loss is -?(nan|inf) in epoch 2, step 9, at a rate of 0\.1; lower optim\.lr"
    ):
        guard.seen(torch.tensor(1.0), WHERE | {"step": 10}, step_of(1))
    reported = json.loads((tmp_path / "nonfinite-loss-rank-3.json").read_text())
    names = digits.splits["train"].sample_names()
    assert reported == {"loss": str(value), **WHERE, "samples": {"train": [names[4], names[2]]}}
    guard.check()  # reported once


def test_a_finite_loss_leaves_no_file(tmp_path, digits):
    guard = LossGuard(tmp_path, digits.splits["train"], rank=0)
    guard.check()
    guard.seen(torch.tensor(1e30), WHERE, step_of(0))
    guard.check()
    assert not list(tmp_path.iterdir())


def test_a_diverging_run_never_saves_its_weights(workplace, capsys, monkeypatch):
    def diverge(self, batch, progress, lr):
        return torch.tensor(math.nan if progress.step == 2 else 1.0)

    monkeypatch.setattr(Training, "_step", diverge)
    message = fails_with(capsys, "--run", "runs/a", "--loop.checkpoint_steps", "3")
    assert "the loss is nan in epoch 1, step 3, at a rate of " in message
    assert "runs/a/nonfinite-loss-rank-0.json names the step's images" in message
    assert len(json.loads((workplace / "runs/a/nonfinite-loss-rank-0.json").read_text())["samples"]["train"]) == 64
    assert not (workplace / "runs/a/checkpoints").exists()


@pytest.mark.parametrize("steps", [3, 6])  # in mid-epoch, and at the end of one
def test_weights_that_are_not_finite_are_never_saved(workplace, capsys, monkeypatch, steps):
    step = Training._step

    def break_the_weights(self, batch, progress, lr):
        loss = step(self, batch, progress, lr)
        if progress.step == steps - 1:
            with torch.no_grad():
                self._network.classifier.bias.fill_(math.inf)
        return loss

    monkeypatch.setattr(Training, "_step", break_the_weights)
    every = ["--loop.checkpoint_steps", str(steps), "--optim.epochs", "2", "--loop.eval_every", "2"]
    message = fails_with(capsys, "--run", "runs/a", *every)
    assert (
        f"classifier.bias is not finite in epoch 1, after step {steps}, and no checkpoint of it is written" in message
    )
    assert not (workplace / "runs/a/checkpoints").exists()


class SlowLoader:
    """Delivers after a while; says what it waits for, if it knows."""

    def __init__(self, seconds: float, waiting_for: str | None) -> None:
        self.seconds, self.waiting_for = seconds, waiting_for

    def __next__(self) -> str:
        time.sleep(self.seconds)
        return "batch"


@pytest.mark.parametrize(("waiting_for", "named"), [("reversed", "reversed"), (None, "uniform or reversed")])
def test_a_batch_that_stalls_ends_the_process_and_says_which_rank_and_stream(capsys, monkeypatch, waiting_for, named):
    ended = []
    monkeypatch.setattr(guards.os, "_exit", lambda status: (ended.append(status), time.sleep(1)))
    with StallGuard(SlowLoader(0.6, waiting_for), ("uniform", "reversed"), 5, limit_s=0.2) as guard:
        assert next(guard) == "batch"
    assert ended == [1]
    error = capsys.readouterr().err
    assert error.startswith(f"error: rank 5 has waited 0.2 s for a batch of the stream {named}: ")
    assert error.count("\n") == 1


def test_an_evaluation_that_stalls_ends_the_process_too(workplace, capsys, monkeypatch):
    ended = []
    monkeypatch.setattr(guards.os, "_exit", lambda status: (ended.append(status), time.sleep(1)))
    replaced = Faults.replace

    def waits_in_evaluations(self, plan, draw):
        began = time.monotonic()
        while isinstance(plan, EvalPlan) and not ended and time.monotonic() - began < 30:
            time.sleep(0.1)
        return replaced(self, plan, draw)

    monkeypatch.setattr(Faults, "replace", waits_in_evaluations)
    run(ERM, [*SHORT, "--input.loader", "resident", "--loop.stall_minutes", "0.02"])
    assert ended == [1]
    assert "error: rank 0 has waited 1.2 s for a batch of the stream eval: " in capsys.readouterr().err


def test_a_process_that_was_suspended_did_not_wait(monkeypatch):
    ended = []
    monkeypatch.setattr(guards.os, "_exit", ended.append)
    clock, began = time.monotonic, time.monotonic()
    # An hour goes by, as the clock has it, soon after the batch is asked for.
    monkeypatch.setattr(guards.time, "monotonic", lambda: clock() + 3600 * (clock() - began > 0.1))
    with StallGuard(SlowLoader(0.8, None), ("uniform",), 0, limit_s=2.0) as guard:
        next(guard)
    assert not ended


def test_slow_steps_are_no_stall(monkeypatch):
    ended = []
    monkeypatch.setattr(guards.os, "_exit", ended.append)
    with StallGuard(SlowLoader(0.0, None), ("uniform",), 0, limit_s=0.2) as guard:
        for _ in range(2):
            next(guard)
            time.sleep(0.3)
    assert not ended


@pytest.mark.parametrize(
    ("environment", "device", "gpus", "message"),
    [
        ({}, "cuda", 0, "loop.device=cuda, but torch finds no GPU here"),
        (
            {"LOCAL_RANK": "2"},
            "auto",
            2,
            "process 2 of this machine has no GPU of its own: torch finds 2; start --num_",
        ),
        ({"LOCAL_RANK": "2"}, "cuda", 2, "process 2 of this machine has no GPU"),
        ({"LOCAL_RANK": "1"}, "auto", 2, None),
        ({"LOCAL_RANK": "7"}, "auto", 0, None),
        ({"LOCAL_RANK": "7"}, "cpu", 2, None),
    ],
)
def test_devices(environment, device, gpus, message):
    if message is None:
        check_devices(environment, device, gpus)
    else:
        with pytest.raises(UserError, match=message):
            check_devices(environment, device, gpus)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loop.device", "cuda"], "torch finds no GPU here; use --loop.device cpu"),
        (["--loop.precision", "fp16"], "loop.precision=fp16 needs a GPU; use --loop.precision bf16, or no"),
    ],
)
def test_what_needs_a_gpu(workplace, capsys, arguments, message):
    assert message in fails_with(capsys, *arguments)
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("cannot allocate 3 TB"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 TB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 TB. Error code 12"),
        RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in 3 TB of pages"),
    ],
)
def test_no_memory(workplace, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Training, "_step", fail)
    message = fails_with(capsys)
    assert "out of memory (" in message
    assert "3 TB" in message
    assert "lower input.batch_size, or work in parts with --optim.accumulate 2" in message


def test_really_no_memory():
    with pytest.raises(UserError, match="out of memory"), errors_in_one_line():
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_run_folder_that_cannot_be_written_to(workplace, capsys, monkeypatch, number):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("train.engine.checkpoints.os.fsync", fail)
    message = fails_with(capsys, "--run", "runs/a")
    assert (
        f"cannot write runs/a ({os.strerror(number)}); when that is solved, resume with --run runs/a --resume"
        in message
    )
    left = {path.name for path in (workplace / "runs/a/checkpoints").iterdir()}
    assert left <= {"selected.safetensors"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "write_text",
            "cannot write runs/digits-erm-1 (No space left on device); when that is solved, resume with --run",
        ),
        ("lock", "cannot make a run folder under "),
    ],
)
def test_a_disk_that_is_full_at_the_beginning(workplace, capsys, monkeypatch, function, message):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runs, function, full)
    assert message in fails_with(capsys)


def test_a_run_folder_that_cannot_be_made(workplace, capsys):
    assert "cannot make the run folder /proc/run" in fails_with(capsys, "--run", "/proc/run")


def test_a_runs_folder_that_is_a_link_to_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("/nowhere/at all")
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it searches for a free name without end"))
    signal.alarm(30)
    try:
        with pytest.raises(UserError, match="runs is a link to /nowhere/at all, which is not there; make that folder"):
            runs.new_run("x")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_port_in_use_and_a_lost_process(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    with (
        pytest.raises(
            UserError, match=r"port 29500 is in use on this machine; choose another with --main_process_port"
        ),
        errors_in_one_line(),
    ):
        raise torch.distributed.DistNetworkError("server socket failed to listen. EADDRINUSE: address already in use")
    with (
        pytest.raises(
            UserError, match=r"lost another process of this run \(.*closed by peer.*\); its own message says"
        ),
        errors_in_one_line(),
    ):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3333")


def test_a_failure_of_nccl_itself_keeps_its_reason():
    said = (
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled system error (run with"
        " NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) or"
        " external library call failed or device error.\nLast error:\nError while creating shared memory segment"
        " /dev/shm/nccl-AbCdEf, error: No space left on device (28)"
    )
    with (
        pytest.raises(UserError, match=r"^the processes of this run cannot exchange data \(.*No space left on device"),
        errors_in_one_line(),
    ):
        raise RuntimeError(said)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), FileNotFoundError(2, "no such file"), KeyError("x")])
def test_our_own_bugs_keep_their_traceback(error, tmp_path):
    with pytest.raises(type(error)), errors_in_one_line(tmp_path):
        raise error


def test_a_port_that_is_really_in_use(workplace, capsys, monkeypatch):
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    assert f"port {server.port} is in use on this machine" in fails_with(capsys)


def test_parts_that_do_not_divide_the_batch(workplace, capsys):
    message = fails_with(capsys, "--optim.accumulate", "5")
    assert "optim.accumulate=5 does not divide the 64 images per stream of each process; choose a divisor" in message
    assert not (workplace / "runs").exists()


def test_machines_that_see_different_checkpoints(workplace, capsys, monkeypatch):
    monkeypatch.setattr(
        "train.engine.session.broadcast_object_list", lambda objects: [40 if x == 0 else x for x in objects]
    )
    message = fails_with(capsys, "--run", "runs/a", "--resume")
    assert "finds a checkpoint of step 0 in runs/a, the first process one of step 40; put the run on a file" in message
