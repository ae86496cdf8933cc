"""Any image collection laid out as a folder per class, with or without official splits.

    pets/cat/*.jpg                  or    pets/train/cat/*.jpg
    pets/dog/2024/may/*.png               pets/test/cat/*.jpg      (and/or val/; see splits.py for other names)

Images may lie at any depth below their class folder. Hidden files and folders are skipped, and the thumbnails of a
network drive; so are files whose extension is not that of an image that PIL reads, and these are counted.
"""

import os
from collections import Counter
from pathlib import Path

from shards.encode import EXTENSIONS, UNREAD_EXTENSIONS, unread
from shards.errors import UserError
from shards.progress import Progress
from shards.sources.files import FileReader, FoundFiles, check_folder, escaped_note, printable
from shards.sources.source import Source, fingerprint
from shards.sources.splits import split_roots

THUMBNAILS = "@eaDir"  # Synology's drives make one in each folder, with smaller copies of its pictures


def open_source(path: Path | None) -> Source:
    """List a folder's images; names are paths relative to `path`.

    Raises:
        UserError: no `path`, or a folder that does not hold at least two classes with images.
    """
    root = check_folder("folder", path, "a folder with one sub-folder of images per class")
    notes: list[str] = []
    roots = split_roots(root, _sub_folders(root), lambda folder: any(map(_is_sub_folder, folder.iterdir())), notes)
    class_folders = {name: _sub_folders(folder) for name, folder in roots.items()}
    folder_names = sorted({folder.name for folders in class_folders.values() for folder in folders})
    if len(folder_names) == 1:
        raise UserError(f"{root} holds only one class, {folder_names[0]!r}; a dataset needs at least two")

    label_of = {name: label for label, name in enumerate(folder_names)}
    others: Counter[str] = Counter()
    splits = {}
    with Progress("list", None) as progress:
        for split, folders in class_folders.items():
            files = FoundFiles()
            labels: list[int] = []
            for folder in folders:
                found, foreign = _images(root, folder)
                if not found:
                    only = f" (only {_kinds(foreign)})" if foreign else ""
                    unreadable = _unread(foreign)
                    why = f"; {unread(unreadable)}" if unreadable else ""
                    raise UserError(f"class folder {folder} holds no images{only}; add some or remove the folder{why}")
                others += foreign
                for name in found:
                    files.add(name, f"{root}/{name}")
                progress.add(len(found))
                labels += [label_of[folder.name]] * len(found)
            splits[split] = files.listing(labels)

    untrained = sorted(set(folder_names) - {folder.name for folder in class_folders["train"]})
    if untrained:
        raise UserError(f"class {untrained[0]!r} has no training images: {roots['train'] / untrained[0]} is missing")
    if loose := sum(_is_image(path.name) for folder in roots.values() for path in folder.iterdir()):
        notes.append(f"images that lie in no class folder are skipped: {loose}")
    unreadable = _unread(others)
    if plain := others - unreadable:
        notes.append(f"files that are not images are skipped: {_kinds(plain)}")
    skipped = (unread(unreadable),) if unreadable else ()
    notes += escaped_note(splits)
    classes = [printable(name) for name in folder_names]
    reader = FileReader(root)
    return Source(
        classes,
        splits,
        reader,
        fingerprint(classes, splits),
        peek=reader.peek,
        notes=tuple(notes),
        skipped=skipped,
    )


def _is_sub_folder(path: Path) -> bool:
    return path.is_dir() and not _is_hidden(path.name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == THUMBNAILS


def _sub_folders(folder: Path) -> list[Path]:
    found = sorted(filter(_is_sub_folder, folder.iterdir()))
    if not found:
        raise UserError(f"{folder} holds no class folders; give a folder with one sub-folder of images per class")
    return found


def _images(root: Path, class_folder: Path) -> tuple[list[str], Counter[str]]:
    """Name the image files below a class folder in a fixed order; count others by extension."""
    images: list[str] = []
    others: Counter[str] = Counter()
    start = len(os.path.join(root, ""))
    waiting = [os.path.join(root, class_folder.relative_to(root))]  # with "./" where the source is the current folder
    seen = set()
    while waiting:
        folder = waiting.pop()
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:  # a link back to where it came from
            continue
        seen.add((place.st_dev, place.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    continue
                if entry.is_dir():  # links to folders too
                    waiting.append(entry.path)
                elif _is_image(entry.name):
                    images.append(entry.path[start:])
                else:
                    others[os.path.splitext(entry.name)[1].lower() or "without extension"] += 1
    return sorted(images, key=lambda name: name.split("/")), others


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def _unread(files: Counter[str]) -> Counter[str]:
    return Counter({kind: count for kind, count in files.items() if kind in UNREAD_EXTENSIONS})


def _kinds(files: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in files.most_common(5))
