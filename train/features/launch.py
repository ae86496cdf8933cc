"""The command line of a second stage, read before torch is imported: see train/engine/launch.py."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shards.cli import program_name
from shards.errors import user_errors_exit_2
from train.engine import runs
from train.engine.config import peek
from train.features.commands import Program

if TYPE_CHECKING:
    from train.features.stage_two import Stage


def run_stage(program: Program, train: "Callable[[Stage], None]", argv: list[str] | None) -> None:
    """Run a second stage from its command line; exits with 2 for a user's mistake, with 75 after a signal."""
    begun: list[Path] = []
    with user_errors_exit_2(program_name(f"train/{program.name}.py", f"train {program.name}"), each_line=True):
        asked = peek(program.parser, argv)
        from train.engine.guards import errors_in_one_line
        from train.engine.interrupts import EXIT_STATUS, Interrupted, Stops
        from train.engine.machine import started_by
        from train.features.stage_two import open_stage

        try:
            with Stops(), errors_in_one_line(begun, "lower optim.batch_size, reference.batch_size or input.batch_size"):
                stage = open_stage(program, argv, asked, begun)
                if stage is not None:
                    train(stage)
        except Interrupted as interrupted:
            again = f"resume with: {started_by(program.name)} {runs.resuming(begun[0])}" if begun else "start again"
            if (export := getattr(asked, "export", None)) and not Path(export).exists():
                again += f" --export {shlex.quote(str(export))}"
            if os.environ.get("RANK", "0") == "0":
                print(
                    f"stopped by {interrupted.signal}; features and classifiers that were finished are kept; {again}",
                    flush=True,
                )
            sys.exit(EXIT_STATUS)
        finally:
            runs.unlock()
