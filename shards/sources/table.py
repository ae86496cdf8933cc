"""Images that a CSV file lists: a header with path, label and perhaps split; paths relative to the file.

path,label,split
2024/may/0001.jpg,scratch,train          labels are any text; split is train, val or test (see splits.py)
../2023/0007.jpg,scratch,train           anywhere on this machine
/mnt/camera/0009.jpg,dent,test

Where a path leads out of the file's folder, the dataset names its images relative to the folder that all of them
share: no path of this machine is stored, and images that are moved together stay the same images.
"""

import csv
import os
from functools import cache
from io import StringIO
from pathlib import Path

from shards.errors import UserError
from shards.remote import cache_folder
from shards.sources.files import listed_source, read_text
from shards.sources.source import Source
from shards.sources.splits import split_of


def open_source(path: Path | None) -> Source:
    """List the images of a CSV file. Classes are sorted by name, as numbers where all are whole numbers.

    Raises:
        UserError: no `path`, no such file, a header or line that lacks something, or images that are not there.
    """
    if path is None:
        raise UserError("csv needs --source FILE, a CSV file with the columns path, label and perhaps split")
    if path.is_dir():
        raise UserError(f"--source {path} is a folder; give a CSV file with the columns path, label and perhaps split")
    rows = csv.reader(StringIO(read_text(path), newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        for name in ("path", "label", "split"):
            if header.count(name) > 1:
                raise UserError(f"{path}: the first line has the column {name!r} more than once ({', '.join(header)})")
            if name not in header and name != "split":
                raise UserError(
                    f"{path}: the first line has no column {name!r} ({', '.join(header)}); it needs path,label"
                )
        at = {name: header.index(name) for name in ("path", "label", "split") if name in header}
        entries = []
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise UserError(f"{path} line {rows.line_num}: values: {len(row)}, columns: {len(header)}")
            name, label, split = row[at["path"]].strip(), row[at["label"]].strip(), "train"
            if "split" in at:
                split = split_of(row[at["split"]]) or ""
                if not split:
                    word = row[at["split"]].strip()
                    raise UserError(f"{path} line {rows.line_num}: split {word!r} is none of train, val and test")
            if not name or not label:
                raise UserError(f"{path} line {rows.line_num}: the {'label' if name else 'path'} is empty")
            entries.append((name, label, split))
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: {error}") from None

    root, names = _shared_folder(path, [name for name, _, _ in entries])
    entries = [(name, label, split) for name, (_, label, split) in zip(names, entries, strict=True)]
    labels = {label for _, label, _ in entries}
    numbers = all(label.isdecimal() for label in labels)
    classes = sorted(labels, key=(lambda label: (int(label), label)) if numbers else None)
    label_of = {name: label for label, name in enumerate(classes)}
    found = [split for split in ("train", "val", "test") if any(entry[2] == split for entry in entries)]
    if "train" not in found:
        raise UserError(f"{path} lists no training images")
    lists = {
        split: (
            [name for name, _, of in entries if of == split],
            [label_of[label] for _, label, of in entries if of == split],
        )
        for split in found
    }
    return listed_source(root, lists, classes)


def _shared_folder(path: Path, names: list[str]) -> tuple[Path, list[str]]:
    """The folder of the file, or where images lie outside it the one that all lie in; names relative to it."""
    # A list from elsewhere names what came with it, and not the files of this machine.
    fetched = path.resolve().is_relative_to(cache_folder().resolve())
    if fetched or not any(name.startswith("/") or ".." in name.split("/") for name in names):
        return path.parent, names
    real = cache(os.path.realpath)  # of few folders

    def without_dots(name: str) -> str:
        # Links stay, but for one that ".." follows: that leads to the folder above the link's goal.
        before, dots, behind = name.rpartition("/../")
        return os.path.normpath(os.path.join(real(f"{before}/.."), behind) if dots else name)

    paths = [without_dots(os.path.join(real(path.parent), name)) for name in names]
    folder = os.path.commonpath({os.path.dirname(name) for name in paths})
    return Path(folder), [os.path.relpath(name, folder) for name in paths]
