"""Datasets behind URLs such as s3://bucket/folder: building into them, and a cache on this machine.

Whatever fsspec opens will do (extra `remote`: fsspec and s3fs). Credentials and endpoints are fsspec's and the
providers' own settings, such as AWS_PROFILE and AWS_ENDPOINT_URL.

    ~/.cache/tailstream/           or $TAILSTREAM_CACHE
        dataset-4f0c…/             a dataset: its small files, and each shard once it was asked for
            .origin                its URL
        source-91ab…/              images to build from (source_copy.py)
"""

import fcntl
import glob
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError

TRANSFERS = 16  # at the same time: object stores answer slowly and serve many
ORIGIN = ".origin"


def is_url(path: Path | str) -> bool:
    """Whether this names a remote place."""
    return "://" in str(path)


def cache_folder() -> Path:
    """Where copies of remote files are kept."""
    if cache := os.environ.get("TAILSTREAM_CACHE"):
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tailstream")


@dataclass(frozen=True)
class RemoteStore:
    """A `shards.store.Store` behind a URL. Object stores put whole files in place and know no folders and no locks.

    Two builders at one URL do not know of each other: with the same options they write the same bytes, with other
    options the second one finds the first one's plan and is refused.
    """

    url: str

    def names(self) -> set[str] | None:  # noqa: D102
        with connected(self.url) as (files, root):
            return {_base(path) for path in _listing(files, root)}

    def sizes(self, folder: str) -> dict[str, int]:  # noqa: D102
        with connected(self.url) as (files, root):
            found = _listing(files, f"{root}/{folder}".rstrip("/")).items()
            sizes = {_base(path): about["size"] for path, about in found if about["type"] == "file"}
            return {name: size for name, size in sizes.items() if size is not None}  # web servers say none

    def read(self, name: str) -> bytes:  # noqa: D102
        with connected(self.url) as (files, root):
            data: bytes = files.cat_file(f"{root}/{name}")
            return data

    def as_of(self, name: str) -> int:  # noqa: D102
        with connected(self.url) as (files, root):
            try:
                return int(files.modified(f"{root}/{name}").timestamp() * 1e9)
            except NotImplementedError:  # then everything may have changed since
                return 0

    @contextmanager
    def writing(self, names: Sequence[str]) -> Iterator[list[Path]]:  # noqa: D102
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, _base(name)) for name in names]
            yield paths
            with connected(self.url) as (files, root):
                for path, name in zip(paths, names, strict=True):
                    files.put_file(str(path), f"{root}/{name}")

    def move(self, names: Iterable[tuple[str, str]]) -> None:  # noqa: D102
        def move(old: str, new: str) -> None:
            try:
                files.cp_file(f"{root}/{old}", f"{root}/{new}")
            except NotImplementedError:  # file servers rename
                files.mv(f"{root}/{old}", f"{root}/{new}")
            else:
                files.rm_file(f"{root}/{old}")

        with connected(self.url) as (files, root), ThreadPoolExecutor(TRANSFERS) as pool:
            for future in [pool.submit(move, *pair) for pair in names]:
                future.result()

    def delete(self, names: Iterable[str]) -> None:  # noqa: D102
        def delete(name: str) -> None:
            with suppress(FileNotFoundError):
                files.rm_file(f"{root}/{name}")

        with connected(self.url) as (files, root), ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(delete, names))

    @contextmanager
    def locked(self, folder: str) -> Iterator[None]:  # noqa: D102
        yield


@dataclass(frozen=True)
class RemoteShards:
    """The shards of a split that lie behind a URL, and their sha256 in the order of the split."""

    url: str
    digests: tuple[str, ...]

    def fetch(self, shard: int, path: Path) -> None:
        """Have a shard in the cache at `path`, whole: what lies there is checked, and fetched where it is not right.

        A file that was checked is not read again until it changes. Processes of one machine that want the same shard
        wait for each other.

        Raises:
            UserError: it cannot be fetched, or is not the shard that the manifest describes.
        """
        if self.is_here(shard, path):
            return
        with self._note(path).open("a") as note:
            fcntl.flock(note, fcntl.LOCK_EX)
            if self.is_here(shard, path):  # another process had the lock
                return
            note.truncate(0)
            for left_over in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # of a process that was killed
                left_over.unlink()
            if not path.exists() or _sha256(path) != self.digests[shard]:
                copy_file(self.url, path.name, path)
                if _sha256(path) != self.digests[shard]:
                    path.unlink()
                    raise UserError(
                        f"{self.url}/{path.name} is not the file that the manifest describes: the dataset was built"
                        " again since it was opened, or is damaged; start again, or build it again"
                    )
            note.write(self._checked(shard, path))

    def is_here(self, shard: int, path: Path) -> bool:
        """Whether a shard lies in the cache, checked, and has not changed since."""
        try:
            return self._note(path).read_text() == self._checked(shard, path)
        except FileNotFoundError:
            return False

    def _checked(self, shard: int, path: Path) -> str:
        about = path.stat()
        return f"{self.digests[shard]} {about.st_size} {about.st_mtime_ns}"

    def _note(self, path: Path) -> Path:
        """What is locked while a shard is fetched or checked, and says afterwards which file was."""
        return path.with_name(f"{path.name}.lock")


def cached_dataset(url: str, manifest_name: str) -> Path:
    """Copy a remote dataset's manifest into the cache; return its folder there.

    The folder is named after the manifest's contents: another dataset at the same URL has another one.

    Raises:
        UserError: no dataset there, or no answer.
    """
    try:
        manifest = RemoteStore(url).read(manifest_name)
    except FileNotFoundError:
        raise UserError(
            f"{url} has no {manifest_name}, so it is not a dataset; build one with: tailstream build digits --out {url}"
        ) from None
    except OSError as error:
        raise UserError(f"{url} cannot be read: {error.strerror or error}") from None
    digest = hashlib.sha256(url.encode() + manifest).hexdigest()
    folder = cache_folder() / f"dataset-{digest[:16]}"
    make_folder(folder)
    for name, data in ((ORIGIN, url.encode()), (manifest_name, manifest)):
        _put(folder / name, data)
    return folder


def whole_cached_dataset(url: str, manifest_name: str, *others: str) -> tuple[Path, list[str]]:
    """Copy a remote dataset into the cache: what its manifest gives checksums of, and the others that are named.

    Returns:
        Its folder there, and a line for each file that could not be copied.

    Raises:
        UserError: as `cached_dataset` does.
    """
    folder = cached_dataset(url, manifest_name)
    digests: dict[str, str | None] = dict.fromkeys(others)
    for split in json.loads((folder / manifest_name).read_bytes())["splits"].values():
        digests |= split["files"]
        for shard in split["shards"]:
            digests |= {shard["file"]: shard["sha256"], f"{Path(shard['file']).stem}.idx": shard["index_sha256"]}

    def problem(name: str) -> str:
        digest = digests[name]
        try:
            if digest is None:
                copy_file(url, name, folder / name)
            else:
                fetch_file(url, folder / name, digest)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(TRANSFERS) as pool:
        return folder, [line for line in pool.map(problem, digests) if line]


def origin(root: Path) -> str | None:
    """The URL of a dataset in the cache; None for any other folder."""
    try:
        return (root / ORIGIN).read_text(encoding="utf-8")
    except OSError:
        return None


def fetch_file(url: str, path: Path, digest: str) -> None:
    """Have a dataset's small file in the cache, with this sha256; UserError where that fails."""
    RemoteShards(url, (digest,)).fetch(0, path)


def copy_file(url: str, name: str, path: Path) -> None:
    """Copy a file of a remote folder to `path`, where it appears whole; UserError where that fails."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with connected(url) as (files, root):
            files.get_file(f"{root}/{name}", str(temporary))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{url}/{name} cannot be fetched to {path.parent}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _put(path: Path, data: bytes) -> None:
    # Containers that share a cache may all be process 1.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with writing_cache(path.parent):
        temporary.write_bytes(data)
        temporary.replace(path)


def make_folder(folder: Path) -> None:
    """Make a folder in the cache; UserError where that fails."""
    with writing_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Turn what a file system refuses into a UserError that says how to have the cache elsewhere."""
    try:
        yield
    except OSError as error:
        raise UserError(f"the cache {folder} cannot be written: {error.strerror}; set TAILSTREAM_CACHE") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _base(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _listing(files: Any, folder: str) -> dict[str, Any]:
    try:
        return {about["name"]: about for about in files.ls(folder, detail=True) if about["name"].rstrip("/") != folder}
    except FileNotFoundError:
        return {}


@contextmanager
def connected(url: str) -> Iterator[tuple[Any, str]]:
    """Yield fsspec's file system for a URL and the path in it; what its libraries raise becomes an OSError."""
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{url} needs fsspec; install it with: pip install 'tailstream[remote]'") from None
    try:
        # Other processes write there too, so a listing is old the next moment.
        files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise UserError(f"{url}: {error}; or: pip install 'tailstream[remote]'") from None
    except ValueError as error:
        raise UserError(f"{url} cannot be opened: {error}") from None
    try:
        yield files, root.rstrip("/")
    except (OSError, UserError):
        raise
    except Exception as error:  # such as botocore's own
        raise OSError(0, " ".join(str(error).split()) or type(error).__name__) from error
