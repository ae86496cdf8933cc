"""Encoded images straight out of the shards."""

import os
import shlex
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.index import Split
from shards.progress import Progress
from shards.remote import TRANSFERS

OPEN_SHARDS = 256  # processes may open 1,024 files by default


class ShardReader:
    """Reads the encoded bytes of samples by id, from any number of threads.

    Shards are opened when they are first needed, and fetched then where the dataset is remote; the ones used last
    stay open. They are read and not mapped: where a mapped file shrinks, or its storage fails, the whole process is
    killed (SIGBUS), and reading costs only a microsecond more per image. A reader can be pickled; the copy opens its
    own files.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self._lock = Lock()
        self._here: dict[int, Future[Path]] = {}  # shards of a remote dataset that are fetched, or were
        self._wanted: deque[tuple[int, Future[Path]]] = deque()  # those of them that no thread has taken yet
        self._fetchers = 0
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()  # last used, last

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Split]]:
        return ShardReader, (self._split,)

    def encoded(self, ids_B: Iterable[int] | NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Return each sample's JPEG or PNG file as a read-only uint8 array.

        Raises:
            UserError: a shard is missing, cannot be read, or is shorter than the index says; or the dataset was built
                again since it was opened.
        """
        rows_B = self._rows(ids_B)
        files = {i: self._pread(file, *where) for i, file, *where in self._places(rows_B)}
        return [np.frombuffer(files[i], dtype=np.uint8) for i in range(len(rows_B))]

    def padded(self, ids_B: Iterable[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the samples' files as rows of one array, each with zeros behind it, which no decoder reads.

        Raises:
            UserError: as `encoded`.
        """
        rows_B = self._rows(ids_B)
        width = int(rows_B["size"].max())
        padded = np.zeros((len(rows_B), width), dtype=np.uint8)
        # Straight into its place: of files of 3 kB, bytes that are copied take twice the time.
        memory = padded.reshape(-1).data
        for i, file, shard, offset, size in self._places(rows_B):
            place = memory[i * width : i * width + size]
            try:
                found = os.preadv(file.descriptor, (place,), offset)
            except OSError as error:
                raise self._unreadable(shard, error) from None
            if found < size:
                place[:] = self._pread(file, shard, offset, size)
        return padded

    def _rows(self, ids_B: Iterable[int] | NDArray[np.int64]) -> NDArray[np.void]:
        return self._split.samples[np.asarray(ids_B, dtype=np.int64)]

    def _places(self, rows_B: NDArray[np.void]) -> Iterator[tuple[int, "_OpenFile", int, int, int]]:
        """Return the rows in the order in which their files lie: number, the opened shard, shard, offset and size."""
        order_B = np.lexsort((rows_B["offset"], rows_B["shard"]))
        shards, offsets, sizes = (rows_B[name][order_B].tolist() for name in ("shard", "offset", "size"))
        coming: dict[int, Future[Path]] = {}
        if self._split.remote is not None:
            wanted = sorted(set(shards))
            coming = dict(zip(wanted, self._fetching(wanted), strict=True))
        last, file = -1, None
        for i, shard, offset, size in zip(order_B.tolist(), shards, offsets, sizes, strict=True):
            if file is None or shard != last:
                try:
                    last, file = shard, self._opened(shard, coming)
                except OSError as error:
                    raise self._unreadable(shard, error) from None
            yield i, file, shard, offset, size

    def _pread(self, file: "_OpenFile", shard: int, offset: int, size: int) -> bytes:
        try:
            data = os.pread(file.descriptor, size, offset)
            while len(data) < size:  # a network file system may hand over less than was asked for
                more = os.pread(file.descriptor, size - len(data), offset + len(data))
                if not more:
                    raise self._too_short(shard, os.fstat(file.descriptor).st_size, offset + size)
                data += more
        except OSError as error:
            raise self._unreadable(shard, error) from None
        return data

    def _unreadable(self, shard: int, error: OSError) -> UserError:
        self._split.check_edition()
        path = self._split.shard_paths[shard]
        return UserError(f"shard {path} cannot be read ({error}); run: {_verify(path)}")

    def _opened(self, shard: int, coming: dict[int, Future[Path]]) -> "_OpenFile":
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        # Others keep reading while this one waits for a shard: for the transfer that was asked for before, which a
        # reader that was closed meanwhile has given up, and not for one that begins now.
        file = _OpenFile(coming[shard].result() if coming else self._split.local_shard(shard))
        self._split.check_edition()  # once it is open: now nobody can put another file in its place
        with self._lock:
            file = self._open.setdefault(shard, file)
            self._open.move_to_end(shard)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
            return file

    def fetch(self, ids_B: NDArray[np.int64]) -> None:
        """Have the shards of samples on this machine, and show progress. Does nothing where the dataset is local.

        Raises:
            UserError: one cannot be fetched, or is not the shard that the manifest describes.
        """
        remote, paths = self._split.remote, self._split.shard_paths
        if remote is None:
            return
        wanted = np.unique(self._split.samples["shard"][ids_B]).tolist()
        missing = [shard for shard in wanted if not remote.is_here(shard, paths[shard])]
        with Progress(f"fetching {self._split.name} from {remote.url}", len(missing), unit="shards") as progress:
            for coming in self._fetching(missing):
                coming.result()
                progress.add(1)

    def _fetching(self, shards: list[int]) -> list[Future[Path]]:
        """Begin to fetch those that were not begun, several at a time."""
        with self._lock:
            for shard in shards:
                if shard not in self._here:
                    self._here[shard] = Future[Path]()
                    self._wanted.append((shard, self._here[shard]))
            # Also for what an earlier call began with, and could start no thread for.
            for _ in range(min(len(self._wanted), TRANSFERS - self._fetchers)):
                # Not a pool's thread, for which the interpreter waits at its end: a slow link may take minutes.
                Thread(target=self._fetch_wanted, daemon=True).start()
                self._fetchers += 1
            return [self._here[shard] for shard in shards]

    def _fetch_wanted(self) -> None:
        """Fetch shards until none is wanted."""
        while True:
            with self._lock:
                if not self._wanted:
                    self._fetchers -= 1
                    return
                shard, coming = self._wanted.popleft()
            try:
                path = self._split.local_shard(shard)
            except Exception as error:
                with suppress(InvalidStateError):  # nobody waits any more
                    coming.set_exception(error)
            else:
                with suppress(InvalidStateError):
                    coming.set_result(path)

    def _too_short(self, shard: int, length: int, end: int) -> UserError:
        path = self._split.shard_paths[shard]
        return UserError(f"{path} is {length} bytes long but the index points to byte {end}; run: {_verify(path)}")

    def close(self) -> None:
        """Close the shards. Reading afterwards opens them again.

        Who waits for a shard to be fetched gets a CancelledError.
        """
        with self._lock:
            self._open.clear()
            self._wanted.clear()
            for coming in self._here.values():
                with suppress(InvalidStateError):
                    coming.set_exception(CancelledError())
            self._here.clear()


def _verify(path: Path) -> str:
    return f"tailstream verify {shlex.quote(str(path.parent))}"


class _OpenFile:
    """A descriptor that is closed with its last user: another thread may read while this one makes room."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        # An instance whose opening failed has no descriptor.
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
