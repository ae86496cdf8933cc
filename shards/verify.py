"""Read a built dataset again and compare everything with everything."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
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
from shards.remote import cached_dataset, is_url, origin, whole_cached_dataset
from shards.staging import REJECTED, file_names
from shards.writer import index_text, sha256


def verify(root: Path | str, *, decode: bool = True, workers: int | None = None) -> list[str]:
    """Compare a dataset's shards, indexes, arrays and checksums with its manifest and with each other.

    Args:
        root: the dataset's folder, or its URL: then all of it is fetched into the cache first.
        decode: also decode every image.
        workers: processes; if None, one per available core.

    Returns:
        A line per problem, naming the file.

    Raises:
        UserError: `root` is no dataset, or its manifest is damaged.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; give a whole number of at least 1")
    url = str(root) if is_url(root) else origin(Path(root))  # also of a remote dataset's folder in the cache
    root = Path(root) if url is None else cached_dataset(url, MANIFEST)
    manifest = read_manifest(root)
    try:
        problems = [] if url is None else whole_cached_dataset(url, MANIFEST, REJECTED)[1]
        return problems + _problems(root, manifest, decode, workers)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{root / MANIFEST} is damaged ({error!r}); build the dataset again") from None
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None


def _problems(root: Path, manifest: dict[str, Any], decode: bool, workers: int | None) -> list[str]:
    problems = []
    checks = []
    sizes = []
    for name, entry in manifest["splits"].items():
        problems += [p for file, digest in entry["files"].items() for p in _file_problems(root / file, digest)]
        shard_rows: list[NDArray[np.void] | None] = [None] * len(entry["shards"])
        try:
            split = open_split(root, name, entry)
        except UserError as error:
            problems.append(str(error))
        else:
            problems += _split_problems(root, split, len(manifest["classes"]))
            shard_rows = _rows_by_shard(split.samples, len(entry["shards"]))
            if len(split):
                sizes.append(split.samples[["height", "width"]])
        if entry["samples"] != sum(shard["samples"] for shard in entry["shards"]):
            problems.append(f"{MANIFEST}: the {name} shards do not add up to {entry['samples']} samples")
        checks += [_ShardCheck(root, *of, decode) for of in zip(entry["shards"], shard_rows, strict=True)]
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


def _rows_by_shard(samples: NDArray[np.void], n_shards: int) -> list[NDArray[np.void] | None]:
    """Cut a split's rows into those of each shard: views, unless the rows are out of order."""
    shards = samples["shard"]
    if (np.diff(shards) < 0).any():
        samples = samples[np.argsort(shards, kind="stable")]
        shards = samples["shard"]
    bounds = np.searchsorted(shards, np.arange(n_shards + 1))
    return [samples[start:end] for start, end in pairwise(bounds)]


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
    if (np.diff(shards) < 0).any():
        yield f"{split.name}.samples.npy: the rows are not in the order of the shards"
    try:
        with (root / f"{split.name}.names.txt").open("rb") as file:
            n_names = sum(1 for _ in file)
    except OSError:
        return  # reported already: its checksum differs
    if n_names != len(split):
        yield f"{split.name}.names.txt: names: {n_names}, samples: {len(split)}"


def _manifest_problems(root: Path, manifest: dict[str, Any], sizes: list[NDArray[np.void]]) -> Iterator[str]:
    """Compare the manifest's summaries with what they sum up."""
    factor = imbalance_factor(manifest["splits"]["train"]["class_counts"])
    if manifest["imbalance_factor"] != factor:
        yield f"{MANIFEST}: imbalance factor {manifest['imbalance_factor']}, the class counts give {factor}"
    if len(sizes) == len(manifest["splits"]) and manifest["image"] != image_sizes(sizes):
        yield f"{MANIFEST}: the image sizes are not those in the arrays"
    try:
        lines = (root / REJECTED).read_bytes().splitlines()
        reasons = Counter(json.loads(line)["reason"] for line in lines)
    except OSError:
        yield f"{REJECTED}: missing"
    except (ValueError, KeyError, TypeError) as error:
        yield f"{REJECTED}: damaged ({error!r})"
    else:
        if len(lines) != manifest["rejected"]["total"]:
            yield f"{REJECTED}: lines: {len(lines)}, the manifest counts {manifest['rejected']['total']}"
        elif reasons != manifest["rejected"]["reasons"]:
            yield f"{REJECTED}: the reasons are not those that the manifest counts"
    known = file_names(manifest)
    for path in sorted(root.iterdir()):
        if path.suffix in (".tar", ".idx") and path.name not in known:
            yield f"{path.name}: the manifest does not know it"


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
    try:
        problems = list(_shard_problems(path, check))
    except OSError as error:
        problems = [f"{path.name}: cannot be read ({error.strerror})"]
    return _ShardResult(check.entry["samples"], problems)


def _shard_problems(path: Path, check: _ShardCheck) -> Iterator[str]:
    index_path = path.with_suffix(".idx")
    yield from _file_problems(path, check.entry["sha256"])
    yield from _file_problems(index_path, check.entry["index_sha256"])
    if not path.is_file():
        return
    if (size := path.stat().st_size) != check.entry["bytes"]:
        yield f"{path.name}: {size} bytes long, the manifest says {check.entry['bytes']}"
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        yield f"{path.name}: not a complete tar file ({error})"
        return
    images, labels = members[0::2], members[1::2]
    if [member.name for member in labels] != [f"{Path(member.name).stem}.cls" for member in images]:
        yield f"{path.name}: its members are not pairs of an image and its .cls"
        return
    keys = [member.name for member in labels]
    if any(key >= following for key, following in pairwise(keys)):
        yield f"{path.name}: its keys are not in ascending order"
    if index_path.is_file() and index_path.read_bytes() != index_text(members).encode():
        yield f"{index_path.name}: does not describe {path.name}"
    n_rows = check.entry["samples"] if check.rows is None else len(check.rows)
    if len(images) != n_rows:
        yield f"{path.name}: samples: {len(images)}, expected {n_rows}"
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
    if decoded.data is not data or not name.endswith(decoded.extension):
        yield f"{name}: not an upright 8-bit RGB or greyscale JPEG or PNG, as its name says"
    if row is not None and (decoded.height, decoded.width) != (row["height"], row["width"]):
        yield (
            f"{name}: {decoded.height}x{decoded.width} pixels, the samples array says {row['height']}x{row['width']}"
        )
