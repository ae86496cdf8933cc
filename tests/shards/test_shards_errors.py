"""What every command does with mistakes, refusals of the file system, and terminals of another encoding."""

import errno
import sys
from io import BytesIO, TextIOWrapper

import pytest

from shards.errors import UserError, user_errors_exit_2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("--seed is\nx"), "--seed is\\nx"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a b"),
            "a b: Permission denied; change its permissions, or name another",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", b"out"),
            "out: No space left on device; make room, or name another",
        ),
    ],
)
def test_what_a_user_can_correct_is_one_line(capsys, monkeypatch, error, line):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stopped, user_errors_exit_2("tailstream"):
        raise error
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"tailstream: error: {line}\n"


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), FileNotFoundError(errno.ENOENT, "No such file", "y")]
)
def test_what_says_nothing_to_a_user_is_left_alone(error):
    with pytest.raises(OSError, match=str(error.strerror)) as raised, user_errors_exit_2("tailstream"):
        raise error
    assert raised.value is error


def test_a_terminal_that_lacks_a_letter_gets_its_escape(monkeypatch):
    terminal = TextIOWrapper(BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    with user_errors_exit_2("tailstream"):
        print("few –, ± 1")
    terminal.flush()
    assert terminal.buffer.getvalue() == b"few \\u2013, \xb1 1\n"
