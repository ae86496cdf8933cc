"""Read a built dataset again and compare everything with everything."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.encode import BadImageError, encode
from shards.errors import UserError
from shards.groups import imbalance_factor
from shards.index import MANIFEST, Split, image_sizes, open_split, read_manifest
from shards.parallel import run_jobs
from shards.progress import Progress
from shards.staging import REJECTED
from shards.writer import index_text, sha256


def verify(root: Path, *, decode: bool = True, workers: int | None = None) -> list[str]:
    """Compare a dataset's shards, indexes, arrays and checksums with its manifest and with each other.

    Args:
        root: the dataset's folder.
        decode: also decode every image.
        workers: processes; if None, one per available core.

    Returns:
        A line per problem, naming the file.

    Raises:
        UserError: `root` is no dataset, or its manifest is damaged.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; give a whole number of at least 1")
    manifest = read_manifest(root)
    try:
        return _problems(root, manifest, decode, workers)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{root / MANIFEST} is damaged ({error!r}); build the dataset again") from None


def _problems(root: Path, manifest: dict[str, Any], decode: bool, workers: int | None) -> list[str]:
    problems = []
    checks = []
    sizes = []
    for name, entry in manifest["splits"].items():
        problems += [p for file, digest in entry["files"].items() for p in _file_problems(root / file, digest)]
        samples = None
        try:
            split = open_split(root, name, entry)
        except UserError as error:
            problems.append(str(error))
        else:
            samples = split.samples
            sizes.append(samples[["height", "width"]])
            problems += _split_problems(root, split, len(manifest["classes"]))
        if entry["samples"] != sum(shard["samples"] for shard in entry["shards"]):
            problems.append(f"{MANIFEST}: the {name} shards do not add up to {entry['samples']} samples")
        checks += [
            _ShardCheck(root, shard, None if samples is None else samples[samples["shard"] == i], decode)
            for i, shard in enumerate(entry["shards"])
        ]
    problems += _manifest_problems(root, manifest, sizes)

    total = sum(check.entry["samples"] for check in checks)
    with Progress("verify", total) as progress:
        found = run_jobs(
            _check_shard,
            checks,
            n_images=total,
            workers=workers,
            done=lambda result: progress.add(result.samples),
        )
    return problems + [problem for result in found for problem in result.problems]


def _file_problems(path: Path, digest: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name}: missing"
    elif sha256(path) != digest:
        yield f"{path.name}: its checksum is not the manifest's"


def _split_problems(root: Path, split: Split, n_classes: int) -> Iterator[str]:
    """Compare a split's arrays with each other and with the manifest."""
    labels = split.samples["label"]
    if len(labels) and not (labels.min() >= 0 and labels.max() < n_classes):
        yield f"{split.name}.samples.npy: a label is outside 0 to {n_classes - 1}"
        return
    if not np.array_equal(np.bincount(labels, minlength=n_classes), split.class_counts):
        yield f"{split.name}.samples.npy: the labels do not add up to the manifest's class counts"
    if not np.array_equal(split.by_class, np.argsort(labels, kind="stable")):
        yield f"{split.name}.by_class.npy: not the sample ids sorted by class"
    shards = split.samples["shard"]
    if len(shards) and not (shards.min() >= 0 and shards.max() < len(split.shard_paths)):
        yield f"{split.name}.samples.npy: a shard is outside 0 to {len(split.shard_paths) - 1}"
    try:
        n_names = len(split.sample_names())
    except (OSError, UnicodeDecodeError):
        return  # its checksum has told
    if n_names != len(split):
        yield f"{split.name}.names.txt: {n_names} names for {len(split)} samples"


def _manifest_problems(root: Path, manifest: dict[str, Any], sizes: list[NDArray[np.void]]) -> Iterator[str]:
    """Compare the manifest's summaries with what they sum up."""
    factor = imbalance_factor(manifest["splits"]["train"]["class_counts"])
    if manifest["imbalance_factor"] != factor:
        yield f"{MANIFEST}: imbalance factor {manifest['imbalance_factor']}, the class counts give {factor}"
    if len(sizes) == len(manifest["splits"]) and manifest["image"] != image_sizes(sizes):
        yield f"{MANIFEST}: the image sizes are not those in the arrays"
    try:
        n_rejected = len((root / REJECTED).read_bytes().splitlines())
    except OSError:
        yield f"{REJECTED}: missing"
    else:
        if n_rejected != manifest["rejected"]["total"]:
            yield f"{REJECTED}: {n_rejected} lines, the manifest counts {manifest['rejected']['total']}"


@dataclass(frozen=True)
class _ShardCheck:
    """A shard to check: its manifest entry and its rows of the samples array, None if that is lost."""

    root: Path
    entry: dict[str, Any]
    rows: NDArray[np.void] | None
    decode: bool


@dataclass(frozen=True)
class _ShardResult:
    samples: int
    problems: list[str]


def _check_shard(check: _ShardCheck) -> _ShardResult:
    path = check.root / check.entry["file"]
    return _ShardResult(check.entry["samples"], list(_shard_problems(path, check)))


def _shard_problems(path: Path, check: _ShardCheck) -> Iterator[str]:
    index_path = path.with_suffix(".idx")
    yield from _file_problems(path, check.entry["sha256"])
    yield from _file_problems(index_path, check.entry["index_sha256"])
    if not path.is_file():
        return
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        yield f"{path.name}: no whole tar ({error})"
        return
    images, labels = members[0::2], members[1::2]
    if [member.name for member in labels] != [f"{Path(member.name).stem}.cls" for member in images]:
        yield f"{path.name}: its members are not pairs of an image and its .cls"
        return
    if index_path.is_file() and index_path.read_bytes() != index_text(members).encode():
        yield f"{index_path.name}: does not describe {path.name}"
    n_rows = check.entry["samples"] if check.rows is None else len(check.rows)
    if len(images) != n_rows:
        yield f"{path.name}: {len(images)} samples, expected {n_rows}"
        return
    with path.open("rb") as file:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            row = None if check.rows is None else check.rows[i]
            file.seek(label.offset_data)
            cls = file.read(label.size)
            if row is not None and (image.offset_data, image.size) != (row["offset"], row["size"]):
                yield f"{path.name}: {image.name} lies elsewhere than the samples array says"
            if row is not None and cls != str(row["label"]).encode():
                yield f"{path.name}: {label.name} holds {cls!r}, the samples array says {row['label']}"
            if check.decode:
                file.seek(image.offset_data)
                yield from _image_problems(f"{path.name}: {image.name}", file.read(image.size), row)


def _image_problems(name: str, data: bytes, row: np.void | None) -> Iterator[str]:
    try:
        decoded = encode(data)
    except BadImageError as error:
        yield f"{name}: {error}"
        return
    if decoded.data is not data:
        yield f"{name}: not an upright 8-bit RGB or greyscale JPEG or PNG"
    if row is not None and (decoded.height, decoded.width) != (row["height"], row["width"]):
        yield (
            f"{name}: {decoded.height}x{decoded.width} pixels, the samples array says {row['height']}x{row['width']}"
        )
