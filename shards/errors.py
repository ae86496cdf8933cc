"""Mistakes that a user can correct, each reported in one line."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper


class UserError(ValueError):
    """Something the user gave is wrong: the message names the value and the remedy, on one line."""


# What a file system refuses, and how the user makes it agree.
REFUSED = {
    errno.EACCES: "change its permissions, or name another",
    errno.EPERM: "change its permissions, or name another",
    errno.EROFS: "name another",
    errno.ENOSPC: "make room, or name another",
    errno.EDQUOT: "make room, or name another",
}


@contextmanager
def user_errors_exit_2(program: str, *, each_line: bool = False) -> Iterator[None]:
    """Turn a `UserError`, or what a file system refuses, into `PROGRAM: error: message` on stderr and exit status 2.

    It is one line, whatever characters the names in it have. Under a distributed launcher the other ranks say which
    they are: a mistake in the data may meet one alone.

    Args:
        program: its name.
        each_line: whether stdout is written line by line, as the log of a run of days, which may be killed, has to be.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        # Names may have letters that a terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=each_line or None)
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in REFUSED or error.filename is None:
            raise
        message = f"{os.fsdecode(error.filename)}: {error.strerror}; {REFUSED[error.errno]}"
    else:
        return
    rank = os.environ.get("RANK", "0")
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in message)
    print(f"{program}{'' if rank == '0' else f' (rank {rank})'}: error: {printable}", file=sys.stderr)
    sys.exit(2)
