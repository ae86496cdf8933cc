"""From an image file's bytes to the bytes that are stored: proved decodable, 8-bit, upright.

DALI cannot skip a bad image, and in the middle of training another one would have to take its place; so none gets into
a shard: each one is fully decoded here, once.
"""

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple, Self

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from shards.strict import check_png, has_large_text, markers_follow

try:
    import pi_heif
except ImportError:  # an extra: few collections hold photographs as phones write them
    pass
else:
    pi_heif.register_heif_opener()

# What an image collection may hold. PIL knows more, but some of it starts other programs (EPS) or is no
# picture by itself (PDF, HDF5).
LOSSLESS = ("PNG", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "PCX", "SGI", "QOI", "ICO")
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000", "HEIF")
# PIL gives each picture's memory back to the system, which hands it out again page by page: a fifth of the time.
Image.core.set_blocks_max(8)
EXTENSIONS = {end for end, kind in Image.registered_extensions().items() if kind in LOSSLESS + LOSSY}
# Other pictures that people have, to be named when they are left out.
UNREAD_EXTENSIONS = {".webp", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".tif", ".tiff", ".psd", ".dng"} - EXTENSIONS
UNREAD_EXTENSIONS |= {".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"}  # of cameras
HEIF_EXTENSIONS = {".heic", ".heif"}
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

# A PNG's colour profile and texts are unpacked up to 64 MB. What is stored has none larger than PIL takes where it was
# not asked for more.
MOST_TEXT = PngImagePlugin.MAX_TEXT_CHUNK
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

ROWS = 256  # of 16-bit grey that become 8-bit at a time, for little memory

LEAST_SQUARES = 64  # along the shorter side, of those whose means tell pictures apart

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


def unread(kinds: Counter[str]) -> str:
    """Return which images this PIL does not read, and what would: for a note about files that are left out.

    Args:
        kinds: how many there are of each of `UNREAD_EXTENSIONS`.
    """
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    remedies = []
    if heif := [kind for kind in kinds if kind in HEIF_EXTENSIONS]:
        remedies.append(f"for {' and '.join(sorted(heif))}: pip install pi-heif")
    if others := [kind for kind, _ in kinds.most_common() if kind not in HEIF_EXTENSIONS]:
        remedies.append(f"ImageMagick turns {others[0]} into JPEG: magick mogrify -format jpg *{others[0]}")
    return f"images that this PIL does not read are left out: {found}; {'; '.join(remedies)}"


class BadImageError(Exception):
    """An image that cannot be stored; the message is the reason, one of a few that can be counted."""


@dataclass(frozen=True)
class Encoded:
    """A stored image.

    Attributes:
        data: the bytes to store.
        extension: "jpg" or "png".
        height, width: of the picture, in pixels.
        picture: 16 bytes that are the same for the same pixels, however a file holds them: a digest of the picture, or
            where it is large of the means of small squares, in a tenth of the time.
    """

    data: bytes
    extension: str
    height: int
    width: int
    picture: bytes

    @classmethod
    def of(cls, data: bytes, extension: str, picture: Image.Image) -> Self:
        """What is stored for a picture, decoded or about to be encoded."""
        digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode())
        digest.update(picture.reduce(max(1, min(picture.size) // LEAST_SQUARES)).tobytes())
        return cls(data, extension, picture.height, picture.width, digest.digest()[:16])


def encode(
    data: bytes, shorter_side: int | None = None, quality: int = 90, keep_bytes: bool = False, grey_bits: int = 16
) -> Encoded:
    """Decode an image fully and return what to store for it.

    An 8-bit RGB or greyscale JPEG or PNG that lies upright is stored as it is, byte for byte. Anything else
    is turned upright by its EXIF orientation, brought to 8-bit RGB or greyscale (alpha is dropped, 16-bit
    grey v becomes v · 255 / (2^grey_bits − 1), of 16-bit colour the upper byte is kept) and written again: lossy
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
    _let_pil_open(most)
    try:
        with Image.open(BytesIO(data), formats=OPENED) as image:
            if image.width * image.height > most:
                raise BadImageError(_too_large(most))
            if image.format == "PNG":
                check_png(data)
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


def _let_pil_open(pixels: int) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        # Never put back: other threads may be in the middle of an image.
        Image.MAX_IMAGE_PIXELS = pixels


def _is_shrunk(image: Image.Image, shorter_side: int | None) -> bool:
    return shorter_side is not None and min(image.size) > shorter_side


class Depth(NamedTuple):
    """The largest value of 16-bit grey, and the upper byte of 16-bit colour's; -1 where there is none."""

    grey: int = -1
    colour: int = -1


def depth(data: bytes) -> Depth:
    """Look at an image; what does not decode is of no depth."""
    _let_pil_open(MOST_SHRUNK_PIXELS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=OPENED) as image:
                if image.mode.startswith("I"):
                    largest = int(np.asarray(image).max())  # what has more than 16 bits is rejected
                    return Depth(grey=largest if largest < 1 << max(GREY_BITS) else -1)
                # PIL unpacks 16-bit colour as 8 bits: what it reads tells.
                if image.mode.startswith("RGB") and any(";16" in str(tile) for tile in image.tile):
                    return Depth(colour=int(np.asarray(image)[..., :3].max()))
    except MemoryError:
        raise
    except Exception:  # reported when it is encoded
        pass
    return Depth()


def _too_large(most: int) -> str:
    remedy = "; --shorter-side would shrink it" if most == MOST_PIXELS else ""
    return f"more than {most / 1e6:.0f} megapixels{remedy}"


def _unidentified(data: bytes) -> str:
    """Tell a picture in a format that this PIL lacks from what is no picture."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP, which this PIL does not read"
    if (
        ".heic" in UNREAD_EXTENSIONS
        and data[4:8] == b"ftyp"
        and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
    ):
        return "HEIC, which this PIL does not read (pip install pi-heif)"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis"):
        return "AVIF, which this PIL does not read"
    return "not an image"


def _encode(
    image: Image.Image, data: bytes, shorter_side: int | None, quality: int, keep_bytes: bool, grey_bits: int
) -> Encoded:
    kind = image.format or ""
    orientation = _orientation(image)
    shrink = _is_shrunk(image, shorter_side)
    size = image.size
    if shorter_side is not None and shrink:
        scale = shorter_side / min(size)
        size = (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
    if size[0] * size[1] > MOST_PIXELS:  # a long strip, or a large --shorter-side
        raise BadImageError(f"more than {MOST_PIXELS / 1e6:.0f} megapixels, shrunk as far as --shorter-side asks")
    if not shrink and orientation == 1 and _is_plain(image, data):
        image.load()
        return Encoded.of(data, "jpg" if kind == "JPEG" else "png", image)
    if keep_bytes:
        image.load()  # a damaged image is called that first
        raise BadImageError(_why_not_kept(image, data, orientation))

    if shrink:
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
    return Encoded.of(buffer.getvalue(), "jpg" if kind in LOSSY else "png", picture)


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether every decoder sees the same 8-bit picture in these bytes."""
    if image.mode not in ("L", "RGB"):
        return False
    if image.format == "JPEG":
        return markers_follow(data)
    return (
        image.format == "PNG"
        and data[24] == 8  # bits, of the IHDR chunk, always a PNG's first; PIL hides 16-bit colour behind mode RGB
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
        and not has_large_text(data, MOST_TEXT)
    )


def _why_not_kept(image: Image.Image, data: bytes, orientation: int) -> str:
    if image.format not in ("JPEG", "PNG"):
        return "cannot be kept: neither a JPEG nor a PNG"
    if orientation != 1:
        return "cannot be kept: EXIF does not say upright"
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        return "cannot be kept: bytes between its markers"
    if image.format == "PNG" and has_large_text(data, MOST_TEXT):
        return "cannot be kept: a colour profile or text of more than a megabyte"
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
        values_HW = np.asarray(image)
        white = (1 << grey_bits) - 1
        if values_HW.min() < 0 or values_HW.max() > white:
            raise BadImageError(f"more than {grey_bits} bits per pixel")
        grey_HW = np.empty(values_HW.shape, np.uint8)
        for row in range(0, len(values_HW), ROWS):
            part = values_HW[row : row + ROWS].astype(np.int32)
            grey_HW[row : row + ROWS] = (part * 255 + white // 2) // white
        return Image.fromarray(grey_HW)
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
