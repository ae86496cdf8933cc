"""An unfinished build: what is done of it waits in OUT/.build, until all of it is moved into OUT at once.

    data/inat2018/.build/
        lock                      held while a builder runs; says who
        plan.json                 what is being built: only the same command continues it
        train-000012.tar  .idx    a shard that is done,
        train-000012.npy  .names.txt    its rows of the samples array and where its images came from,
        train-000012.json         and its record, written last: a shard with one is never made again
        dataset.json              written when everything is there, to be moved
        old.json                  the manifest of the dataset whose place is taken, while it is taken

Files appear under their names whole and synced to disk. So a builder may be killed at any moment, and the
same command goes on with what it finds.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.index import MANIFEST, STAGING

LOCK = "lock"
PLAN = "plan.json"
OLD_MANIFEST = "old.json"
REJECTED = "rejected.jsonl"
TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Staging:
    """The folder `out`/.build. Worker processes get a copy and may write different files at the same time."""

    out: Path

    @property
    def folder(self) -> Path:
        """Where the files wait."""
        return self.out / STAGING

    @contextmanager
    def writing(self, *names: str) -> Iterator[list[Path]]:
        """Yield paths to write to; when the block ends well the files get their names, whole and on disk."""
        temporary = [self.folder / f"{name}.{secrets.token_hex(4)}{TEMPORARY}" for name in names]
        try:
            yield temporary
            for path in temporary:
                _sync(path)
            for path, name in zip(temporary, names, strict=True):
                path.replace(self.folder / name)
            _sync(self.folder)
        except BaseException:
            for path in temporary:
                path.unlink(missing_ok=True)
            raise

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as `dataset.json` is written."""
        with self.writing(name) as (path,):
            text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")

    def read(self, name: str) -> bytes:
        """Read a file that waits."""
        return (self.folder / name).read_bytes()

    def read_json(self, name: str) -> Any:
        """Read a file that `write_json` wrote; None if there is none."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        """Return the names and bytes of the files that wait."""
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}

    def clear(self, keep: str = "") -> None:
        """Delete what waits, but for one file; the plan goes first, so that what a crash leaves is no build."""
        for name in sorted(self.sizes().keys() - {LOCK, keep}, key=lambda name: name != PLAN):
            (self.folder / name).unlink(missing_ok=True)

    def recover(self) -> dict[str, Any] | None:
        """Mend what a killed builder left; return the manifest of a dataset that was complete and is in place now."""
        names = self.sizes()
        for name in names:
            if name.endswith(TEMPORARY):
                (self.folder / name).unlink(missing_ok=True)
        return self.publish() if MANIFEST in names else None

    def publish(self) -> dict[str, Any]:
        """Move the finished dataset into `out`, the manifest last; `out` is no dataset in between.

        The old dataset's files are deleted.
        """
        if (self.out / MANIFEST).exists():
            (self.out / MANIFEST).replace(self.folder / OLD_MANIFEST)
            _sync(self.folder)
            _sync(self.out)
        manifest: dict[str, Any] = self.read_json(MANIFEST)
        old = self.read_json(OLD_MANIFEST)
        new_names = file_names(manifest)
        for name in file_names(old) - new_names if old else ():
            (self.out / name).unlink(missing_ok=True)
        for name in sorted(new_names - {MANIFEST}):
            if (self.folder / name).exists():  # else it was moved before a crash
                (self.folder / name).replace(self.out / name)
        _sync(self.out)
        self.clear(keep=MANIFEST)
        (self.folder / MANIFEST).replace(self.out / MANIFEST)
        _sync(self.out)
        return manifest


@contextmanager
def staged(out: Path) -> Iterator[Staging]:
    """Yield the staging folder of `out`, locked; at the end it is removed if nothing waits in it.

    Raises:
        UserError: another builder is at work there, or the folder cannot be made.
    """
    staging = Staging(out.resolve())
    made = [folder for folder in (staging.out, *staging.out.parents) if not folder.exists()]
    try:
        lock = _lock(staging)
    except OSError as error:
        _remove_empty(made)
        raise UserError(f"{out} cannot be written: {error.strerror or error}; give another --out") from None
    try:
        yield staging
    finally:
        if staging.sizes().keys() <= {LOCK}:
            shutil.rmtree(staging.folder)
            _remove_empty(made)
        os.close(lock)


def file_names(manifest: dict[str, Any]) -> set[str]:
    """Return the names of all files that a dataset consists of."""
    names = {MANIFEST, REJECTED}
    for split in manifest["splits"].values():
        names |= set(split["files"])
        for shard in split["shards"]:
            names |= {shard["file"], Path(shard["file"]).with_suffix(".idx").name}
    return names


def _lock(staging: Staging) -> int:
    """Make and lock the staging folder; the lock goes when the returned descriptor is closed, or with the process."""
    path = staging.folder / LOCK
    while True:
        staging.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
            raise UserError(f"{staging.out} is being built by {holder}; wait for it or give another --out") from None
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
