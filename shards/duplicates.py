"""Copies among a dataset's images: the same bytes, or the same picture resized or written again.

Pictures are compared by a difference hash (Krawetz's dHash): of a small grey version, whether each cell is brighter
than its left and its upper neighbour, 2 · 64 bits. Copies differ in few of these. So that not all pairs have to be
compared, the bits are cut into eight bands, and only pictures that agree in two bands are: all pairs of up to six
different bits are among these, and most of up to a dozen. Then their versions of 16 · 16 cells decide. Of 200
photographs all were found again at half their size, at double, and at JPEG quality 50. Of CIFAR-10's 60,000 pictures
114 pairs are found; the 60 of them that were looked at show the same thing in the same pose.
"""

import hashlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shards.errors import UserError
from shards.index import Dataset, Split
from shards.parallel import run_jobs
from shards.progress import Progress

CELLS = 8  # of the hash, each way
THUMB = 16  # of the version that decides
LEAST_STEP = 2  # grey levels: even areas differ by less where they were written again
DRAFT = 64  # pixels that a JPEG is decoded to at least: an eighth of the time
BANDS = 8
NEIGHBOURS = 32  # compared in each bucket: more pictures in one are blank, or copies of each other
MOST_BITS = 24  # that copies differ in
MOST_GREY = 12.0  # levels of 255 that their cells differ by, on average
LEAST_CORRELATION = 0.97
FLAT = 2.0  # standard deviation of a picture that shows nothing
AT_ONCE = 100_000  # pairs

MARK = np.dtype([("bytes", "V16"), ("hash", "<u2", BANDS), ("thumb", "u1", THUMB * THUMB)])


class Member(NamedTuple):
    """An image of a group of copies."""

    split: str
    name: str
    label: int


@dataclass(frozen=True)
class Group:
    """Two or more images that are copies of each other.

    Attributes:
        members: in the order of splits and ids.
        exact: whether all have the same bytes.
    """

    members: list[Member]
    exact: bool

    @property
    def across(self) -> bool:
        """Whether several splits hold it."""
        return len({member.split for member in self.members}) > 1

    @property
    def torn(self) -> bool:
        """Whether the labels differ."""
        return len({member.label for member in self.members}) > 1


def find_duplicates(dataset: Dataset, workers: int | None = None) -> list[Group]:
    """Compare all images of a dataset: groups across splits first, then those with different labels.

    Args:
        dataset: its shards are read, fetched where they are remote.
        workers: processes; if None, one per available core.

    Raises:
        UserError: a shard cannot be read.
    """
    jobs = [job for split in dataset.splits.values() for job in _jobs(split)]
    total = sum(map(len, dataset.splits.values()))
    with Progress("compare", total) as progress:
        found = run_jobs(_marks, jobs, n_images=total, workers=workers, done=lambda marks: progress.add(len(marks)))
    for split in dataset.splits.values():
        split.check_edition()
    marks = np.concatenate(found)
    owners = [
        Member(split.name, name, label)
        for split in dataset.splits.values()
        for name, label in zip(split.sample_names(), split.samples["label"].tolist(), strict=True)
    ]
    groups = [
        Group([owners[i] for i in ids.tolist()], exact=len(np.unique(marks["bytes"][ids])) == 1)
        for ids in _groups(marks)
    ]
    return sorted(groups, key=lambda group: (not group.across, not group.torn, not group.exact))


def report(groups: Sequence[Group], classes: Sequence[str]) -> Iterator[str]:
    """Lines about the groups, in their order."""
    if not groups:
        yield "copies: none found"
        return
    yield (
        f"copies: {sum(len(group.members) for group in groups):,} images; groups: {len(groups):,},"
        f" across splits: {sum(group.across for group in groups):,},"
        f" with different labels: {sum(group.torn for group in groups):,}"
    )
    for group in groups:
        kind = "identical" if group.exact else "alike"
        marks = [mark for mark, holds in (("across splits", group.across), ("different labels", group.torn)) if holds]
        members = " = ".join(f"{member.split} {member.name} ({classes[member.label]})" for member in group.members)
        yield f"{', '.join([kind, *marks])}: {members}"


class _Job(NamedTuple):
    path: Path
    rows: NDArray[np.void]


def _jobs(split: Split) -> Iterator[_Job]:
    # Rows follow the shards in order.
    bounds = np.searchsorted(split.samples["shard"], np.arange(len(split.shard_paths) + 1))
    for shard in range(len(split.shard_paths)):
        yield _Job(split.local_shard(shard), np.array(split.samples[bounds[shard] : bounds[shard + 1]]))


def _marks(job: _Job) -> NDArray[np.void]:
    """What images are compared by, shape (N,), dtype `MARK`."""
    marks = np.zeros(len(job.rows), dtype=MARK)
    try:
        with job.path.open("rb") as file:
            for mark, row in zip(marks, job.rows, strict=True):
                file.seek(row["offset"])
                data = file.read(row["size"])
                mark["bytes"] = hashlib.sha256(data).digest()[:16]
                mark["hash"], mark["thumb"] = _looks(data)
    except (OSError, SyntaxError, ValueError) as error:  # what PIL calls damaged pictures
        verify = f"tailstream verify {shlex.quote(str(job.path.parent))}"
        raise UserError(f"{job.path} cannot be read ({error}); run: {verify}") from None
    return marks


def _looks(data: bytes) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """A picture's hash, shape (BANDS,), and its small version, shape (THUMB², )."""
    with Image.open(BytesIO(data)) as image:
        image.draft("L", (DRAFT, DRAFT))
        grey = image.convert("L")

    def cells(width: int, height: int) -> NDArray[np.int16]:
        return np.asarray(grey.resize((width, height), Image.Resampling.BOX)).astype(np.int16)

    steps = (np.diff(cells(CELLS + 1, CELLS), axis=1), np.diff(cells(CELLS, CELLS + 1), axis=0))
    bits = np.concatenate([step.ravel() > LEAST_STEP for step in steps])
    return np.packbits(bits).view("<u2"), cells(THUMB, THUMB).ravel().astype(np.uint8)


def _groups(marks: NDArray[np.void]) -> Iterator[NDArray[np.int64]]:
    """The ids of images that are copies of each other, directly or through others."""
    _, first, same = np.unique(marks["bytes"], return_index=True, return_inverse=True)
    pairs = [np.stack([first[same], np.arange(len(marks))])]
    pairs += [first[alike] for alike in _alike_pairs(marks[first])]
    edges = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(edges.shape[1], bool), (edges[0], edges[1])), shape=(len(marks), len(marks)))
    _, group_of = connected_components(graph, directed=False)
    order = np.argsort(group_of, kind="stable")
    for ids in np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1):
        if len(ids) > 1:
            yield ids


def _alike_pairs(marks: NDArray[np.void]) -> Iterator[NDArray[np.int64]]:
    """Pairs of pictures that look the same, (2, pairs); some come several times."""
    hashes = np.ascontiguousarray(marks["hash"])
    thumbs = np.ascontiguousarray(marks["thumb"])
    brightness = thumbs.mean(axis=1)
    keys = [hashes[:, i].astype(np.uint32) << 16 | hashes[:, j] for i, j in combinations(range(BANDS), 2)]
    for n, key in enumerate([np.unique(hashes.view("V16").ravel(), return_inverse=True)[1], *keys]):
        order = np.lexsort((brightness, key))
        key = key[order]
        for step in range(1, min(NEIGHBOURS, len(key) - 1) + 1):
            at = np.flatnonzero(key[step:] == key[:-step])
            if not len(at):
                break
            for start in range(0, len(at), AT_ONCE):
                part = at[start : start + AT_ONCE]
                pairs = np.stack([order[part], order[part + step]])
                differing = np.bitwise_count(hashes[pairs[0]] ^ hashes[pairs[1]]).sum(axis=1)
                # Pictures without a different bit were compared first: there may be many, all of them blank.
                pairs = pairs[:, (differing <= MOST_BITS) & ((differing > 0) | (n == 0))]
                yield pairs[:, _look_alike(thumbs[pairs[0]], thumbs[pairs[1]])]


def _look_alike(a_PT: NDArray[np.uint8], b_PT: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether small versions show the same, shape (P,)."""
    a_PT, b_PT = a_PT.astype(np.float32), b_PT.astype(np.float32)
    near = np.abs(a_PT - b_PT).mean(axis=1) <= MOST_GREY
    spread_a, spread_b = a_PT.std(axis=1), b_PT.std(axis=1)
    a_PT, b_PT = a_PT - a_PT.mean(axis=1, keepdims=True), b_PT - b_PT.mean(axis=1, keepdims=True)
    correlation = (a_PT * b_PT).mean(axis=1) / np.maximum(spread_a * spread_b, 1e-6)
    return near & ((correlation >= LEAST_CORRELATION) | (np.maximum(spread_a, spread_b) < FLAT))
