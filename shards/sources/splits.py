"""Official splits by their names: train/, Valid/, testing/ … in folders, and the same words in CSV files.

    pets/Train/cat/*.jpg  pets/valid/cat/*.jpg      splits: folders of class folders
    cars/train/*.jpg      cars/truck/*.jpg          classes, one of which happens to be called train

A folder with such a name is a split where it holds folders; where it holds only images it is a class, as long as the
root has other classes. What is neither (train/ beside trian/, val/ without train/) is refused, for it would
become a dataset of two classes called "train" and "trian".
"""

import re
from collections.abc import Callable
from pathlib import Path

from shards.errors import UserError

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SHORTEST_MISSPELT = 4  # "dev" and "val" are one letter away from too many words


def split_of(name: str) -> str | None:
    """Return "train", "val" or "test" for the name of a split in any case; None for another name."""
    return SPLIT_NAMES.get(name.strip().casefold())


def looks_like_split(name: str) -> str | None:
    """Return the split's name that this one resembles: a part of it (train2017, test_images) or a slip (trian)."""
    words = re.findall(r"[^\W\d_]+", name.casefold())
    for known in SPLIT_NAMES:
        if known in words or (len(known) >= SHORTEST_MISSPELT and _one_slip_apart("".join(words), known)):
            return known
    return None


def split_roots(
    root: Path, folders: list[Path], holds_folders: Callable[[Path], bool], notes: list[str]
) -> dict[str, Path]:
    """Find the official splits among the sub-folders of `root`; without any, all of it is training.

    Args:
        root: the source's folder.
        folders: its sub-folders, at least one.
        holds_folders: whether a folder has sub-folders.
        notes: gets a line where something was taken for what it may not be.

    Raises:
        UserError: a layout that can be read in two ways.
    """
    found = {folder: split for folder in folders if (split := split_of(folder.name))}
    others = [folder for folder in folders if folder not in found]
    resembling = {folder: known for folder in others if (known := looks_like_split(folder.name))}
    if len(found) + len(resembling) == len(folders) and resembling:
        folder, known = next(iter(resembling.items()))
        raise UserError(
            f"{root} holds {folder.name!r}, which looks like {known!r} and is not the name of a split;"
            " rename it to train, val or test, or classes to something else"
        )
    splits = found if not others else {f: split for f, split in found.items() if holds_folders(f)}
    if not splits:
        if found:
            named = ", ".join(repr(folder.name) for folder in found)
            notes.append(f"taken for a class, not for a split, as no folders lie in it: {named}")
        return {"train": root}
    names = ", ".join(folder.name for folder in splits)
    if others:
        slip = next((f" (did you mean {known!r}?)" for known in resembling.values()), "")
        raise UserError(
            f"{root} holds splits ({names}) beside {next(iter(resembling or others)).name!r}{slip}; move that away"
        )
    if "train" not in splits.values():
        raise UserError(f"{root} holds {names} and no train; add the training images as {root / 'train'}")
    roots: dict[str, Path] = {}
    for folder, split in splits.items():
        if split in roots:
            raise UserError(f"{root} holds both {roots[split].name} and {folder.name}; merge them or move one away")
        roots[split] = folder
    if len(roots) == 1:
        notes.append(f"{root.resolve().name} holds {names} alone: what is to be held out is taken from it")
    return roots


def _one_slip_apart(word: str, known: str) -> bool:
    """Whether one letter was left out, added, replaced, or swapped with its neighbour."""
    if len(word) == len(known):
        wrong = [i for i, (a, b) in enumerate(zip(word, known, strict=True)) if a != b]
        swapped = len(wrong) == 2 and wrong[1] - wrong[0] == 1 and sorted(word) == sorted(known)
        return len(wrong) == 1 or swapped
    shorter, longer = sorted((word, known), key=len)
    return len(longer) - len(shorter) == 1 and any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))
