"""CIFAR-10 and CIFAR-100, by torchvision: 60,000 pictures of 32x32 pixels, fetched where they are not there yet.

Made long-tailed as Cao et al. (LDAM, 2019) did: classes in the order of their labels, an exponential profile,
nothing held out, so that the training images are those of the papers in number.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError
from shards.sources.arrays import Arrays, array_source
from shards.sources.source import Source

KINDS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
FETCHED = Path("data", "fetched")


def open_source(dataset: str, path: Path | None) -> Source:
    """List CIFAR.

    Args:
        dataset: "cifar10" or "cifar100"; also the preset.
        path: the folder that holds (or is to hold) torchvision's files, such as cifar-10-batches-py or
            cifar-10-python.tar.gz; data/fetched if None.

    Raises:
        UserError: the files are not there and cannot be fetched, or are damaged.
    """
    root = FETCHED if path is None else path
    if path is not None and not path.is_dir():
        raise UserError(f"--source {path} is not a folder; give one that holds (or is to hold) {_files(dataset)}")
    if root.absolute().name == _kind(dataset).base_folder:
        root = root.absolute().parent
    try:
        _torchvision(dataset, root, train=False)
    except RuntimeError:  # not there, or not whole
        _fetch(dataset, root)
    classes = [str(name) for name in _torchvision(dataset, root, train=False).classes]
    return array_source(
        partial(_load, dataset, root.absolute()),
        classes,
        preset=dataset,
        profile="exp",
        imbalance_factor=100.0,
        val_fraction=0.0,
    )


def _kind(dataset: str) -> Any:
    from torchvision import datasets  # slow to import, and only this source needs it

    return getattr(datasets, KINDS[dataset])


def _files(dataset: str) -> str:
    kind = _kind(dataset)
    return f"{kind.base_folder} or {kind.filename}"


def _torchvision(dataset: str, root: Path, *, train: bool, download: bool = False) -> Any:
    """torchvision's dataset, which compares the files' checksums before it opens them."""
    return _kind(dataset)(str(root), train=train, download=download)


def _fetch(dataset: str, root: Path) -> None:
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        _torchvision(dataset, root, train=False, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{root} does not hold {_files(dataset)} whole, and they cannot be fetched ({reason});"
            f" fetch {_kind(dataset).url} elsewhere and give --source its folder"
        ) from None


@cache
def _load(dataset: str, root: Path) -> Arrays:
    parts = {split: _torchvision(dataset, root, train=split == "train") for split in ("train", "test")}
    return {split: (part.data, np.array(part.targets, dtype=np.int64)) for split, part in parts.items()}
