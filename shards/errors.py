"""Mistakes that a user can correct, each reported in one line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user gave is wrong: the message names the value and the remedy, on one line."""


@contextmanager
def user_errors_exit_2(program: str) -> Iterator[None]:
    """Turn a `UserError` into `PROGRAM: error: message` on stderr and exit status 2.

    It is one line, whatever characters the names in it have. Under a distributed launcher the other ranks say which
    they are: a mistake in the data may meet one alone.
    """
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(error))
        print(f"{program}{'' if rank == '0' else f' (rank {rank})'}: error: {printable}", file=sys.stderr)
        sys.exit(2)
