"""Cut off at any moment, by a signal or by kill -9, a run that is resumed ends as if nothing had been."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from shards.errors import UserError
from train.bbn import BBN
from train.engine import loop, runs, session
from train.engine.interrupts import EXIT_STATUS, Consensus, Interrupts
from train.engine.launch import run
from train.engine.loop import Training
from train.erm import ERM

ROOT = Path(__file__).parents[2]
TIMINGS = ("seconds", "images_per_second", "eval_seconds")
SHORT = ["--optim.epochs", "2", "--input.batch_size", "48", "--input.image_size", "8", "--optim.lr", "0.02",
         "--optim.warmup_epochs", "1"]  # fmt: skip
STEPS = 8  # an epoch, of 412 images


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def assert_alike(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
    assert rows(one) == rows(other)
    results = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    assert results[0]["last"] == results[1]["last"]
    assert results[0]["selected"] == results[1]["selected"]


def raise_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a signal while it computes the step, counted from 1."""
    original = Training._step

    def step_and_signal(self, *arguments):
        if self._counters.step == step - 1:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(Training, "_step", step_and_signal)


@pytest.mark.parametrize(
    ("number", "step", "settings"),
    [
        (signal.SIGTERM, 3, ["--optim.accumulate", "2", "--optim.clip_norm", "1"]),
        (signal.SIGUSR1, STEPS, []),  # the epoch's last: it is evaluated first
        (signal.SIGINT, STEPS + 5, ["--optim.ema", "0.9"]),
    ],
)
def test_a_signal_stops_after_its_step_and_resume_goes_on_bit_for_bit(
    workplace, monkeypatch, capsys, number, step, settings
):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    run(BBN, [*SHORT, *settings, "--run", "runs/whole"])
    raise_at(monkeypatch, step, number)
    with pytest.raises(SystemExit) as stopped:
        run(BBN, [*SHORT, *settings, "--run", "runs/cut"])
    assert stopped.value.code == EXIT_STATUS == 75
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    reported, name = capsys.readouterr(), signal.Signals(number).name
    script = os.path.relpath(sys.modules[BBN.__module__].__file__)
    assert f"stopped by {name} after step {step}, with a checkpoint; resume with: " in reported.out
    assert f" {script} --run runs/cut --resume\n" in reported.out
    assert f"{name}: finishing this step and writing a checkpoint" in reported.err
    assert (workplace / f"runs/cut/checkpoints/step-{step:08d}").is_dir()
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    run(BBN, ["--resume", "--run", "runs/cut"])
    assert_alike(workplace / "runs/whole", workplace / "runs/cut")
    within = f" and {step % STEPS} of {STEPS} steps" if step % STEPS else ""
    assert f"resuming runs/cut after epoch {step // STEPS}{within}\n" in capsys.readouterr().out


def test_a_signal_before_the_first_step_or_after_the_last_one_stops_cleanly_too(workplace, monkeypatch, capsys):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGUSR1)

    handler, settings = signal.getsignal(signal.SIGUSR1), [*SHORT, "--run", "runs/cut"]
    for name, says in (("estimate_run", "before the first step; give the same command again"),
                       ("finish", f"after step {2 * STEPS}, with a checkpoint; resume with: ")):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(session, name, interrupt)
            with pytest.raises(SystemExit, match="75"):
                run(ERM, settings)
        reported = capsys.readouterr()
        assert f"stopped by SIGUSR1 {says}" in reported.out
        assert "SIGUSR1: stopping\n" in reported.err
        assert (workplace / "runs/cut").exists() == (name == "finish")
        assert signal.getsignal(signal.SIGUSR1) == handler
    run(ERM, ["--resume", "--run", "runs/cut"])
    run(ERM, [*SHORT, "--run", "runs/whole"])
    assert_alike(workplace / "runs/whole", workplace / "runs/cut")


def test_a_signal_before_the_first_step_of_a_run_that_has_its_folder_says_how_to_resume(workplace, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(session, "_wait_to_see", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit, match="75"):
            run(ERM, [*SHORT[2:], "--optim.epochs", "1"])
    said = capsys.readouterr().out
    assert "stopped by SIGTERM after step 0; resume with: " in said
    assert said.endswith(" --run runs/digits-erm-1 --resume\n")
    run(ERM, ["--resume"])
    assert len(rows(workplace / "runs/digits-erm-1")) == 1


def test_a_run_that_another_process_begins_meanwhile_has_not_begun_before(workplace, monkeypatch):
    def meet(*arguments):
        Path("runs/a").mkdir(parents=True)
        Path("runs/a/config.yaml").write_text("about: {method: erm}\n")
        return original(*arguments)

    original = session.make_accelerator
    monkeypatch.setattr(session, "make_accelerator", meet)
    run(ERM, [*SHORT[2:], "--optim.epochs", "1", "--resume", "--run", "runs/a"])
    assert len(rows(workplace / "runs/a")) == 1


def test_a_finished_run_whose_checkpoints_were_removed_is_left_as_it_is(workplace, capsys):
    run(ERM, [*SHORT[2:], "--optim.epochs", "1", "--run", "runs/a"])
    shutil.rmtree("runs/a/checkpoints")
    left = {path: path.read_bytes() for path in Path("runs/a").rglob("*") if path.is_file()}
    run(ERM, ["--resume", "--run", "runs/a"])
    said = capsys.readouterr().out
    assert f" classes, 1 epoch of {STEPS} steps, " in said
    assert "runs/a is finished: it has its 1 epoch (more with --optim.epochs)" in said
    with pytest.raises(SystemExit, match="2"):
        run(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "2"])
    assert "runs/a is finished, and has no checkpoint to resume from any more" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("runs/a").rglob("*") if path.is_file()} == left


def test_a_signal_while_pretrained_weights_come_starts_nothing_from_random_ones(workplace, photos, monkeypatch, capsys):
    monkeypatch.setattr("timm.create_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    settings = ["--data", str(photos.root), "--model.backbone", "timm/resnet18", "--optim.epochs", "1"]
    with pytest.raises(SystemExit, match="75"):
        run(ERM, [*settings, "--run", "runs/a"])
    assert "stopped by SIGTERM before the first step" in capsys.readouterr().out
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(("before", "after"), [("hard", "ce"), ("ce", "hard")])
def test_a_run_is_not_resumed_with_a_method_that_its_checkpoint_does_not_fit(workplace, capsys, before, after):
    run(ERM, [*SHORT, "--method.objective", before, "--run", "runs/a"])
    left = {path: path.read_bytes() for path in Path("runs/a").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="2"):
        run(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "3", "--method.objective", after])
    assert "error: runs/a cannot be resumed with these settings of its method" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("runs/a").rglob("*") if path.is_file()} == left


def test_a_resumed_run_reads_as_many_shards_at_a_time_wherever_its_dataset_lies(workplace, monkeypatch):
    windows = []

    def windowed(streams, split, window):
        windows.append(window)
        return original(streams, split, 1 if window is None else window)  # None is some for a remote dataset

    original = session.windowed
    with monkeypatch.context() as patched:
        patched.setattr(session, "windowed", windowed)
        run(ERM, [*SHORT[2:], "--optim.epochs", "1", "--run", "runs/a"])
        run(ERM, ["--run", "runs/a", "--resume", "--optim.epochs", "2"])
    assert windows == [None, 1]
    config = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    assert (config["about"]["shard_window"], config["input"]["shard_window"]) == (1, None)


def test_a_resumed_run_keeps_the_loader_that_it_began_with_or_says_so(workplace, monkeypatch, capsys):
    def reported(*options: str) -> tuple[str, str]:
        run(ERM, [*options, "--run", "runs/a"])
        about = yaml.safe_load(Path("runs/a/config.yaml").read_text())["about"]
        return about["loader"], capsys.readouterr().out

    loader, _ = reported(*SHORT[2:], "--optim.epochs", "1", "--input.resident_gb", "0")
    assert loader == "dali"
    loader, said = reported("--resume", "--optim.epochs", "2", "--input.resident_gb", "1")
    assert (loader, "note: the run began" in said) == ("dali", False)
    assert "loader: dali (with which the run began)" in said
    monkeypatch.setattr("pipeline.loader.find_spec", lambda name: None)
    loader, said = reported("--resume", "--optim.epochs", "3", "--input.resident_gb", "0")
    assert loader == "torch"
    assert "note: the run began with the loader dali, whose pictures differ by rounding" in said


def test_a_damaged_newest_checkpoint_costs_its_steps_only(workplace, monkeypatch, capsys):
    settings = [*SHORT, "--loop.checkpoint_steps", "2", "--run"]
    run(ERM, [*settings, "runs/whole"])
    raise_at(monkeypatch, 5, signal.SIGTERM)
    with pytest.raises(SystemExit):
        run(ERM, [*settings, "runs/cut"])
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    assert sorted(path.name for path in Path("runs/cut/checkpoints").glob("step-*")) == [
        "step-00000004",
        "step-00000005",
    ]
    Path("runs/cut/checkpoints/step-00000005/state.pt").write_bytes(b"")
    run(ERM, ["--resume", "--run", "runs/cut"])
    reported = capsys.readouterr()
    assert "warning: runs/cut/checkpoints/step-00000005 is damaged" in reported.err
    assert "after epoch 0 and 4 of 8 steps" in reported.out
    assert_alike(workplace / "runs/whole", workplace / "runs/cut")


def test_minutes_without_a_checkpoint_make_one(workplace, monkeypatch):
    saved = []
    save = Training._save
    monkeypatch.setattr(Training, "_save", lambda self: (saved.append(self._counters.step), save(self)))
    run(ERM, [*SHORT[2:], "--optim.epochs", "1", "--loop.checkpoint_minutes", "1e-9"])
    assert saved == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_checkpoint_that_is_due_at_the_end_of_an_epoch_is_made(workplace, monkeypatch):
    saved = []
    save = Training._save
    monkeypatch.setattr(Training, "_save", lambda self: (saved.append(self._counters.step), save(self)))
    run(ERM, [*SHORT, "--optim.epochs", "3", "--loop.checkpoint_steps", "8", "--loop.checkpoint_every", "99"])
    assert saved == [8, 16, 24]


class LateConsensus(Consensus):
    """Of one process, but one call late, as among several."""

    def __init__(self, processes: int) -> None:
        super().__init__(processes)
        self.said: tuple[int, ...] | None = None

    def __call__(self, *numbers: int) -> list[int]:
        previous, self.said = self.said, numbers
        return list(previous or [0] * len(numbers))

    def wait(self) -> list[int] | None:
        previous, self.said = self.said, None
        return list(previous) if previous else None


def test_signals_to_every_process_of_a_job_stop_no_worker_of_the_torch_loader(workplace, signalled):
    """Slurm, systemd and Ctrl-C signal them all; several ranks then need one batch more."""
    program = (
        "from tests.train.test_resume import *; loop.Consensus = LateConsensus;"
        f" run(ERM, {[*SHORT[2:], '--optim.epochs', '500', '--run', 'runs/cut', '--input.loader', 'torch']})"
    )
    begun, numbers = Path("runs/cut/metrics.jsonl"), (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    status, said = signalled(["-c", program], begun, numbers)
    assert status == EXIT_STATUS, said
    assert "after step" in said


@pytest.mark.parametrize("consensus", [Consensus, LateConsensus])
@pytest.mark.parametrize("during", ["evaluate", "save_checkpoint"])
def test_a_signal_at_the_end_of_the_last_epoch_is_heard(workplace, monkeypatch, capsys, consensus, during):
    original = getattr(loop, during)

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(loop, "Consensus", consensus)
    monkeypatch.setattr(loop, during, signalled)
    with pytest.raises(SystemExit, match="75"):
        run(ERM, [*SHORT[2:], "--optim.epochs", "1", "--run", "runs/a"])
    assert f"stopped by SIGTERM after step {STEPS}, with a checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("due", [7, 8])
def test_several_ranks_make_a_checkpoint_that_is_due_near_the_end_of_an_epoch(workplace, monkeypatch, due):
    saved = []
    save = Training._save
    monkeypatch.setattr(loop, "Consensus", LateConsensus)
    monkeypatch.setattr(Training, "_save", lambda self: (saved.append(self._counters.step), save(self)))
    every = ["--loop.checkpoint_steps", str(due), "--loop.checkpoint_every", "99"]
    run(ERM, [*SHORT[2:], "--optim.epochs", "2", *every])
    assert saved == {7: [8, 15, 16], 8: [8, 16]}[due]


def test_a_second_ctrl_c_leaves_at_once():
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)  # what schedulers repeat does not
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.received == signal.SIGTERM


def _compute_in_foreign_code(path: str, begun) -> None:
    with open(path, "w") as log, contextlib.redirect_stderr(log), Interrupts():
        begun.set()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, in which no handler of Python's runs


def test_in_a_long_step_ctrl_c_says_what_is_waited_for_and_a_second_ends_it(tmp_path):
    context = multiprocessing.get_context("forkserver")
    begun = context.Event()
    process = context.Process(target=_compute_in_foreign_code, args=(str(tmp_path / "log"), begun), daemon=True)
    process.start()
    assert begun.wait(60)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    deadline = time.monotonic() + 60
    while "SIGINT: finishing this step" not in (said := (tmp_path / "log").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert said.endswith(f"; Ctrl-C again, or kill -INT {process.pid}, stops at once\n")
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGINT


def _work_at_a_terminal(terminal: str, ignored: bool, begun) -> None:
    os.setsid()
    opened = os.open(terminal, os.O_RDWR)  # the first one of a session is its terminal
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    os.dup2(opened, 1)
    with Interrupts() as interrupts:
        begun.set()
        deadline = time.monotonic() + (1 if ignored else 60)
        while not interrupts.received and time.monotonic() < deadline:
            time.sleep(0.01)
        if not ignored:
            os.write(1, b"stopped")  # an OSError where it still goes to the terminal
    sys.exit(interrupts.received)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_stops_cleanly_unless_nohup_was_asked_for(ignored):
    terminal, users = os.openpty()
    context = multiprocessing.get_context("forkserver")
    begun = context.Event()
    process = context.Process(target=_work_at_a_terminal, args=(os.ttyname(users), ignored, begun), daemon=True)
    process.start()
    assert begun.wait(60)
    os.close(users)
    os.close(terminal)
    process.join(60)
    assert process.exitcode == (0 if ignored else signal.SIGHUP)


def test_a_pipe_whose_reader_hung_up_is_left_too():
    reader, writer = os.pipe()
    output = os.dup(1)
    os.dup2(writer, 1)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever tests under nohup ignores it
    try:
        with Interrupts():
            os.close(reader)
            signal.raise_signal(signal.SIGHUP)
            os.write(1, b"stopped")  # an OSError where it still goes into the pipe
    finally:
        signal.signal(signal.SIGHUP, before)
        os.dup2(output, 1)
        os.close(output)
        os.close(writer)


def _hold(run_folder: str, begun) -> None:
    runs.lock(Path(run_folder))
    begun.set()
    time.sleep(600)


def test_a_run_that_is_in_use_is_not_touched_and_a_killed_one_is_free(workplace, capsys):
    run(ERM, [*SHORT, "--run", "runs/a"])
    before = {path: path.stat().st_mtime_ns for path in Path("runs/a").rglob("*")}
    context = multiprocessing.get_context("forkserver")
    begun = context.Event()
    process = context.Process(target=_hold, args=(str(workplace / "runs/a"), begun), daemon=True)
    process.start()
    assert begun.wait(60)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "3"])
    assert f"error: runs/a is in use by process {process.pid} on " in capsys.readouterr().err
    with pytest.raises(UserError, match="is in use by process"):
        runs.use_run(Path("runs/a"), resume=True)
    assert {path: path.stat().st_mtime_ns for path in Path("runs/a").rglob("*") if path.name != ".lock"} == before
    process.kill()
    process.join()
    run(ERM, ["--resume", "--run", "runs/a", "--optim.epochs", "3"])
    assert len(rows(workplace / "runs/a")) == 3
    assert not Path("runs/a/.lock").exists()


def test_a_lock_file_that_is_removed_while_another_waits_for_it_locks_nobody_out(tmp_path, monkeypatch):
    flock, removed = runs.fcntl.flock, []

    def remove_once(file, how):
        flock(file, how)
        if not removed:
            removed.append((tmp_path / ".lock").unlink())

    monkeypatch.setattr(runs.fcntl, "flock", remove_once)
    runs.lock(tmp_path)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    runs.unlock()
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_trains_without(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", refuse)
    runs.lock(tmp_path)
    runs.unlock()


def test_the_printed_command_can_be_pasted(workplace):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    settings = [*SHORT, "--data", "data/digits", "--run", "runs/a b", "--optim.epochs", "1000"]
    training = subprocess.Popen(
        [sys.executable, os.path.relpath(ROOT / "train/erm.py"), *settings],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        lines = iter(training.stdout.readline, "")
        next(line for line in lines if line.startswith("epoch"))
        training.terminate()
        (stopped,) = [line for line in lines if line.startswith("stopped by SIGTERM")]
        assert training.wait(60) == EXIT_STATUS
    finally:
        training.kill()
    command = stopped.partition("; resume with: ")[2].strip()
    assert command.endswith("train/erm.py --data data/digits --run 'runs/a b' --resume")
    done = len(rows(workplace / "runs/a b"))
    subprocess.run(f"{command} --optim.epochs {done + 1}", shell=True, env=environment, check=True, capture_output=True)
    assert len(rows(workplace / "runs/a b")) == done + 1


def test_one_process_agrees_with_itself_at_once():
    consensus = Consensus(1)
    assert consensus(15, True) == [15, True]
    assert consensus.wait() is None


def _train(folder: str, argv: list[str], begun) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    begun.set()
    run(ERM, argv)


def test_kill_9_at_twenty_random_moments_changes_nothing(workplace):
    # Bit for bit needs the same number of threads in this process and in those that are killed.
    settings = [*SHORT, "--loop.threads", "1", "--loop.checkpoint_steps", "1", "--run"]
    run(ERM, [*settings, "runs/whole"])
    context = multiprocessing.get_context("forkserver")
    moments = random.Random(0)
    kills = last = 0
    while kills < 20 or not (workplace / f"runs/{last}/summary.json").exists():
        last += (workplace / f"runs/{last}/summary.json").exists()  # it ended between two kills: another
        begun = context.Event()
        process = context.Process(
            target=_train, args=(str(workplace), [*settings, f"runs/{last}", "--resume"], begun), daemon=True
        )
        process.start()
        assert begun.wait(60)
        process.join(moments.uniform(0, 0.7) if kills < 20 else 60)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills == 20
    for number in range(last + 1):
        assert_alike(workplace / "runs/whole", workplace / f"runs/{number}")
        assert not list(workplace.glob(f"runs/{number}/**/.*"))
