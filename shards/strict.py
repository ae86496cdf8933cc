"""What PIL overlooks in a file, and stricter decoders do not: DALI's, which a step of training would meet.

A JPEG may hold bytes between its markers that belong to none, and a PNG may end before its last row, its checksum or
its end: PIL fills what is lacking with black, and says nothing.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

SCAN = 0xDA
NO_LENGTH = {0x00, 0x01, *range(0xD0, 0xDA)}  # markers that nothing follows, none of which belongs before the scan
PNG_START = 8
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
ONE_PASS = ((0, 0, 1, 1),)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
AT_ONCE = 1 << 20  # bytes


def markers_follow(data: bytes) -> bool:
    """Whether the markers of a JPEG follow each other without other bytes between them, up to its first scan."""
    at = 2
    try:
        while data[at] == 0xFF:
            while data[at] == 0xFF:  # there may be several
                at += 1
            marker = data[at]
            if marker == SCAN:
                return True
            (length,) = struct.unpack_from(">H", data, at + 1)
            if marker in NO_LENGTH or length < 2:
                return False
            at += 1 + length
    except (IndexError, struct.error):
        pass
    return False


def check_png(data: bytes) -> None:
    """Raise a ValueError where a PNG is not whole: a wrong checksum, too few rows, or no end."""
    width, height, depth, colour, interlaced = struct.unpack_from(">IIBBxxB", data, PNG_START + 8)
    row_bits = depth * CHANNELS[colour]
    lacking = 0
    for left, top, across, down in ADAM7 if interlaced else ONE_PASS:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            lacking += rows * (1 + -(-columns * row_bits // 8))
    pixels = zlib.decompressobj()
    for name, content in _chunks(data):
        while name == b"IDAT" and content and not pixels.eof and lacking > -AT_ONCE:
            lacking -= len(pixels.decompress(content, AT_ONCE))
            content = pixels.unconsumed_tail
        if name == b"IEND":
            if lacking > 0 or not pixels.eof:
                raise ValueError("it lacks rows, or their checksum")
            return
    raise ValueError("it has no end")


def has_large_text(data: bytes, most: int) -> bool:
    """Whether a colour profile or a compressed text of a whole PNG comes to more than so many bytes."""
    for name, content in _chunks(data):
        if name == b"IEND":
            break
        if name in (b"iCCP", b"zTXt", b"iTXt"):
            packed = bytes(content).partition(b"\0")[2][1:]  # behind its name and how it is packed
            if name == b"iTXt":
                packed = packed[1:].split(b"\0", 2)[-1]  # behind its language and a translated name
            unpacker = zlib.decompressobj()
            with suppress(zlib.error):  # not packed, or damaged: PIL passes over it
                unpacker.decompress(packed, most)
                if unpacker.unconsumed_tail:
                    return True
    return False


def check_chunks(data: bytes | memoryview) -> None:
    """Raise a ValueError where a PNG that once was whole is not any more: a wrong checksum, or no end."""
    if not any(name == b"IEND" for name, _ in _chunks(data)):
        raise ValueError("it has no end")


def _chunks(data: bytes | memoryview) -> Iterator[tuple[bytes, bytes | memoryview]]:
    """Names and contents, as far as they are whole."""
    at = PNG_START
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if struct.unpack_from(">I", data, end)[0] != zlib.crc32(data[at + 4 : end]):
            raise ValueError(f"the checksum of {name!r} is wrong")
        yield name, data[at + 8 : end]
        at = end + 4
