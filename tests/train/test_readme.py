"""What the README shows is what runs: a method and an objective of one's own, and every command's words and options."""

import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_networks import images

import tailstream
from pipeline.augment import find_recipe
from pipeline.batch import Batch
from train import afg, decouple
from train.bbn import BBN
from train.engine.config import PRESETS, Input, Loop
from train.engine.method import Progress
from train.engine.mixing import make_mixing
from train.engine.model import Model, make_adapter
from train.engine.objectives import make_objective
from train.engine.optimisers import Optim
from train.engine.weights import make_weighting
from train.erm import ERM
from train.features.commands import ClassifierOptim, Extraction
from train.networks.timm_models import own_view
from train.sdn import SDN

README = Path(__file__).parents[2] / "README.md"
IMPORTS = """
from dataclasses import dataclass
from torch.nn import functional as F
from pipeline.plan import Stream
from train.engine.launch import run
from train.engine.method import Method, StepResult
from train.engine.objectives import CrossEntropy
from train.networks.networks import build_network
"""


def block(name: str) -> str:
    """Return the README's Python block that begins with this file's name."""
    (found,) = re.findall(rf"```python\n(# {name}.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return IMPORTS + found


def test_the_objective(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(block("my_losses.py"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    objective = make_objective("my_losses.Poly(epsilon=2)", np.array([3, 1]))
    z, labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    p = torch.tensor([torch.e / (torch.e + 1), 0.5])
    torch.testing.assert_close(objective.losses(z, labels, Progress(1, 1, 0, 0)), -p.log() + 2 * (1 - p))


def test_the_method(make_method):
    names: dict = {"__name__": "my_method"}
    exec(compile(block("my_method.py"), "my_method.py", "exec"), names)
    method = make_method(names["Mine"], np.array([3, 1]), share=0.0)
    batch = {name: Batch(images(2), torch.tensor([0, 1]), np.arange(2)) for name in ("head", "tail")}
    assert method.step(batch, Progress(1, 1, 0, 0)).loss.isfinite()


def commands() -> list[list[str]]:
    """Return the words of each tailstream command in the README, from blocks and from tables."""
    text = README.read_text(encoding="utf-8")
    lines = re.findall(r"^tailstream (.*?)(?: +#.*)?$", text, re.MULTILINE) + re.findall(r"`tailstream (.+?)`", text)
    return [shlex.split(line) for line in lines]


COUNTS = np.array([300, 40, 3])
# What only a method looks at, when there is a dataset.
LOOKED_UP = {
    "method.objective": lambda text: make_objective(text, COUNTS),
    "method.mix": make_mixing,
    "method.weights": make_weighting,
    "model.adapt": make_adapter,
    "model.backbone": own_view,
    "augment": find_recipe,
    "input.augment": find_recipe,
}
SECTIONS = {
    "input": (Input, Extraction),
    "model": (Model,),
    "method": (BBN.Settings, ERM.Settings, SDN.Settings, afg.Settings, decouple.Settings),
    "optim": (Optim, ClassifierOptim),
    "loop": (Loop,),
}


def settings() -> list[tuple[str, str]]:
    """Return the settings that the README names with a value, on command lines and alone, but for its own examples'."""
    text = README.read_text(encoding="utf-8")
    found = re.findall(r'--((?:\w+\.\w+|augment)) ("[^"]*"|[^\s`]+)', text)
    (mixes,) = re.findall(r"^.*--method\.mix .*$", text, re.MULTILINE)
    found += [("method.mix", name) for name in re.findall(r'`("?\w+(?:\([^)]*\))?"?)`', mixes)]
    given = {(key, value.strip('"')) for key, value in found}
    return sorted((key, value) for key, value in given if "my_" not in value and key != "method.share")


def test_the_settings_are_found():
    assert len(settings()) > 30
    assert {key for key, _ in settings()} >= LOOKED_UP.keys()


@pytest.mark.parametrize(("key", "value"), settings())
def test_a_setting_of_the_readme_is_there_and_can_have_its_value(key, value):
    if key in LOOKED_UP:
        LOOKED_UP[key](value)
    section, _, name = key.rpartition(".")
    assert not section or name in {field.name for kind in SECTIONS[section] for field in fields(kind)}


def test_variants_of_the_readme_are_of_some_preset():
    presets = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in PRESETS.glob("*.yaml")]
    known = {*afg.VARIANTS, *(name for preset in presets for name in preset.get("variants", {}))}
    named = set(re.findall(r"--variant (\w+)", README.read_text(encoding="utf-8")))
    assert {"ldam", "glag", "2x"} <= named <= known


def test_the_commands_are_found():
    assert len(commands()) > 40
    assert {words[0] for words in commands()} >= set(tailstream.COMMANDS) - {"train"}
    assert {words[1] for words in commands() if words[0] == "train"} >= set(tailstream.METHODS)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_is_understood(words, tmp_path, monkeypatch, capsys):
    """In an empty folder each goes as far as missing what it works on: that is after its options are understood."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("optim: {epochs: 3}\n")
    monkeypatch.setattr(sys, "argv", ["tailstream", *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    if words[:2] == ["build", "cifar100"]:
        words += ["--source", "nowhere"]
        sys.argv += ["--source", "nowhere"]
    with pytest.raises(SystemExit) as ended:
        tailstream.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(
        r"does not exist|there is no (dataset|finished|unfinished)|is not a folder|is missing|not a run|holds no",
        error,
    ), error
    assert "see --help" not in error
    assert "unrecognized" not in error
