import multiprocessing
import shutil
from multiprocessing import forkserver

import pytest
import torch
from accelerate.state import AcceleratorState

from train.engine.config import Config, Input, Loop, Model, Optim
from train.engine.launch import run as run_stage_one
from train.erm import ERM

# Processes of tests are forked from a server that has imported everything. A session has one such server, so it starts
# before a loader starts it with less.
multiprocessing.set_forkserver_preload(
    ["train.bbn", "train.erm", "train.engine.session", "pipeline.dali_loader", "pipeline.torch_loader"]
)
forkserver.ensure_running()


@pytest.fixture(autouse=True)
def own_accelerator_state():
    """Every test starts as a fresh process would."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def workplace(tmp_path, monkeypatch, digits):
    """An empty folder to run in, with the digits under data/ and a preset that takes seconds."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits.root)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def stage_one(tmp_path_factory, digits):
    """A short finished run of stage one on the digits."""
    folder = tmp_path_factory.mktemp("stage") / "ce"
    arguments = ["--data", str(digits.root), "--run", str(folder), "--optim.epochs", "3", "--optim.lr", "0.02"]
    run_stage_one(ERM, [*arguments, "--input.batch_size", "32"])
    return folder


@pytest.fixture
def here(workplace, stage_one):
    """A workplace with that run under runs/."""
    shutil.copytree(stage_one, workplace / "runs/ce")
    shutil.rmtree(workplace / "runs/ce/features", ignore_errors=True)
    return workplace


@pytest.fixture
def make_method():
    """Make a method with settings of its own for small images: make_method(BBN, train_counts_C, q=0.0)."""

    def make(method_class, train_counts_C, model=None, **settings):
        torch.manual_seed(0)
        config = Config(Input(), Model(**(model or {})), method_class.Settings(**settings), Optim(), Loop())
        return method_class(config, train_counts_C)

    return make


@pytest.fixture
def in_tukey_space(monkeypatch):
    """Leave generated features where they are Gaussian."""
    monkeypatch.setattr("train.features.generation.inverse_tukey_", lambda samples_MD, lam: samples_MD)
