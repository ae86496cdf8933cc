"""Images behind a URL: copied to this machine, and left as they are while a build reads them.

~/.cache/tailstream/           or $TAILSTREAM_CACHE
    source-91ab…/              the copy
    source-91ab….lock          shared by the builds that read it; who changes it has it alone
    source-91ab….versions      which version of each file was copied: a line for each, the last one counts
"""

import fcntl
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from shards.errors import UserError
from shards.progress import Progress, say
from shards.remote import TRANSFERS, cache_folder, connected, copy_file, is_url, make_folder, writing_cache

AT_ONCE = 1000  # files, for the progress
# What object stores, file servers and folders say of a file that changes when its contents do: any of these.
VERSION = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "updated", "mtime", "created")


@contextmanager
def on_this_machine(source: str | Path | None) -> Iterator[Path | None]:
    """Yield where a source's files lie; what a URL names is copied first, and stays as it is in this block.

    Raises:
        UserError: nothing there, or no answer.
    """
    if source is None or not is_url(source):
        yield None if source is None else Path(source)
        return
    with kept_copy(str(source)) as copy:
        yield copy


@contextmanager
def kept_copy(url: str) -> Iterator[Path]:
    """Copy a remote folder of images into the cache, as far as it is not there yet; yield the folder there.

    Of a URL of a file the folder around it is copied. Files of which another size or version lies there now are copied
    again, and those that are gone there are deleted: for that a process waits until no other reads the copy.

    Raises:
        UserError: nothing there, or no answer.
    """
    folder = cache_folder() / f"source-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    make_folder(folder.parent)
    with writing_cache(folder.parent):
        lock = folder.with_name(f"{folder.name}.lock").open("w")
    with lock:
        files = _copied(url, folder, lock)
        if "" not in files:
            yield folder
            return
    parent, _, name = url.rpartition("/")  # a file, such as a list of images beside it
    with kept_copy(parent) as around:
        yield around / name


def _copied(url: str, folder: Path, lock: IO[str]) -> dict[str, dict[str, Any]]:
    """Make a folder hold the files of a URL; return them, by name: "" of a file. The lock is shared afterwards."""
    try:
        alone = _locked(lock, fcntl.LOCK_EX)
        if not alone and not _locked(lock, fcntl.LOCK_SH):
            say(f"waiting for another build, which copies {url}")
            fcntl.flock(lock, fcntl.LOCK_SH)
        # Under the lock: what another process copies meanwhile may be newer than a listing from before.
        files = _files(url)
        if "" in files:
            return files
        if not alone and any(_changes(files, folder)):
            say(f"waiting for another build, which reads the copy of {url}: other files lie there now")
            fcntl.flock(lock, fcntl.LOCK_UN)
            fcntl.flock(lock, fcntl.LOCK_EX)
            files, alone = _files(url), True
        if alone:
            with writing_cache(folder):
                _copy(url, files, folder)
        fcntl.flock(lock, fcntl.LOCK_SH)
    except OSError as error:
        raise UserError(f"--source {url} cannot be read: {error.strerror or error}") from None
    return files


def _locked(lock: IO[str], operation: int) -> bool:
    """Lock a file where that needs no waiting."""
    try:
        fcntl.flock(lock, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _files(url: str) -> dict[str, dict[str, Any]]:
    """What the store says of each file below a URL, by its name from there."""
    with connected(url) as (files, root):
        found = files.find(root, detail=True)
    there = {path.removeprefix(root).lstrip("/"): about for path, about in found.items() if not path.endswith("/")}
    if not there:
        raise UserError(f"--source {url} holds no files")
    if len(there) == 1:
        return there
    # An empty object may stand for a folder: consoles make one whose name ends with "/", others one without.
    folders = {"", *(name.rpartition("/")[0] for name in there)}
    folders |= {str(parent) for name in folders for parent in PurePosixPath(name).parents}
    return {name: about for name, about in there.items() if name not in folders}


def _changes(there: dict[str, dict[str, Any]], folder: Path) -> tuple[list[Path], list[str]]:
    """What has to go from a folder for it to hold these files and no others, and which have to be copied."""
    versions = _versions(folder)
    lines = versions.read_text(encoding="utf-8").splitlines() if versions.exists() else []
    copied = {name: version for version, _, name in (line.partition("\t") for line in lines)}
    gone = []
    sizes = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name in there:
            sizes[name] = path.stat().st_size
        elif path.is_file() or not any(path.iterdir()):  # object stores know no empty folders
            gone.append(path)
    missing = [
        name
        for name, about in there.items()
        if sizes.get(name, -1) != about["size"] or copied.get(name) != _version(about)
    ]
    return gone, missing


def _copy(url: str, there: dict[str, dict[str, Any]], folder: Path) -> None:
    """Make a folder hold the files of a URL, of which the store says this, and no others."""
    make_folder(folder)
    gone, missing = _changes(there, folder)
    for path in gone:
        _remove(path, folder)
    for name in missing:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--source {url}: {name!r} leads out of the folder")
        make_folder((folder / name).parent)
    with (
        Progress(f"copy {url}", len(missing), unit="files") as progress,
        ThreadPoolExecutor(TRANSFERS) as pool,
        _versions(folder).open("a", encoding="utf-8") as file,
    ):
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            for name, _ in zip(part, pool.map(lambda name: copy_file(url, name, folder / name), part), strict=True):
                file.write(f"{_version(there[name])}\t{name}\n")
            progress.add(len(part))


def _remove(path: Path, top: Path) -> None:
    """Remove a file or an empty folder, and the folders around it, below `top`, that are empty then."""
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()
    if path.parent != top and not any(path.parent.iterdir()):
        _remove(path.parent, top)


def _versions(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.versions")


def _version(about: dict[str, Any]) -> str:
    """What tells a file from a later one of its name, as far as the store says."""
    return " ".join(str(about[key]) for key in ("size", *VERSION) if about.get(key) is not None)
