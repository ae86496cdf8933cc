"""Identical images, so that none of them trains what another one tests.

Files with the same bytes are found before the splits are planned, and kept together. The same pixels in other bytes
(without the EXIF block, compressed again) show when all are decoded, which is when the shards are written: what lies in
two splits is then named. So is what official splits have in common.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, islice

import numpy as np
from numpy.typing import NDArray

from shards.progress import Progress
from shards.sources import Listing, Source
from shards.staging import Staging
from shards.writer import MOST_BYTES

READERS = 16  # at the same time: files may lie behind a network
STEP = 1000  # images, for the progress


def identical_images(source: Source) -> list[list[int]]:
    """Find the training images that have the same bytes.

    Files of the same size are compared by their last bytes, and those that are alike there as a whole: of a hundred
    different photographs few are read to the end. Images that cannot be read have no copies, nor have files that are
    too large to be stored.

    Returns:
        The positions in the training listing of each group of two or more, ascending; groups by their first one.
    """
    train = source.splits["train"]
    if train.sizes is None:
        groups = [np.arange(len(train))]
    else:
        groups = _alike(np.flatnonzero((train.sizes > 0) & (train.sizes <= MOST_BYTES)), train.sizes)
    for read in filter(None, (source.peek, source.read)):
        ids = np.concatenate(groups) if groups else np.zeros(0, np.int64)
        digests = _digests(train, ids, read)
        groups = [part for group in groups for part in _alike(group[[i in digests for i in group.tolist()]], digests)]
    return sorted(sorted(group.tolist()) for group in groups)


def pictures_in_two_splits(staging: Staging, shards: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A line for each two splits that show the same pictures.

    Args:
        staging: where the shards and what was written beside them are.
        shards: for each split, the names of its shards without their ends.
    """
    pictures = {
        split: np.frombuffer(b"".join(staging.read(f"{name}.pictures") for name in names), dtype="V16")
        for split, names in shards.items()
    }
    for one, other in combinations(pictures, 2):
        _, first, second = np.intersect1d(pictures[one], pictures[other], return_indices=True)
        if len(first):
            names = [_name(staging, shards[split], int(at[0])) for split, at in ((one, first), (other, second))]
            yield f"{one} and {other} have pictures in common: {len(first):,} such as {' = '.join(names)}"


def _name(staging: Staging, shards: Sequence[str], sample: int) -> str:
    names = (line for shard in shards for line in staging.read(f"{shard}.names.txt").decode().splitlines())
    return next(islice(names, sample, None))


def _digests(images: Listing, ids: NDArray[np.int64], read: Callable[[str], bytes]) -> dict[int, bytes]:
    def digest(i: int) -> tuple[int, bytes]:
        try:
            return i, hashlib.sha256(read(images.names[i])).digest()
        except OSError:
            return i, b""

    found: dict[int, bytes] = {}
    with Progress("look for copies", len(ids)) as progress, ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(ids), STEP):
            part = ids[start : start + STEP].tolist()
            found |= {i: value for i, value in pool.map(digest, part) if value}
            progress.add(len(part))
    return found


def _alike(ids: NDArray[np.int64], key_of: Mapping[int, bytes] | NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Group the ids that share a key with others."""
    groups: dict[bytes | int, list[int]] = {}
    for i in ids.tolist():
        groups.setdefault(key_of[i], []).append(i)
    return [np.array(group) for group in groups.values() if len(group) > 1]
