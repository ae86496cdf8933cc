"""The `tailstream` command: what `python -m shards`, `train/METHOD.py` and the others do, from any folder.

    tailstream build folder --source ~/birds --out data/birds
    tailstream train bbn --data data/birds --run runs/birds
    accelerate launch --num_processes 8 --no_python tailstream train bbn          the same on eight GPUs

From a folder that has an `analysis/` of its own, `python -m analysis` would run what lies there; this always runs ours.
Options, messages and exit statuses are those of the program that a word stands for, which is loaded only then: an
unknown word is refused at once.
"""

import difflib
import importlib
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, NoReturn

HERE = Path(__file__).resolve().parent


class Program(NamedTuple):
    """What a word stands for.

    Attributes:
        module: where its code is.
        help: what it does, in a line.
        function: of the module, called with the command line's other words.
        keeps_word: whether the word itself is the first of these.
        method: the class in `module` that `function` is given first, for methods of the common loop.
    """

    module: str
    help: str
    function: str = "main"
    keeps_word: bool = False
    method: str | None = None


COMMANDS = {
    "build": Program("shards.__main__", "make a dataset from images: folder, csv, digits, cifar10, …", keeps_word=True),
    "verify": Program("shards.__main__", "read a dataset again and compare it with its manifest", keeps_word=True),
    "inspect": Program("shards.__main__", "show a dataset's splits, its tail and its duplicates", keeps_word=True),
    "preview": Program("pipeline.preview", "draw what the network sees of a dataset"),
    "train": Program("", "train a model, or a second stage on one; METHOD is one of those below"),
    "report": Program("analysis.__main__", "write a page about finished runs", keeps_word=True),
    "compare": Program("analysis.__main__", "tabulate finished runs: mean and spread over seeds", keeps_word=True),
    "figure": Program("analysis.__main__", "draw one figure of finished runs as a file", keeps_word=True),
    "ensemble": Program("analysis.__main__", "evaluate several runs as one classifier", keeps_word=True),
    "predict": Program("train.predict", "say what new images show"),
    "calibrate": Program("train.calibrate", "fit a model's probabilities to its val split"),
    "export": Program("train.export", "write a model as one ONNX or PyTorch file"),
    "card": Program("train.card", "write a model card"),
}
METHODS = {
    "bbn": Program("train.bbn", "the bilateral-branch network", "run", method="BBN"),
    "erm": Program(
        "train.erm", "one branch: plain cross-entropy (CE), or another loss and sampler", "run", method="ERM"
    ),
    "sdn": Program("train.sdn", "the strong-weak dual-branch network", "run", method="SDN"),
    "afg": Program("train.afg", "second stage: features generated for the tail", "run"),
    "frozen": Program("train.frozen", "stage one without training: a pretrained network and its class means", "run"),
    "decouple": Program("train.decouple", "second stage: cRT, LWS, tau-normalisation and other classifiers", "run"),
}


def usage() -> str:
    """Return what --help prints."""
    lines = ["usage: tailstream COMMAND …          (tailstream COMMAND --help explains each)", ""]
    lines += [f"  {word:<10} {program.help}" for word, program in COMMANDS.items()]
    lines += ["", "METHOD of tailstream train METHOD …:", ""]
    lines += [f"  {word:<10} {program.help}" for word, program in METHODS.items()]
    return "\n".join(lines)


def refuse(message: str) -> NoReturn:
    """Print one line and exit with status 2."""
    print(f"tailstream: error: {message}", file=sys.stderr)
    sys.exit(2)


def choose(what: str, word: str, known: dict[str, Program]) -> Program:
    """Return the program of a word, or say which words there are, and exit with status 2."""
    if word in known:
        return known[word]
    near = difflib.get_close_matches(word.lower(), known, 1)
    guess = f"did you mean {near[0]}? " if near else ""
    refuse(f"there is no {what} {word!r}; {guess}there are: {', '.join(known)}")


def main() -> None:
    """Run the command line's program."""
    words = sys.argv[1:]
    if words[:1] in (["--help"], ["-h"], ["help"]) or words in (["train", "--help"], ["train", "-h"]):
        print(usage())
        return
    if words == ["--version"]:
        print(f"tailstream {version('tailstream')}")
        return
    if not words:
        refuse("give a command; tailstream --help lists them")
    word, *rest = words
    program = choose("command", word, COMMANDS)
    if word == "train":
        if not rest:
            refuse(f"give a method: tailstream train {' | '.join(METHODS)}")
        word, *rest = rest
        program = choose("method", word, METHODS)
    if HERE.name == "scripts":
        # A checkout: ours come before what a PYTHONPATH has, which may name a folder with an analysis/ of its own.
        sys.path.insert(0, str(HERE.parent))
    # Last: my_losses.Poly is found in the folder one is in, and nothing that lies there takes another's place.
    sys.path.append(os.getcwd())
    module = importlib.import_module(program.module)
    first = [getattr(module, program.method)] if program.method else []
    getattr(module, program.function)(*first, [word, *rest] if program.keeps_word else rest)


if __name__ == "__main__":
    main()
