"""Fashion-MNIST (Xiao et al., 2017): 70,000 grey pictures of 28x28 pixels in the IDX format of MNIST.

    train-images-idx3-ubyte.gz  train-labels-idx1-ubyte.gz  t10k-images-idx3-ubyte.gz  t10k-labels-idx1-ubyte.gz

compressed or not. Debian's package dataset-fashion-mnist puts them where they are looked for by default. Made
long-tailed like CIFAR.
"""

import gzip
import zlib
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.sources.arrays import Arrays, array_source
from shards.sources.files import check_folder
from shards.sources.source import Source

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PREFIXES = {"train": "train", "test": "t10k"}


def open_source(path: Path | None) -> Source:
    """List Fashion-MNIST.

    Args:
        path: the folder of the four IDX files (or torchvision's folder above FashionMNIST/raw); Debian's if None.

    Raises:
        UserError: a file that is missing or damaged.
    """
    if path is None and not DEBIAN.is_dir():
        raise UserError(
            f"fashion-mnist needs --source DIR, the folder of its four IDX files"
            f" ({DEBIAN} is not there; Debian's package dataset-fashion-mnist would put them there)"
        )
    root = check_folder("fashion-mnist", path or DEBIAN, "the folder of its four IDX files")
    raw = root / "FashionMNIST" / "raw"
    load = partial(_load, raw if raw.is_dir() else root)
    return array_source(
        load, list(CLASSES), preset="fashion-mnist", profile="exp", imbalance_factor=100.0, val_fraction=0.0
    )


@cache
def _load(root: Path) -> Arrays:
    arrays = {}
    for split, prefix in PREFIXES.items():
        images_NHW = _read_idx(root / f"{prefix}-images-idx3-ubyte", 3)
        labels_N = _read_idx(root / f"{prefix}-labels-idx1-ubyte", 1)
        if len(images_NHW) != len(labels_N):
            raise UserError(f"{root}: {len(images_NHW)} {split} images and {len(labels_N)} labels; fetch them again")
        if missing := set(range(len(CLASSES))) ^ set(labels_N.tolist()):
            raise UserError(f"{root}: the {split} labels are not 0 to 9, see {min(missing)}; fetch them again")
        arrays[split] = (images_NHW, labels_N.astype(np.int64))
    return arrays


def _read_idx(path: Path, n_axes: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes: 0, 0, 8, the number of axes, each one's length (big-endian), the values."""
    packed = path.with_name(f"{path.name}.gz")
    if not path.exists() and not packed.exists():
        raise UserError(f"{path}.gz is missing; give --source the folder of the four IDX files")
    try:
        data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path if path.exists() else packed} cannot be read ({error}); fetch it again") from None
    start = 4 + 4 * n_axes
    shape = [int(n) for n in np.frombuffer(data[4:start], ">i4")] if len(data) >= start else []
    if data[:4] != bytes([0, 0, 8, n_axes]) or len(data) != start + int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"{path} is not a complete IDX file (axes: {n_axes}); fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
