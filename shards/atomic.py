"""Files that appear whole or not at all, in whatever folder: what a kill leaves is the old ones or the new ones."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; when the block ends well the file there takes its name, else it goes."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    with partial_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder, whose files are to be moved to their places when they are whole; what is left of it goes.

    A kill may leave it. The path is always the same, so that the next attempt clears it.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, indented."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
