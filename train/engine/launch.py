"""The command line of a launchable file: read at once, and then run.

    python train/bbn.py --optim.lr 0.2
          │ the page imports nothing that imports torch, which takes seconds
          ├─ run(BBN) ── --help, or a setting that does not exist: answered here
          └─ train/engine/session.py, and torch with it: the run

So launchable files import what needs torch inside the functions that use it, and for the type check alone at their top.
A method from elsewhere may import what it likes; its --help then takes as long.
"""

import os
import sys
from pathlib import Path

from shards.cli import program_name
from shards.errors import user_errors_exit_2
from train.engine import runs
from train.engine.config import Input, Loop, Model, Optim, make_parser, peek
from train.engine.method import Method


def run(method_class: type[Method], argv: list[str] | None = None) -> None:
    """Run a method from its command line: the whole of what a launchable file does.

    Exits with 2 for a user's mistake, in one line, and with 75 when a signal stopped it.
    """
    module = sys.modules[method_class.__module__]
    source = getattr(module, "__file__", None) or sys.argv[0]  # none in a notebook
    ours = Path(source).parent == Path(__file__).parents[1]
    # From Python, with a command line of its own, the method's file is what would be started.
    script = sys.argv[0] if argv is None else os.path.relpath(source)
    usual = f"train/{method_class.name}.py" if ours else Path(script).name
    program = program_name(usual, f"train {method_class.name}")
    words = [script] if program == usual else program.split()
    parser = make_parser(
        program,
        (module.__doc__ or "").split("\n")[0],
        input=Input,
        model=Model,
        method=method_class.Settings,
        optim=Optim,
        loop=Loop,
    )
    parser.add_argument("--resume", action="store_true", help="resume --run, or the newest unfinished run")
    parser.add_argument("--variant", type=str | None, help="of the dataset's preset, such as 2x or glag")
    parser.add_argument("--dry-run", action="store_true", help="say what the run takes, write nothing, and end")
    with user_errors_exit_2(program, each_line=True):
        asked = peek(parser, argv)
        from train.engine.interrupts import EXIT_STATUS, Interrupted, Stops
        from train.engine.session import train

        try:
            with Stops():  # until the first step, and after the last one
                train(method_class, parser, argv, asked, words)
        except Interrupted as interrupted:
            if os.environ.get("RANK", "0") == "0":
                print(f"stopped by {interrupted.signal} before the first step; give the same command again", flush=True)
            sys.exit(EXIT_STATUS)
        finally:
            runs.unlock()
