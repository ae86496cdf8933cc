"""ImageNet-LT and Places-LT in their official layout: text lists beside the images.

    places/Places_LT_train.txt       data_256/a/airfield/00000001.jpg 0
    places/Places_LT_val.txt         val_256/Places365_val_00000435.jpg 0
    places/Places_LT_test.txt        …
    places/data_256/…

The lists lie in the source's folder or in a sub-folder, the images likewise: names are relative to the one or
the other. Classes are called after the folder of their training images, for the lists only number them.
"""

import posixpath
from pathlib import Path

from shards.errors import UserError
from shards.sources.files import check_folder, listed_source, read_text
from shards.sources.source import Source

SPLITS = ("train", "val", "test")
MOST_CLASSES = 1_000_000  # a larger label is a slip


def open_source(dataset: str, path: Path | None) -> Source:
    """List a collection by its `*_train.txt`, `*_val.txt` and `*_test.txt`.

    Args:
        dataset: "imagenet-lt" or "places-lt"; also the preset.
        path: the folder of lists and images.

    Raises:
        UserError: a list that is missing or has a line that is not `path label`, or images that are not there.
    """
    folder = check_folder(
        dataset, path, "the folder that holds the lists *_train.txt, *_val.txt, *_test.txt and the images"
    )
    train = _find_train_list(folder)
    prefix = train.name.removesuffix("train.txt")
    lists = {split: _read_list(train.with_name(f"{prefix}{split}.txt")) for split in SPLITS}
    names, labels = lists["train"]
    root = _find_root(folder, names)
    n_classes = max(max(labels, default=-1) for _, labels in lists.values()) + 1
    return listed_source(root, lists, _class_names(names, labels, n_classes), preset=dataset, val_fraction=0.0)


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _find_train_list(folder: Path) -> Path:
    found = sorted(folder.glob("*_train.txt")) or sorted(folder.glob("*/*_train.txt"))
    if not found:
        raise UserError(f"{folder} and its sub-folders hold no list *_train.txt; give --source the folder of the lists")
    if len(found) > 1:
        raise UserError(f"{folder} holds several training lists ({found[0].name}, {found[1].name}); move others away")
    return found[0]


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    """Names and labels of a list of `path label` lines; paths may hold spaces."""
    names = []
    labels = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        name, _, label = line.strip().rpartition(" ")
        if not name and not label:
            continue
        if not name or not label.isdecimal() or int(label) >= MOST_CLASSES:
            raise UserError(f"{path} line {number} is {line.strip()!r}, not a path and a label from 0 up")
        names.append(name.rstrip())
        labels.append(int(label))
    return names, labels


def _find_root(folder: Path, names: list[str]) -> Path:
    """The folder itself or the sub-folder below which the training images lie."""
    # A few may be missing without the root being wrong.
    for root in (folder, *_sub_folders(folder)):
        if any((root / name).is_file() for name in names[:: max(1, len(names) // 100)]):
            return root
    return folder


def _class_names(names: list[str], labels: list[int], n_classes: int) -> list[str]:
    """Each class's folder below the one that all share; the bare labels unless each class has one of its own."""
    pairs = {(label, posixpath.dirname(name)) for name, label in zip(names, labels, strict=True)}
    folder_of = dict(pairs)
    if (
        len(pairs) > len(set(folder_of.values()))
        or len(pairs) < 2
        or any(f.startswith("/") for f in folder_of.values())
    ):
        return [str(label) for label in range(n_classes)]
    common = posixpath.commonpath(folder_of.values())
    return [folder_of.get(j, "").removeprefix(common).strip("/") or str(j) for j in range(n_classes)]
