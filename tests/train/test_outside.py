"""A method from outside the project gets all that ours have: ranks, kills, resuming, its model."""

import importlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import on_ranks, rows

from train.engine.interrupts import EXIT_STATUS
from train.engine.launch import run
from train.engine.loop import Training
from train.networks.model_files import load_model

SETTINGS = ["--input.batch_size", "48", "--input.image_size", "8", "--input.augment", "none", "--optim.epochs", "2"]
SETTINGS += ["--optim.lr", "0.001", "--loop.eval_every", "1", "--loop.checkpoint_steps", "3"]
STEPS = 8  # an epoch, of 412 images


def _train_toy(rank: int, folder: str, argv: list[str], deadly_step: int | None = None, number: int = 9) -> None:
    sys.path.insert(0, folder)
    toy = importlib.import_module("toy_method").Toy
    original = Training._step

    def step(self, *arguments):
        if self._counters.step + 1 == deadly_step and rank == 1:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    Training._step = step
    run(toy, argv)


@pytest.fixture
def elsewhere(tmp_path_factory):
    """A folder outside the project that holds the method."""
    folder = tmp_path_factory.mktemp("elsewhere")
    source = Path(__file__).with_name("toy_method.py")
    (folder / source.name).write_bytes(source.read_bytes())
    return str(folder)


def test_a_method_from_outside_is_killed_resumed_and_exported_on_two_ranks(workplace, elsewhere):
    assert on_ranks(workplace, _train_toy, elsewhere, [*SETTINGS, "--run", "runs/whole"]) == [0, 0]
    # Killed in the second epoch, after a checkpoint in its middle; then stopped once more.
    killed = on_ranks(workplace, _train_toy, elsewhere, [*SETTINGS, "--run", "runs/cut"], STEPS + 5)
    assert killed[1] == -signal.SIGKILL
    assert killed[0] != 0
    resumed = ["--resume", "--run", "runs/cut"]
    stopped = on_ranks(workplace, _train_toy, elsewhere, resumed, STEPS + 6, signal.SIGTERM)
    assert stopped == [EXIT_STATUS, EXIT_STATUS]
    assert "toy_method.py --run runs/cut --resume\n" in (workplace / "rank-0.log").read_text()
    assert on_ranks(workplace, _train_toy, elsewhere, resumed) == [0, 0]

    whole, cut = rows(workplace / "runs/whole"), rows(workplace / "runs/cut")
    for ours, theirs in zip(cut, whole, strict=True):
        assert ours["images"] == theirs["images"] == 48 * STEPS  # sums over both ranks, also over the kill
        for figure in ("loss", "head_loss", "recall"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-6)
    assert "right" not in whole[0]  # a sum that is no scalar is not logged
    assert "head_loss" in (workplace / "rank-0.log").read_text()  # and what is logged is printed

    model = load_model(workplace / "runs/cut")
    assert not any("head" in name for name in model.state_dict())
    final = load_file(workplace / "runs/whole/model.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, final[name])
    assert model.predict(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)).shape == (1, 10)


def test_what_a_method_keeps_is_in_the_checkpoint(workplace, elsewhere, monkeypatch):
    monkeypatch.syspath_prepend(elsewhere)
    toy = importlib.import_module("toy_method").Toy
    run(toy, [*SETTINGS, "--run", "runs/a"])
    (newest,) = sorted((workplace / "runs/a/checkpoints").glob("step-*"))[-1:]
    states = torch.load(newest / "state.pt", weights_only=True)
    assert states["method"]["weights"].shape == (10,)
    assert (states["method"]["weights"] != 1).any()


def test_parameter_groups_have_rates_of_their_own(workplace, elsewhere, monkeypatch):
    monkeypatch.syspath_prepend(elsewhere)
    toy = importlib.import_module("toy_method").Toy
    rates = []
    original = torch.optim.SGD.step

    def step(self, *arguments, **options):
        rates.append([group["lr"] for group in self.param_groups])
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run(
        toy,
        [*SETTINGS, "--run", "runs/a", "--optim.epochs", "1", "--optim.warmup_epochs", "0", "--loop.estimate", "false"],
    )
    assert rates == [[pytest.approx(0.001), pytest.approx(0.01)]] * STEPS
