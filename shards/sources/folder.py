"""Any image collection laid out as a folder per class, with or without official splits.

    pets/cat/*.jpg                  or    pets/train/cat/*.jpg
    pets/dog/2024/may/*.png               pets/test/cat/*.jpg      (and/or val/ or validation/)

Images may lie at any depth below their class folder. Hidden files and folders are skipped; files whose
extension is not that of an image that PIL reads are skipped and counted.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np

from shards.encode import EXTENSIONS
from shards.errors import UserError
from shards.sources.files import FileReader, check_folder, check_name, file_sizes
from shards.sources.source import Listing, Source, fingerprint

SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "val", "validation": "val"}


def open_source(path: Path | None) -> Source:
    """List a folder's images; names are paths relative to `path`.

    Raises:
        UserError: no `path`, or a folder that does not hold at least two classes with images.
    """
    root = check_folder("folder", path, "a folder with one sub-folder of images per class")
    split_roots = _split_roots(root)
    class_folders = {name: _sub_folders(folder) for name, folder in split_roots.items()}
    classes = sorted({folder.name for folders in class_folders.values() for folder in folders})
    if len(classes) == 1:
        raise UserError(f"{root} holds only one class, {classes[0]!r}; a dataset needs at least two")

    label_of = {name: label for label, name in enumerate(classes)}
    skipped: Counter[str] = Counter()
    splits = {}
    for split, folders in class_folders.items():
        names: list[str] = []
        labels: list[int] = []
        for folder in folders:
            images, others = _images(folder)
            if not images:
                found = f" (only {_kinds(others)})" if others else ""
                raise UserError(f"class folder {folder} holds no images{found}; add some or remove the folder")
            skipped += others
            for image in images:
                name = image.relative_to(root).as_posix()
                check_name(name)
                names.append(name)
            labels += [label_of[folder.name]] * len(images)
        # A dangling link is told when it is read.
        splits[split] = Listing(names, np.array(labels, dtype=np.int64), file_sizes(root, names))

    untrained = sorted(set(classes) - {folder.name for folder in class_folders["train"]})
    if untrained:
        raise UserError(
            f"class {untrained[0]!r} has no training images: {split_roots['train'] / untrained[0]} is missing"
        )
    notes = []
    if loose := sum(_is_image(path.name) for folder in split_roots.values() for path in folder.iterdir()):
        notes.append(f"images that lie in no class folder are skipped: {loose}")
    if skipped:
        notes.append(f"files that this PIL does not read as images are skipped: {_kinds(skipped)}")
    return Source(classes, splits, FileReader(root), fingerprint(classes, splits), notes=tuple(notes))


def _split_roots(root: Path) -> dict[str, Path]:
    """Find the official splits' folders; a folder without them is all training."""
    folders = _sub_folders(root)
    found = [folder for folder in folders if folder.name in SPLIT_FOLDERS]
    names = [folder.name for folder in found]
    if "train" not in names or len(found) == 1:
        return {"train": root}
    others = [folder.name for folder in folders if folder not in found]
    if others:
        raise UserError(f"{root} holds splits ({', '.join(names)}) beside {others[0]!r}; move that away")
    if {"val", "validation"} <= set(names):
        raise UserError(f"{root} holds both val and validation; merge them or move one away")
    return {SPLIT_FOLDERS[folder.name]: folder for folder in found}


def _sub_folders(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise UserError(f"{folder} holds no class folders; give a folder with one sub-folder of images per class")
    return found


def _images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """List the image files below a class folder in a fixed order, and count the other files by extension."""
    images = []
    others: Counter[str] = Counter()
    for parent, folders, files in os.walk(folder, onerror=_fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if _is_image(name):
                images.append(Path(parent, name))
            elif not name.startswith("."):
                others[Path(name).suffix.lower() or "without extension"] += 1
    return sorted(images), others


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")


def _kinds(files: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in files.most_common(5))


def _fail(error: OSError) -> None:
    raise error
