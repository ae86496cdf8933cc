"""Files that PIL takes and DALI does not: none of them is stored as it is."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from shards_pictures import encoded, picture

from shards.encode import BadImageError, encode
from shards.strict import ADAM7, check_png

PICTURE = picture(size=(37, 21))
JPEG = encoded(PICTURE, "JPEG")
PNG = encoded(PICTURE, "PNG")


def before(marker: int, extra: bytes) -> bytes:
    at = JPEG.index(bytes([0xFF, marker]))
    return JPEG[:at] + extra + JPEG[at:]


@pytest.mark.parametrize("marker", [0xDB, 0xC0, 0xC4, 0xDA])
@pytest.mark.parametrize("extra", [b"\0", b"\0\1\2", b"\xff\xd0", b"\xff\xfe\0\1"])
def test_a_jpeg_with_bytes_between_its_markers_is_written_again(marker, extra):
    data = before(marker, extra)
    stored = encode(data)
    assert stored.data != data
    assert encode(stored.data).data is stored.data
    difference = np.asarray(Image.open(BytesIO(stored.data)), int) - np.asarray(Image.open(BytesIO(data)), int)
    assert np.abs(difference).mean() < 2
    with pytest.raises(BadImageError, match="cannot be kept: bytes between its markers"):
        encode(data, keep_bytes=True)


@pytest.mark.parametrize(
    "data",
    [
        JPEG,
        before(0xDB, b"\xff" * 9),  # any number of these may come before a marker
        before(0xC0, b"\xff\xfe\0\2"),
        before(0xC0, b"\xff\xef\0\6abcd"),
        JPEG + b"anything",
        encoded(PICTURE, "JPEG", progressive=True),
        encoded(PICTURE.convert("L"), "JPEG", comment=b"\xff\xd8\0\0"),
        encoded(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + bytes(60_000)),
    ],
)
def test_other_jpegs_are_kept(data):
    assert encode(data).data is data


def png(rows: bytes, *, side=(37, 21), depth=8, colour=2, interlaced=0, cut=0, end=b"") -> bytes:
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *side, depth, colour, 0, 0, interlaced))
    packed = zlib.compress(rows)
    packed = packed[: len(packed) - cut]
    parts = [chunk(b"IDAT", packed[i : i + 100]) for i in range(0, len(packed), 100)]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(parts) + chunk(b"IEND", end)


ROWS = b"".join(b"\0" + row.tobytes() for row in np.asarray(PICTURE))


@pytest.mark.parametrize(
    "data",
    [
        png(ROWS[:-112]),  # PIL shows black instead
        png(ROWS[:-1]),
        png(ROWS, cut=4),
        png(ROWS, cut=1),
        *(PNG[:-cut] for cut in (1, 2, 4, 8, 12)),
    ],
)
def test_a_png_that_is_not_whole_is_turned_away(data):
    with pytest.raises(BadImageError, match="damaged or truncated"):
        encode(data)


def test_rows_too_many_and_what_lies_behind_the_end_do_not_matter():
    for data in (png(ROWS), png(ROWS + ROWS[:112]), png(ROWS, end=b"?"), PNG + b"anything"):
        assert encode(data).data is data


@pytest.mark.parametrize("side", [(1, 1), (1, 9), (9, 1), (2, 5), (8, 8), (37, 21)])
@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (2, 3), (4, 0), (8, 0), (8, 2), (16, 2), (8, 4), (16, 6)])
def test_a_row_that_is_lacking_shows_in_every_layout(side, depth, colour):
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    for interlaced, passes in ((0, [(0, 0, 1, 1)]), (1, ADAM7)):
        sizes = [(len(range(x, side[0], dx)), len(range(y, side[1], dy))) for x, y, dx, dy in passes]
        rows = bytes(sum(height * (1 + (width * bits + 7) // 8) for width, height in sizes if width))
        options = {"side": side, "depth": depth, "colour": colour, "interlaced": interlaced}
        check_png(png(rows, **options))
        with pytest.raises(ValueError, match="lacks rows"):
            check_png(png(rows[:-1], **options))
