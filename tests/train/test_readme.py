"""What the README shows is what runs: a method and an objective of one's own, and every command's words and options."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_networks import images

import tailstream
from pipeline.batch import Batch
from train.engine.method import Progress
from train.engine.objectives import make_objective

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
        r"does not exist|there is no dataset|no finished run|no .*run|is not a folder|is missing|not a run|holds no",
        error,
    ), error
    assert "see --help" not in error
    assert "unrecognized" not in error
