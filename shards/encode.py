"""From an image file's bytes to the bytes that are stored: proved decodable, 8-bit, upright.

The loaders cannot skip a bad image in the middle of training, so none gets into a shard: each one is fully
decoded here, once.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

# What an image collection may hold. PIL knows more, but some of it starts other programs (EPS) or is no
# picture by itself (PDF, HDF5).
LOSSLESS = ("PNG", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "PCX", "SGI", "QOI", "ICO")
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")
# PIL gives each picture's memory back to the system, which hands it out again page by page: a fifth of the time.
Image.core.set_blocks_max(8)
EXTENSIONS = {end for end, kind in Image.registered_extensions().items() if kind in LOSSLESS + LOSSY}
# Other pictures that people have, to be named when they are left out.
UNREAD_EXTENSIONS = {".webp", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".tif", ".tiff", ".psd", ".dng"} - EXTENSIONS
UNREAD_EXTENSIONS |= {".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"}  # of cameras
# An MPO is a JPEG with a second picture behind it, and is opened as one.
OPENED = [kind for kind in LOSSLESS + LOSSY if kind in Image.OPEN]

# A JPEG that is to be shrunk is decoded at a fraction of its size, in a third less time, if that is still so many
# times what is wanted. The result then differs from shrinking the whole picture by no more than storing it at quality
# 90 does: on a detailed and a soft photograph 35 and 44 dB at 1.17 times, 39 and 46 at 1.43 (31 and 40 at 1.0, which
# would lose), against 35 and 36 of the storing.
DRAFT_MARGIN = 1.15

# Loaders decode what is stored again and again: no larger image gets in. One that is shrunk is decoded once, which
# takes four bytes a pixel: one gigabyte in each worker at most.
MOST_PIXELS = 89_478_485  # PIL's own limit
MOST_SHRUNK_PIXELS = 1 << 28

# Bits that cameras and scanners give grey values; files have room for 16.
GREY_BITS = (8, 10, 12, 14, 16)

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(Exception):
    """An image that cannot be stored; the message is the reason, one of a few that can be counted."""


@dataclass(frozen=True)
class Encoded:
    """A stored image: its bytes, "jpg" or "png", and its decoded size in pixels."""

    data: bytes
    extension: str
    height: int
    width: int


def encode(
    data: bytes, shorter_side: int | None = None, quality: int = 90, keep_bytes: bool = False, grey_bits: int = 16
) -> Encoded:
    """Decode an image fully and return what to store for it.

    An 8-bit RGB or greyscale JPEG or PNG that lies upright is stored as it is, byte for byte. Anything else
    is turned upright by its EXIF orientation, brought to 8-bit RGB or greyscale (alpha is dropped, 16-bit
    grey v becomes v · 255 / (2^grey_bits − 1), of 16-bit colour the upper 8 bits stay) and written again: lossy
    formats as JPEG of quality 95 without chroma subsampling, the others as PNG. So `encode` returns its own results
    unchanged.

    Args:
        data: a whole image file.
        shorter_side: shrink larger images to this shorter side in pixels (bicubic, antialiased); None keeps
            every size. A JPEG is decoded at half, a quarter or an eighth of its size where `DRAFT_MARGIN` is
            left.
        quality: JPEG quality of lossy images that were shrunk.
        keep_bytes: store files as they are or not at all: what would be written again is turned away.
            Excludes `shorter_side`.
        grey_bits: how many bits 16-bit grey images use, one of `GREY_BITS`: the same for all of a dataset, so that a
            dark image stays darker than a bright one.

    Raises:
        BadImageError: the bytes do not decode to an image, or cannot be kept.
        MemoryError: there is too little of it.
    """
    assert not (keep_bytes and shorter_side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _opened(data, shorter_side) as image:
            return _encode(image, data, shorter_side, quality, keep_bytes, grey_bits)


def decode(data: bytes, shorter_side: int | None = None, quality: int = 90, grey_bits: int = 16) -> Image.Image:
    """Return the picture that loaders show of what `encode` would store: RGB, upright.

    Threads may call it; PIL's warnings are then the caller's to silence, as filters belong to the whole process.

    Raises:
        BadImageError: as `encode`.
    """
    with _opened(data, shorter_side) as image:
        if not _is_shrunk(image, shorter_side) and _orientation(image) == 1 and _is_plain(image, data):
            return image.convert("RGB")  # stored as it is: to decode it once is enough
        stored = _encode(image, data, shorter_side, quality, False, grey_bits)
    with Image.open(BytesIO(stored.data)) as image:
        return image.convert("RGB")


@contextmanager
def _opened(data: bytes, shorter_side: int | None) -> Iterator[Image.Image]:
    """Open an image file; what goes wrong in the block, too, is a BadImageError."""
    if not data:
        raise BadImageError("empty file")
    most = MOST_PIXELS if shorter_side is None else MOST_SHRUNK_PIXELS
    if Image.MAX_IMAGE_PIXELS is not None and most > Image.MAX_IMAGE_PIXELS:
        # Never put back: other threads may be in the middle of an image.
        Image.MAX_IMAGE_PIXELS = most
    try:
        with Image.open(BytesIO(data), formats=OPENED) as image:
            if image.width * image.height > most:
                raise BadImageError(_too_large(most))
            if image.format == "PNG":
                # PIL's decoder overlooks wrong checksums and a lost end; DALI's does not.
                with Image.open(BytesIO(data), formats=["PNG"]) as again:
                    again.verify()
            if image.format not in ("JPEG", "MPO"):  # those may still be decoded at a fraction of their size
                image.load()  # before the orientation: PNG may have it behind the pixels, TIFF is turned by loading
            yield image
    except (BadImageError, MemoryError):  # too little memory says nothing about the image
        raise
    except UnidentifiedImageError:
        raise BadImageError(_unidentified(data)) from None
    except Image.DecompressionBombError:
        raise BadImageError(_too_large(most)) from None
    # PIL's plugins meet damaged bytes with whatever their code runs into: OSError, SyntaxError, struct.error…
    except Exception as error:
        lacking = "not available" in str(error)  # such as "decoder libtiff not available"
        reason = "this PIL was built without its format" if lacking else "damaged or truncated"
        raise BadImageError(reason) from None


def _is_shrunk(image: Image.Image, shorter_side: int | None) -> bool:
    return shorter_side is not None and min(image.size) > shorter_side


def grey_maximum(data: bytes) -> int:
    """Return the largest value of an image of 16-bit grey, 0 for any other and for what does not decode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=OPENED) as image:
                return int(np.asarray(image).max()) if image.mode.startswith("I") else 0
    except MemoryError:
        raise
    except Exception:  # told when it is encoded
        return 0


def has_deep_colour(data: bytes) -> bool:
    """Return whether an image has 16 bits for each colour (or for grey beside alpha): PIL gives the upper 8 alone."""
    if data.startswith(b"\x89PNG"):
        return data[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06")  # IHDR: 16 bits; RGB, grey and alpha, RGBA
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=["TIFF"]) as image:
                return image.mode.startswith("RGB") and max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))) > 8
    except Exception:  # of another format, or told when it is encoded
        return False


def _too_large(most: int) -> str:
    remedy = "; --shorter-side would shrink it" if most == MOST_PIXELS else ""
    return f"more than {most / 1e6:.0f} megapixels{remedy}"


def _unidentified(data: bytes) -> str:
    """Tell a picture in a format that this PIL lacks from what is no picture."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP, which this PIL does not read"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC, which this PIL does not read"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "AVIF, which this PIL does not read"
    return "not an image"


def _encode(
    image: Image.Image, data: bytes, shorter_side: int | None, quality: int, keep_bytes: bool, grey_bits: int
) -> Encoded:
    kind = image.format or ""
    orientation = _orientation(image)
    shrink = _is_shrunk(image, shorter_side)
    if not shrink and orientation == 1 and _is_plain(image, data):
        image.load()
        return Encoded(data, "jpg" if kind == "JPEG" else "png", image.height, image.width)
    if keep_bytes:
        image.load()  # a damaged image is called that first
        raise BadImageError(_why_not_kept(image, orientation))

    size = image.size
    if shorter_side is not None and shrink:
        scale = shorter_side / min(size)
        size = (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
        # The box is exact where the decoder's rounded size is not.
        drafted = image.draft(None, (math.ceil(size[0] * DRAFT_MARGIN), math.ceil(size[1] * DRAFT_MARGIN)))
        picture = _to_8_bit(image, grey_bits).resize(size, Image.Resampling.BICUBIC, box=drafted and drafted[1])
    else:
        picture = _to_8_bit(image, grey_bits)
    if orientation in UPRIGHT:
        picture = picture.transpose(UPRIGHT[orientation])
    picture.info = {}  # or the PNG writer copies colour profiles and transparency

    buffer = BytesIO()
    if kind in LOSSY and shrink:
        picture.save(buffer, "JPEG", quality=quality)
    elif kind in LOSSY:
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        picture.save(buffer, "PNG")
    return Encoded(buffer.getvalue(), "jpg" if kind in LOSSY else "png", picture.height, picture.width)


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether every decoder sees the same 8-bit picture in these bytes."""
    if image.mode not in ("L", "RGB"):
        return False
    if image.format == "JPEG":
        return True
    bit_depth = data[24]  # of the IHDR chunk, always a PNG's first; PIL hides 16-bit colour behind mode RGB
    return (
        image.format == "PNG"
        and bit_depth == 8
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
    )


def _why_not_kept(image: Image.Image, orientation: int) -> str:
    if image.format not in ("JPEG", "PNG"):
        return "cannot be kept: no JPEG or PNG"
    if orientation != 1:
        return "cannot be kept: EXIF does not say upright"
    return "cannot be kept: not plain 8-bit RGB or grey"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none and 0 where the EXIF block cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 0


def _to_8_bit(image: Image.Image, grey_bits: int) -> Image.Image:
    """Bring any mode to "L" or "RGB"."""
    if image.mode == "F":
        raise BadImageError("floating-point pixels")
    if image.mode.startswith("I"):  # 16-bit grey comes as I;16 (PNG, TIFF) or as 32-bit I (PGM)
        values_HW = np.asarray(image).astype(np.int64)
        white = (1 << grey_bits) - 1
        if values_HW.min() < 0 or values_HW.max() > white:
            raise BadImageError(f"more than {grey_bits} bits per pixel")
        return Image.fromarray(((values_HW * 255 + white // 2) // white).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
