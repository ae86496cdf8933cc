"""How this project's command lines look: --kebab-case options, plain --flags, errors on one line."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
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

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """Parse a command line, with --option=~/path in full."""
        return super().parse_args(at_home(sys.argv[1:] if args is None else args), *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with status 2."""
        message = " ".join(message.split())
        if wrong := wrong_value(message):
            message = f"{self._shown(wrong[0])} {wrong[1]}"
        if unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            near = similar(unknown[1], _options(self))
            message += f"; did you mean {' or '.join(near)}?" if near else ""
        if needed := re.search(r"required: (.*)$", message):
            names = [self._shown(name) for name in needed[1].rstrip(".").split(", ")]
            message = f"{message[: needed.start(1)]}{', '.join(names)}"
        message = message.rstrip(".")
        more = " (see --help)" if message.endswith("?") else "; see --help"
        print(f"{self.prog.split(' [')[0]}: error: {message}{more}", file=sys.stderr)
        sys.exit(2)

    def _shown(self, key: str) -> str:
        """Return an argument as one types it: an option with its dashes, a position as the help calls it."""
        name = key.replace("_", "-")
        while name:
            if f"--{name}" in _options(self):
                return f"--{name}"
            name = name.partition(".")[2]
        return key.rpartition(".")[2].upper()


# What jsonargparse says of a type, and what to give.
WANTED = {
    "PositiveInt": "a whole number of at least 1",
    "NonNegativeInt": "a whole number of at least 0",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number of at least 0",
    "ClosedUnitInterval": "a number from 0 to 1",
    "OpenUnitInterval": "a number above 0 and below 1",
    "Duration": "a time such as 90m, 2h or 1d12h",
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text; in a file, with quotes",
    "<class 'list'>": "a list such as [0.5, 0.75]",
}


def wrong_value(message: str) -> tuple[str, str] | None:
    """Return the key and a plain sentence where jsonargparse says that a value is not of its type, else None."""
    message = re.sub(r"Given value type: <class '\w+'>", "", message).replace("'NoneType'", "'null'")
    key = re.search(r'key "([\w.]+)"', message)
    value = (
        re.search(r"value: (.*)\s*$", message)
        or re.search(r"Not of type \w+: (\S+) does not conform", message)
        or re.search(r"(?:with base 10|to float): '(.*?)'", message)
        or re.search(r"argument must be .*, not '(\w+)'", message)
    )
    if not (key and value):
        return None
    literals = " ".join(re.findall(r"Literal\[(.*?)\]", message))
    choices = list(dict.fromkeys(re.findall(r"'(.*?)'", literals)))
    wanted = [words for kind, words in WANTED.items() if re.search(rf"(?<![\w']){re.escape(kind)}(?!\w)", message)]
    near = difflib.get_close_matches(value[1], choices, 1, 0.6)
    give = " or ".join([*wanted, *([f"one of {', '.join(choices)}"] if choices else [])])
    guess = f"; did you mean {near[0]}?" if near else ""
    if choices and value[1] in ("True", "False"):  # what YAML makes of on, off, yes and no
        guess = "; in a file, with quotes"
    return key[1], f"cannot be {value[1]!r}" + (f" (give {give}{guess})" if give else "")


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


def at_home(words: Sequence[str]) -> list[str]:
    """Return a command line with --option=~/path in full: a shell writes ~ out only where a word begins with it."""
    return [
        re.sub(r"(?<=^--)([\w.-]+=)(~.*)", lambda found: found[1] + os.path.expanduser(found[2]), word)
        for word in words
    ]


def program_name(usual: str, words: str = "") -> str:
    """Return what this program is called in its messages: `usual`, or `tailstream` with the words that start it."""
    return f"tailstream {words}".rstrip() if Path(sys.argv[0]).stem == "tailstream" else usual


def run_commands(program: str, commands: dict[str, Any] | Callable[..., Any], argv: list[str] | None = None) -> Any:
    """Run the function that the command line names and return its result; a UserError exits with status 2."""
    try:
        with user_errors_exit_2(program):
            result = auto_cli(commands, args=None if argv is None else list(argv), prog=program, parser_class=Parser)
            sys.stdout.flush()
            return result
    except BrokenPipeError:  # whoever reads the output has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
