"""A folder that a dataset is built in, where files appear whole or not at all."""

import errno
import fcntl
import os
import secrets
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shards.errors import UserError

TEMPORARY = ".tmp"
LOCK = "lock"


class Store(Protocol):
    """What a build needs of the place where it writes; names are relative to it, such as ".build/plan.json".

    Worker processes get a copy and may write different files at the same time. Operations raise OSError.
    """

    def names(self) -> set[str] | None:
        """What lies in the folder; empty if there is no folder, None if there is something else in its place."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Names and bytes of the files in a sub-folder; in the folder itself for ""."""

    def read(self, name: str) -> bytes:
        """Read a file; FileNotFoundError if there is none."""

    def as_of(self, name: str) -> int:
        """When a file was written, in nanoseconds since 1970; local stores keep what its writer set."""

    def writing(self, names: Sequence[str]) -> AbstractContextManager[list[Path]]:
        """Give paths of this machine to write to; when the block ends well the files get their names, whole."""

    def move(self, names: Iterable[tuple[str, str]]) -> None:
        """Move files to new names, the place of others perhaps; when it returns that is for good."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; those that are gone already do not matter."""

    def locked(self, folder: str) -> AbstractContextManager[None]:
        """Keep other builders away; at the end a sub-folder where nothing is left goes."""


@dataclass(frozen=True)
class LocalStore:
    """A `Store` in the file system: a folder with its absolute path."""

    root: Path

    def names(self) -> set[str] | None:  # noqa: D102
        if self.root.is_dir():
            return set(os.listdir(self.root))
        return None if os.path.lexists(self.root) else set()

    def sizes(self, folder: str) -> dict[str, int]:  # noqa: D102
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.root / folder) if entry.is_file()}

    def read(self, name: str) -> bytes:  # noqa: D102
        return (self.root / name).read_bytes()

    def as_of(self, name: str) -> int:  # noqa: D102
        return (self.root / name).stat().st_mtime_ns

    @contextmanager
    def writing(self, names: Sequence[str]) -> Iterator[list[Path]]:  # noqa: D102
        paths = [self.root / name for name in names]
        temporary = [path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}") for path in paths]
        try:
            yield temporary
            for path in temporary:
                _sync(path)
            for path, place in zip(temporary, paths, strict=True):
                path.replace(place)
            for folder in {path.parent for path in paths}:
                _sync(folder)
        except BaseException:
            for path in temporary:
                path.unlink(missing_ok=True)
            raise

    def move(self, names: Iterable[tuple[str, str]]) -> None:  # noqa: D102
        folders = set()
        for old, new in names:
            (self.root / old).replace(self.root / new)
            folders |= {(self.root / old).parent, (self.root / new).parent}
        for folder in folders:
            _sync(folder)

    def delete(self, names: Iterable[str]) -> None:  # noqa: D102
        for name in names:
            (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def locked(self, folder: str) -> Iterator[None]:
        """Hold an advisory lock, which goes with this process.

        Raises:
            UserError: another process holds it.
        """
        made = [parent for parent in (self.root, *self.root.parents) if not parent.exists()]
        try:
            lock = _lock(self.root, self.root / folder)
        except BaseException:
            _remove_empty(made)
            raise
        try:
            yield
        finally:
            place = self.root / folder
            nothing_left = set(os.listdir(place)) <= {LOCK}
            if nothing_left:
                (place / LOCK).unlink(missing_ok=True)
            os.close(lock)  # before its folder goes: NFS keeps a deleted file there until it is closed
            if nothing_left:
                _remove_empty([place, *made])  # stays where another builder came meanwhile


def _lock(root: Path, folder: Path) -> int:
    """Make and lock a folder; the lock goes when the returned descriptor is closed, or with the process."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # a holder has removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file in the meantime.
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(f"{root} is being built by {holder}; wait for it or give another --out") from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of the folders, the innermost first, that are there and empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
