"""What sources of image files share: names that can be kept and trusted, sizes, and lists made into a source."""

import os
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.errors import UserError
from shards.sources.source import Listing, Source, fingerprint


@dataclass(frozen=True)
class FileReader:
    """Reads image files by their path relative to `root`."""

    root: Path

    def __call__(self, name: str) -> bytes:
        """Return a file's bytes."""
        return (self.root / name).read_bytes()


def check_folder(dataset: str, path: Path | None, wanted: str) -> Path:
    """Return the folder given as --source; UserError where it is not given or no folder."""
    if path is None:
        raise UserError(f"{dataset} needs --source DIR, {wanted}")
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"--source {path} {what}; give {wanted}")
    return path


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark; UserError where that fails."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def check_name(name: str) -> None:
    """Names are kept one per line of a UTF-8 file, and stay inside the source's folder (UserError)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name!r}: the name is not valid UTF-8; rename it") from None
    if name.splitlines() != [name]:
        raise UserError(f"{name!r}: the name {'holds a line break; rename it' if name else 'is empty'}")
    if name.startswith("/") or "\0" in name or (".." in name and ".." in name.split("/")):
        raise UserError(f"{name!r} leads out of the source's folder; give names relative to it, without '..'")


def file_sizes(root: Path, names: Sequence[str]) -> NDArray[np.int64]:
    """Each file's size in bytes, -1 for one that is missing or cannot be looked at; shape (N,), int64."""

    def size(name: str) -> int:
        try:
            return os.stat(f"{root}/{name}").st_size
        except OSError:
            return -1

    return np.fromiter(map(size, names), dtype=np.int64, count=len(names))


def listed_source(
    root: Path,
    lists: Mapping[str, tuple[Sequence[str], ArrayLike]],
    classes: Sequence[str],
    *,
    skipped: Sequence[str] = (),
    **attributes: Any,
) -> Source:
    """Make a source of files that lists name, and look at each file once.

    An image that is listed again is left out: the test split keeps its images before val, and val before train.
    So is a class that has no training image, with its other images. The order of the lists plays no part.

    Args:
        root: the folder of the images.
        lists: names relative to `root`, and labels, integers that count into `classes`, for each split.
        classes: class names; two that are alike get their label behind.
        skipped: lines about what the caller left out.
        attributes: further attributes of the `Source`.

    Raises:
        UserError: an image with two labels, a name that leads out of the folder, no image there at all, a class
            whose training images are all missing, or fewer than two classes.
    """
    told = list(skipped)
    splits = {}
    label_of: dict[str, int] = {}
    repeated: list[str] = []
    for split in sorted(lists, key=("test", "val", "train").index):
        names: list[str] = []
        labels: list[int] = []
        for name in lists[split][0]:
            check_name(name)
        listed = map(posixpath.normpath, lists[split][0])  # ./a//b.jpg and a/b.jpg are one
        for name, label in sorted(zip(listed, np.asarray(lists[split][1], np.int64).tolist(), strict=True)):
            if name in label_of:
                if label_of[name] != label:
                    raise UserError(
                        f"{name} is listed as {classes[label_of[name]]!r} and as {classes[label]!r}; keep one of them"
                    )
                repeated.append(name)
                continue
            label_of[name] = label
            names.append(name)
            labels.append(label)
        splits[split] = Listing(names, np.array(labels, dtype=np.int64), file_sizes(root, names))
    if repeated:
        told.append(f"images that are listed again are left out: {some(repeated)}")

    _check_files(root, splits, classes, told)
    splits, kept = _without_untrained(splits, classes, told)
    names_C = _distinct([classes[j] for j in kept], kept)
    if len(names_C) < 2:
        raise UserError(f"{root}: classes with training images: {len(names_C)}; a dataset needs at least two")
    splits = {split: splits[split] for split in lists if len(splits[split])}
    return Source(names_C, splits, FileReader(root), fingerprint(names_C, splits), skipped=tuple(told), **attributes)


def _check_files(root: Path, splits: dict[str, Listing], classes: Sequence[str], told: list[str]) -> None:
    """Tell of files that are missing; UserError where nothing could be built without them."""
    missing = []
    for split, listing in splits.items():
        absent = np.flatnonzero(_sizes(listing) < 0)
        missing += [listing.names[i] for i in absent]
        if len(listing) and len(absent) == len(listing):
            raise UserError(
                f"none of the {len(listing):,} {split} images is there: {root / listing.names[0]} is missing"
            )
    if missing:
        told.append(f"files that are listed and not there: {some(missing)}")
    train = splits["train"]
    listed_C = train.class_counts(len(classes))
    there_C = np.bincount(train.labels[_sizes(train) >= 0], minlength=len(classes))
    if (gone := np.flatnonzero((listed_C > 0) & (there_C == 0))).size:
        j = int(gone[0])
        first = train.names[int(np.flatnonzero(train.labels == j)[0])]
        raise UserError(
            f"none of the {listed_C[j]} training images of class {classes[j]!r} is there: {root / first} is missing"
        )


def _without_untrained(
    splits: dict[str, Listing], classes: Sequence[str], told: list[str]
) -> tuple[dict[str, Listing], list[int]]:
    """Leave out classes without a training image; return the splits with labels that count what is kept."""
    trained_C = splits["train"].class_counts(len(classes)) > 0
    if trained_C.all():
        return splits, list(range(len(classes)))
    untrained = [classes[j] for j in np.flatnonzero(~trained_C).tolist()]
    told.append(f"classes without a training image are left out: {some(untrained)}")
    new_label_C = np.cumsum(trained_C) - 1
    kept_splits = {}
    for split, listing in splits.items():
        kept = listing[np.flatnonzero(trained_C[listing.labels])]
        if len(kept) < len(listing):
            told.append(f"{split} images of such classes are left out: {len(listing) - len(kept)}")
        kept_splits[split] = Listing(kept.names, new_label_C[kept.labels], kept.sizes)
    return kept_splits, np.flatnonzero(trained_C).tolist()


def _distinct(names: list[str], labels: list[int]) -> list[str]:
    """Put the label behind names that several classes have."""
    times = Counter(names)
    return [f"{name} ({label})" if times[name] > 1 else name for name, label in zip(names, labels, strict=True)]


def _sizes(listing: Listing) -> NDArray[np.int64]:
    assert listing.sizes is not None
    return listing.sizes


def some(names: Sequence[str], limit: int = 3) -> str:
    """Count names and give a few: "7 (a, b, c, …)"."""
    return f"{len(names):,} ({', '.join(names[:limit])}{', …' if len(names) > limit else ''})"
