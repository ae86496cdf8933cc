"""What sources of image files share: names that can be kept and trusted, sizes, and lists made into a source."""

import os
import posixpath
import stat
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.errors import UserError
from shards.progress import Progress
from shards.sources.source import Listing, Source, fingerprint

PEEKED = 4096  # bytes
LATEST = 2**63 - 1  # nanoseconds since 1970: in 2262, after which file systems may date files, too
LOOKED_AT = 1000  # files, for a step of the progress bar


@dataclass(frozen=True)
class FileReader:
    """Reads image files by their path relative to `root`."""

    root: Path

    def __call__(self, name: str) -> bytes:
        """Return a file's bytes; none of a pipe, for which a reader would wait."""
        with open(self.root / name, "rb", buffering=0, opener=_without_waiting) as file:
            return file.read() or b""  # None of a pipe that somebody may yet write to

    def peek(self, name: str) -> bytes:
        """Return a file's last bytes: its first ones are often those of its kind."""
        with open(self.root / name, "rb", buffering=0) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - PEEKED))
            return file.read(PEEKED)

    def check_folder_of(self, name: str, error: OSError) -> None:
        """Raise a UserError if the folder of a file that could not be read cannot be listed either."""
        folder = (self.root / name).parent
        try:
            os.scandir(folder).close()
        except OSError:
            raise UserError(
                f"{folder} was there when the images were listed and is not any more ({error.strerror}); bring it back,"
                " and give the same command again to resume"
            ) from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


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
    """Names are those of files inside the source's folder (UserError)."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise UserError(f"{name!r}: no file can have that name") from None
    if not name:
        raise UserError(f"{name!r}: the name is empty")
    if name.startswith("/") or "\0" in name or (".." in name and ".." in name.split("/")):
        raise UserError(f"{name!r} leads out of the source's folder; give names relative to it, without '..'")


def printable(name: str) -> str:
    """How a name is stored: in one line of UTF-8 text, with escapes for other bytes, line breaks and control codes."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def escaped_note(splits: Mapping[str, Listing]) -> list[str]:
    """A line about names that are not stored as they are."""
    names = (name for listing in splits.values() for name in listing.names if not name.isprintable())
    if escaped := [shown for name in names if (shown := printable(name)) != name]:
        return [f"names with bytes that are not UTF-8 text, or control codes, are stored with escapes: {some(escaped)}"]
    return []


class FoundFiles:
    """Image files as they are listed: names, sizes and when they last changed."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sizes = array("q")
        self.changed = array("q")

    def add(self, name: str, path: str) -> None:
        """Look at a file and add it; one that is missing, or cannot be looked at, has a size of -1."""
        self.names.append(name)
        try:
            link = os.lstat(path)
            found = os.stat(path) if stat.S_ISLNK(link.st_mode) else link
        except OSError:
            self.sizes.append(-1)
            self.changed.append(-1)
            return
        self.sizes.append(found.st_size)
        # A file that is moved to another's place keeps its time of writing, but not the other one. A link that leads to
        # another file now may lead to one that is old in both.
        changed = max(found.st_mtime_ns, found.st_ctime_ns, link.st_ctime_ns)
        self.changed.append(min(changed, LATEST))

    def listing(self, labels: Sequence[int]) -> Listing:
        """Return them with their labels."""
        return Listing(
            self.names,
            np.array(labels, dtype=np.int64),
            np.array(self.sizes, dtype=np.int64),
            np.array(self.changed, dtype=np.int64),
        )


def look_at(root: Path, names: Sequence[str], labels: Sequence[int]) -> Listing:
    """List files by names relative to `root`, looking at each once."""
    found = FoundFiles()
    with Progress("list", len(names)) as progress:
        for i, name in enumerate(names, 1):
            found.add(name, f"{root}/{name}")
            if i % LOOKED_AT == 0:
                progress.add(LOOKED_AT)
    return found.listing(labels)


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
    notes = list(skipped)
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
        splits[split] = look_at(root, names, labels)
    if repeated:
        notes.append(f"images that are listed again are left out: {some(repeated)}")

    _check_files(root, splits, classes, notes)
    splits, kept = _without_untrained(splits, classes, notes)
    names_C = _distinct([printable(classes[j]) for j in kept], kept)
    if len(names_C) < 2:
        raise UserError(f"{root}: classes with training images: {len(names_C)}; a dataset needs at least two")
    splits = {split: splits[split] for split in lists if len(splits[split])}
    reader = FileReader(root)
    return Source(
        names_C,
        splits,
        reader,
        fingerprint(names_C, splits),
        peek=reader.peek,
        notes=tuple(escaped_note(splits)),
        skipped=tuple(notes),
        **attributes,
    )


def _check_files(root: Path, splits: dict[str, Listing], classes: Sequence[str], notes: list[str]) -> None:
    """Tell of files that are missing; UserError where nothing could be built without them."""
    missing = []
    for split, listing in splits.items():
        absent = np.flatnonzero(_sizes(listing) < 0)
        missing += [listing.names[i] for i in absent]
        if len(listing) and len(absent) == len(listing):
            raise UserError(
                f"no {split} image is there (listed: {len(listing):,}): {root / listing.names[0]} is missing"
            )
    if missing:
        notes.append(f"files that are listed and not there: {some(missing)}")
    train = splits["train"]
    listed_C = train.class_counts(len(classes))
    there_C = np.bincount(train.labels[_sizes(train) >= 0], minlength=len(classes))
    if (gone := np.flatnonzero((listed_C > 0) & (there_C == 0))).size:
        j = int(gone[0])
        first = train.names[int(np.flatnonzero(train.labels == j)[0])]
        raise UserError(
            f"no training image of class {classes[j]!r} is there (listed: {listed_C[j]:,}): {root / first} is missing"
        )


def _without_untrained(
    splits: dict[str, Listing], classes: Sequence[str], notes: list[str]
) -> tuple[dict[str, Listing], list[int]]:
    """Leave out classes without a training image; return the splits with labels that count what is kept."""
    trained_C = splits["train"].class_counts(len(classes)) > 0
    if trained_C.all():
        return splits, list(range(len(classes)))
    untrained = [classes[j] for j in np.flatnonzero(~trained_C).tolist()]
    notes.append(f"classes without a training image are left out: {some(untrained)}")
    new_label_C = np.cumsum(trained_C) - 1
    kept_splits = {}
    for split, listing in splits.items():
        kept = listing[np.flatnonzero(trained_C[listing.labels])]
        if len(kept) < len(listing):
            notes.append(f"{split} images of such classes are left out: {len(listing) - len(kept)}")
        kept_splits[split] = replace(kept, labels=new_label_C[kept.labels])
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
