"""Write one shard: a plain WebDataset tar, its text index, and what is known about each sample.

    000000012.png  000000012.cls  000000013.png  000000013.cls  …     the label is ASCII digits

Worker processes run `write_shard`; everything it takes and returns can be pickled.
"""

import hashlib
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.encode import BadImageError, Encoded, encode
from shards.index import SAMPLE
from shards.sources import Listing

REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class ShardJob:
    """One shard to write.

    Attributes:
        path: the tar; its folder exists.
        first: position of the first image in its split's plan; the samples' keys count on from it.
        images: what to write.
        read: gives an image's bytes by its name.
        shorter_side: as in `encode`.
        quality: as in `encode`.
    """

    path: Path
    first: int
    images: Listing
    read: Callable[[str], bytes]
    shorter_side: int | None
    quality: int


@dataclass(frozen=True)
class WrittenShard:
    """What one shard holds.

    Attributes:
        samples: shape (N,), dtype `SAMPLE`, in file order; `shard` is left 0.
        names: where each sample came from.
        rejected: {"label", "source", "reason"} of each image that could not be stored.
        entry: the manifest's entry: file, samples, bytes and checksums.
    """

    samples: NDArray[np.void]
    names: list[str]
    rejected: list[dict[str, Any]]
    entry: dict[str, Any]


def write_shard(job: ShardJob) -> WrittenShard:
    """Read, check, encode and write one shard's images.

    Raises:
        OSError: the shard cannot be written.
    """
    rows = []
    names = []
    rejected = []
    members: list[tarfile.TarInfo] = []
    with job.path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, name in enumerate(job.images.names):
            label = int(job.images.labels[i])
            try:
                image = _load(job, name)
            except BadImageError as error:
                rejected.append({"label": label, "source": name, "reason": str(error)})
                continue
            key = f"{job.first + i:09d}"
            members += [
                _add(tar, f"{key}.{image.extension}", image.data),
                _add(tar, f"{key}.cls", str(label).encode("ascii")),
            ]
            rows.append((members[-2].offset_data, len(image.data), 0, label, image.height, image.width))
            names.append(name)
    index_path = job.path.with_suffix(".idx")
    index_path.write_text(index_text(members), encoding="ascii")
    entry = {
        "file": job.path.name,
        "samples": len(rows),
        "bytes": job.path.stat().st_size,
        "sha256": sha256(job.path),
        "index_sha256": sha256(index_path),
    }
    return WrittenShard(np.array(rows, dtype=SAMPLE), names, rejected, entry)


def index_text(members: Sequence[tarfile.TarInfo]) -> str:
    """Return a shard's text index as wds2idx writes it, from its image and label members in turn."""
    lines = [f"v1.2 {len(members) // 2}"]
    for pair in zip(members[0::2], members[1::2], strict=True):
        groups = [f"{Path(m.name).suffix[1:]} {m.offset_data} {m.size} {m.name}" for m in pair]
        lines.append(" ".join(groups))
    return "\n".join(lines) + "\n"


def sha256(path: Path) -> str:
    """Return a file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(job: ShardJob, name: str) -> Encoded:
    try:
        data = job.read(name)
    except OSError:
        raise BadImageError("cannot be read") from None
    return encode(data, job.shorter_side, job.quality)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tarfile.TarInfo:
    """Append a member with a header that is the same everywhere; its `offset_data` is set."""
    member = tarfile.TarInfo(name)  # owner 0, mode 0644, time 0
    member.size = len(data)
    assert tar.fileobj is not None
    member.offset_data = tar.fileobj.tell() + tarfile.BLOCKSIZE
    tar.addfile(member, BytesIO(data))
    return member
