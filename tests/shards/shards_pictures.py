"""Pictures for the tests of this room."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A smooth random RGB picture, no two pixels alike by chance, so that any turn shows."""
    noise_HWC = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise_HWC).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_16_bits(values_HW3: NDArray[Any]) -> bytes:
    """A PNG of 16-bit colour, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = values_HW3.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HW3)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
