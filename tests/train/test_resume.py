"""Cut off at any moment, by a signal or by kill -9, a run that is resumed ends as if nothing had been."""

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.bbn import BBN
from train.engine.interrupts import EXIT_STATUS, Consensus, Interrupts
from train.engine.launch import run
from train.engine.loop import Training
from train.erm import ERM

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
    assert (
        f"stopped by {signal.Signals(number).name} after step {step}, with a checkpoint; go on with: train/bbn.py"
        in (capsys.readouterr().out)
    )
    assert (workplace / f"runs/cut/checkpoints/step-{step:08d}").is_dir()
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    run(BBN, ["--resume", "--run", "runs/cut"])
    assert_alike(workplace / "runs/whole", workplace / "runs/cut")
    within = f" and {step % STEPS} of {STEPS} steps" if step % STEPS else ""
    assert f"resuming runs/cut after epoch {step // STEPS}{within}\n" in capsys.readouterr().out


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
    told = capsys.readouterr()
    assert "warning: runs/cut/checkpoints/step-00000005 is damaged" in told.err
    assert "after epoch 0 and 4 of 8 steps" in told.out
    assert_alike(workplace / "runs/whole", workplace / "runs/cut")


def test_minutes_without_a_checkpoint_make_one(workplace, monkeypatch):
    saved = []
    save = Training._save
    monkeypatch.setattr(Training, "_save", lambda self: (saved.append(self._counters.step), save(self)))
    run(ERM, [*SHORT[2:], "--optim.epochs", "1", "--loop.checkpoint_minutes", "1e-9"])
    assert saved == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_second_ctrl_c_leaves_at_once():
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.received == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)  # what schedulers repeat does not
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.received == signal.SIGTERM


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
    settings = [*SHORT, "--loop.checkpoint_steps", "1", "--run"]
    run(ERM, [*settings, "runs/whole"])
    context = multiprocessing.get_context("forkserver")
    moments = random.Random(0)
    kills = runs = 0
    while kills < 20 or not (workplace / f"runs/{runs}/summary.json").exists():
        runs += (workplace / f"runs/{runs}/summary.json").exists()  # it ended between two kills: another
        begun = context.Event()
        process = context.Process(
            target=_train, args=(str(workplace), [*settings, f"runs/{runs}", "--resume"], begun), daemon=True
        )
        process.start()
        assert begun.wait(60)
        process.join(moments.uniform(0, 0.7) if kills < 20 else 60)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills == 20
    for number in range(runs + 1):
        assert_alike(workplace / "runs/whole", workplace / f"runs/{number}")
        assert not list(workplace.glob(f"runs/{number}/**/.*"))
