"""How this project's command lines look: --kebab-case options, plain --flags, errors on one line."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, auto_cli

from shards.errors import user_errors_exit_2


class Parser(ArgumentParser):
    """jsonargparse's parser with options spelled --like-this, --flag and --no-flag for booleans."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, allow_abbrev=False, **options)

    def add_argument(self, *names: str, **options: Any) -> Any:  # noqa: D102
        kebab = [name.replace("_", "-") if name.startswith("--") else name for name in names]
        if options.get("type") is bool:
            del options["type"]
            options["action"] = ActionYesNo(no_prefix="no-")
        return super().add_argument(*kebab, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        key = re.search(r'key "([\w.]+)"', message)
        value = re.search(r"value: (.*)\s*$", message)
        if key and value:
            message = f"--{key[1].replace('_', '-')} cannot be {value[1]!r}"
        if unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            near = similar(unknown[1], _options(self))
            message += f"; did you mean {' or '.join(near)}?" if near else ""
        message = re.sub(r"(required: )\w+\.", r"\1", " ".join(message.split())).rstrip(".")
        more = " (see --help)" if message.endswith("?") else "; see --help"
        print(f"{self.prog.split(' [')[0]}: error: {message}{more}", file=sys.stderr)
        sys.exit(2)


def similar(unknown: str, options: Iterable[str]) -> list[str]:
    """Return the options that an unknown one may be meant for: those with all of its words, or one spelt alike."""
    words = set(unknown.strip("-").split("-"))
    return [option for option in options if words <= set(option.strip("-").split("-"))] or difflib.get_close_matches(
        unknown, options, 1, 0.7
    )


def _options(parser: ArgumentParser) -> list[str]:
    """Return the options of a parser and of its commands, but for --help and the like."""
    found = [name for name in parser._option_string_actions if name.startswith("--") and name != "--help"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [name for command in action.choices.values() for name in _options(command)]
    return list(dict.fromkeys(found))


def program_name(usual: str, words: str = "") -> str:
    """Return what this program is called in its messages: `usual`, or `tailstream` with the words that start it."""
    return f"tailstream {words}".rstrip() if Path(sys.argv[0]).stem == "tailstream" else usual


def run_commands(program: str, commands: dict[str, Any], argv: list[str] | None = None) -> Any:
    """Run the function that the command line names and return its result; a UserError exits with status 2."""
    try:
        with user_errors_exit_2(program):
            result = auto_cli(commands, args=None if argv is None else list(argv), prog=program, parser_class=Parser)
            sys.stdout.flush()
            return result
    except BrokenPipeError:  # whoever reads the output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
