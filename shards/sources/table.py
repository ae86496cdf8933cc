"""Images that a CSV file lists: a header with path, label and perhaps split; paths relative to the file.

path,label,split
2024/may/0001.jpg,scratch,train          labels are any text; split is train, val (or validation) or test
"""

import csv
from io import StringIO
from pathlib import Path

from shards.errors import UserError
from shards.sources.files import listed_source, read_text
from shards.sources.folder import SPLIT_FOLDERS as SPLIT_NAMES
from shards.sources.source import Source


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
        for name in ("path", "label"):
            if header.count(name) != 1:
                raise UserError(
                    f"{path}: the first line has no column {name!r} ({', '.join(header)}); it needs path,label"
                )
        at = {name: header.index(name) for name in ("path", "label", "split") if name in header}
        entries = []
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise UserError(f"{path} line {rows.line_num}: {len(row)} values for {len(header)} columns")
            name, label, split = row[at["path"]].strip(), row[at["label"]].strip(), "train"
            if "split" in at and (split := row[at["split"]].strip().lower()) not in SPLIT_NAMES:
                raise UserError(f"{path} line {rows.line_num}: split {split!r} is none of train, val and test")
            if not name or not label:
                raise UserError(f"{path} line {rows.line_num}: the {'label' if name else 'path'} is empty")
            entries.append((name, label, SPLIT_NAMES[split]))
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: {error}") from None

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
    return listed_source(path.parent, lists, classes)
