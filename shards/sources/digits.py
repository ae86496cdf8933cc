"""The embedded dataset: scikit-learn's handwritten digits, 1,797 grey images of 8x8 pixels in 10 classes.

They are enlarged to 16x16 (bilinear), which leaves room for the crops and strides of a small network. The
collection is balanced and comes without splits; its default profile makes it long-tailed.
"""

import hashlib
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.errors import UserError
from shards.sources.source import Listing, Source

SIDE = 16


@cache
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (1797, 8, 8), uint8 in 0..255, and labels (1797,)."""
    from sklearn.datasets import load_digits  # slow to import, and only this source needs it

    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64)


def _read(name: str) -> bytes:
    """Encode one digit as a 16x16 8-bit greyscale PNG."""
    images_NHW, _ = _digits()
    image = Image.fromarray(images_NHW[int(name.removeprefix("digit-"))])
    buffer = BytesIO()
    image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(buffer, "PNG")
    return buffer.getvalue()


def open_source(path: Path | None) -> Source:
    """List the digits. They come with scikit-learn, so a `path` is a mistake (UserError)."""
    if path is not None:
        raise UserError(f"digits come with scikit-learn and need no --source; leave out --source {path}")
    images_NHW, labels_N = _digits()
    return Source(
        classes=[str(digit) for digit in range(10)],
        splits={"train": Listing([f"digit-{i:04d}" for i in range(len(labels_N))], labels_N)},
        read=_read,
        fingerprint=hashlib.sha256(images_NHW.tobytes() + labels_N.tobytes()).hexdigest(),
        preset="digits",
        profile="exp",
        imbalance_factor=20.0,
    )
