"""The tailstream command: which program a word starts, from where, and how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tailstream

ROOT = Path(__file__).parents[2]


def run(where: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts/tailstream.py", *words],
        cwd=where,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_every_program_has_its_word():
    launchable = {path.stem for path in (ROOT / "train").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    words = {program.module for program in (*tailstream.COMMANDS.values(), *tailstream.METHODS.values())}
    assert {f"train.{name}" for name in launchable} <= words
    assert {f"{room}.__main__" for room in ("shards", "analysis")} <= words


@pytest.mark.parametrize("program", [*tailstream.COMMANDS.values(), *tailstream.METHODS.values()])
def test_every_word_names_what_exists(program):
    if program.module:
        module = __import__(program.module, fromlist=["x"])
        assert callable(getattr(module, program.function))
        assert program.method is None or isinstance(getattr(module, program.method), type)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a command; tailstream --help lists them"),
        (["biuld", "digits"], "there is no command 'biuld'; did you mean build? there are: build, verify, "),
        (["--data", "x"], "there is no command '--data'; there are: build, "),
        (["train"], "give a method: tailstream train bbn | erm | "),
        (["train", "BBN"], "there is no method 'BBN'; did you mean bbn? there are: bbn, erm, "),
        (["train", "xyz"], "there is no method 'xyz'; there are: bbn, erm, "),
    ],
)
def test_unknown_words_are_refused_at_once(tmp_path, words, message):
    done = run(tmp_path, *words, PYTHONPROFILEIMPORTTIME="1")
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert error.startswith(f"tailstream: error: {message}")
    assert any(line.endswith("importlib.metadata") for line in imports)
    assert not any(name in line for line in imports for name in ("torch", "numpy", "jsonargparse"))


def test_help_names_every_word(tmp_path):
    for words in (["--help"], ["-h"], ["help"], ["train", "--help"]):
        done = run(tmp_path, *words)
        assert done.returncode == 0
        assert all(f"  {word} " in done.stdout for word in (*tailstream.COMMANDS, *tailstream.METHODS))
    assert run(tmp_path, "--version").stdout.startswith("tailstream ")


def test_it_is_the_program_itself_under_its_own_name(tmp_path):
    done = run(tmp_path, "build", "digits", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "next: tailstream train bbn --data data/digits" in done.stdout
    (tmp_path / "data/digits/train-000000.tar").unlink()
    broken = run(tmp_path, "verify", "data/digits", "--workers", "1")
    assert broken.returncode == 1
    wrong = run(tmp_path, "inspect", "data/digits", "--worker", "1")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("tailstream: error: ")
    wrong = run(tmp_path, "train", "bbn", "--data", "nowhere")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("tailstream train bbn: error: nowhere does not exist")


def test_the_home_folder_is_known_behind_an_equals_sign(tmp_path):
    assert run(tmp_path, "build", "digits", "--workers=1", "--out=~/made", HOME=f"{tmp_path}/home").returncode == 0
    assert (tmp_path / "home/made/dataset.json").exists()
    wrong = run(tmp_path, "train", "bbn", "--data=~/nowhere", HOME=f"{tmp_path}/home")
    assert wrong.stderr.startswith(f"tailstream train bbn: error: {tmp_path}/home/nowhere does not exist")


def test_a_loss_of_ones_own_is_found_in_the_folder_one_is_in(tmp_path):
    (tmp_path / "my_losses.py").write_text("raise SystemExit('mine')\n")
    run(tmp_path, "build", "digits", "--workers", "1")
    done = run(tmp_path, "train", "erm", "--method.objective", "my_losses.Poly")
    assert done.stderr.strip().endswith("mine")


def test_a_folder_with_rooms_of_its_own_does_not_take_their_place(tmp_path):
    for room in ("analysis", "shards", "train"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise RuntimeError('the wrong room')\n")
    done = run(tmp_path, "compare", "nowhere", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr.strip()) == (
        2,
        "tailstream: error: nowhere is not a folder; name the folder of a run",
    )
