"""Collections that come as arrays of small pictures: each is stored as a PNG."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.sources.source import Listing, Source

# By split: images (N, H, W) grey or (N, H, W, 3) RGB, uint8 in 0..255, and labels (N,), int64.
Arrays = Mapping[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]


@dataclass(frozen=True)
class ArrayReader:
    """Reads pictures of `load()` by names such as "train-00012"."""

    load: Callable[[], Arrays]

    def __call__(self, name: str) -> bytes:
        """Return a picture as a PNG."""
        split, _, i = name.partition("-")
        return png(self.load()[split][0][int(i)])


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode a picture, (H, W) grey or (H, W, 3) RGB, uint8.

    Not compressed: that would save a third of a few kilobytes and make loaders take twice the time to decode it.
    """
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def array_source(load: Callable[[], Arrays], classes: list[str], **attributes: Any) -> Source:
    """Make a source of arrays.

    Args:
        load: gives the arrays; worker processes call it for every picture, so it is cached and can be pickled.
        classes: class names by label.
        attributes: further attributes of the `Source`.
    """
    digest = hashlib.sha256()
    splits = {}
    for split, (images, labels_N) in load().items():
        digest.update(images.tobytes() + labels_N.tobytes())
        splits[split] = Listing([f"{split}-{i:05d}" for i in range(len(images))], labels_N)
    return Source(classes, splits, ArrayReader(load), digest.hexdigest(), **attributes)
