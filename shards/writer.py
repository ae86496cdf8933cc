"""Write one shard: a plain WebDataset tar, its text index, and what is known about each sample.

    000000012.png  000000012.cls  000000013.png  000000013.cls  …     the label is ASCII digits

Worker processes run `write_shard`; everything it takes and returns can be pickled.
"""

import hashlib
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from shards.encode import BadImageError, Encoded
from shards.index import SAMPLE
from shards.sources import Listing
from shards.sources.files import FileReader, printable
from shards.staging import Staging

MOST_BYTES = 1 << 30  # of a file: it would take that much memory, and could not be stored


@dataclass(frozen=True)
class ShardJob:
    """One shard to write.

    Attributes:
        staging: where to.
        name: the file's name without its end, such as "train-000012".
        first: position of the first image in its split's plan; the samples' keys count on from it.
        images: what to write.
        read: gives an image's bytes by its name.
        encode: gives what to store for these bytes.
        build: what identifies the build: a shard that another one left is not taken for this one's.
    """

    staging: Staging
    name: str
    first: int
    images: Listing
    read: Callable[[str], bytes]
    encode: Callable[[bytes], Encoded]
    build: str = ""


class Written(NamedTuple):
    """What a shard came to: samples, rejected images, and the first of those with its reason ("" for none)."""

    samples: int
    rejected: int
    example: str


def write_shard(job: ShardJob) -> Written:
    """Read, check, encode and write one shard's images, and a record of it for `read_written`.

    Raises:
        OSError: the shard cannot be written.
    """
    rows = []
    names = []
    pictures = []
    rejected: list[dict[str, Any]] = []
    members: list[tarfile.TarInfo] = []
    with job.staging.writing(*(f"{job.name}.{end}" for end in ("tar", "idx", "npy", "names.txt", "pictures"))) as paths:
        tar_path, index_path, rows_path, names_path, pictures_path = paths
        with tar_path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i, name in enumerate(job.images.names):
                label = int(job.images.labels[i])
                try:
                    image = job.encode(read_image(job.images, i, job.read))
                except BadImageError as error:
                    rejected.append({"label": label, "source": printable(name), "reason": str(error)})
                    continue
                key = f"{job.first + i:09d}"
                members += [
                    _add(tar, f"{key}.{image.extension}", image.data),
                    _add(tar, f"{key}.cls", str(label).encode("ascii")),
                ]
                rows.append((members[-2].offset_data, len(image.data), 0, label, image.height, image.width))
                names.append(printable(name))
                pictures.append(image.picture)
        index_path.write_text(index_text(members), encoding="ascii")
        with rows_path.open("wb") as file:
            np.save(file, np.array(rows, dtype=SAMPLE))
        names_path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        pictures_path.write_bytes(b"".join(pictures))
        entry = {
            "file": f"{job.name}.tar",
            "samples": len(rows),
            "bytes": tar_path.stat().st_size,
            "sha256": sha256(tar_path),
            "index_sha256": sha256(index_path),
        }
    record = {"build": job.build, "entry": entry, "rejected": rejected}
    job.staging.write_json(f"{job.name}.json", record)
    return _written(record)


def read_written(staging: Staging, name: str, sizes: Mapping[str, int], build: str = "") -> Written | None:
    """Return what a shard that an earlier builder wrote came to; None if it is not among the files of these `sizes`."""
    record = staging.read_json(f"{name}.json") if f"{name}.json" in sizes else None
    if not is_of(record, build, sizes) or f"{name}.pictures" not in sizes:
        return None
    return _written(record)


def is_of(record: dict[str, Any] | None, build: str, sizes: Mapping[str, int]) -> TypeGuard[dict[str, Any]]:
    """Whether a shard's record, None where there is none, is of this build and of the shard that lies there."""
    if record is None or record.get("build") != build:
        return False
    return bool(sizes.get(record["entry"]["file"]) == record["entry"]["bytes"])


def _written(record: dict[str, Any]) -> Written:
    rejected = record["rejected"]
    example = f"{rejected[0]['source']}: {rejected[0]['reason']}" if rejected else ""
    return Written(record["entry"]["samples"], len(rejected), example)


def read_image(images: Listing, i: int, read: Callable[[str], bytes]) -> bytes:
    """Return a listed image's bytes.

    Raises:
        BadImageError: it cannot be read, or has changed since it was listed.
        UserError: its whole folder is gone, as when a disk is unplugged: not the image's fault, and not to be recorded.
    """
    if images.sizes is not None and images.sizes[i] > MOST_BYTES:
        raise BadImageError("more than a gigabyte")
    try:
        data = read(images.names[i])
    except PermissionError:
        raise BadImageError("no permission to read it") from None
    except OSError as error:
        if isinstance(read, FileReader) and images.sizes is not None and images.sizes[i] >= 0:
            read.check_folder_of(images.names[i], error)
        raise BadImageError("cannot be read") from None
    if images.sizes is not None and images.sizes[i] != len(data):
        raise BadImageError("changed since it was listed")
    return data


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


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tarfile.TarInfo:
    """Append a member with a header that is the same everywhere; its `offset_data` is set."""
    member = tarfile.TarInfo(name)  # owner 0, mode 0644, time 0
    member.size = len(data)
    assert tar.fileobj is not None
    member.offset_data = tar.fileobj.tell() + tarfile.BLOCKSIZE
    tar.addfile(member, BytesIO(data))
    return member
