"""What is stored for each kind of image file, and which files are turned away."""

import tracemalloc
from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin, features
from shards_pictures import encoded, picture, png_of_16_bits
from sklearn.datasets import load_sample_image

import shards.encode
from shards.encode import UPRIGHT, BadImageError, encode

RAMP_HW = np.linspace(0, 65535, 16 * 12).round().astype(np.uint16).reshape(16, 12)


def pixels(data: bytes) -> np.ndarray:
    with Image.open(BytesIO(data)) as image:
        assert image.mode in ("L", "RGB")
        return np.asarray(image.convert("RGB")).astype(int)


def with_orientation(image: Image.Image, kind: str, orientation: int, **options: object) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(image, kind, exif=exif, **options)


@pytest.mark.parametrize(
    ("kind", "mode", "extension"),
    [("JPEG", "RGB", "jpg"), ("JPEG", "L", "jpg"), ("PNG", "RGB", "png"), ("PNG", "L", "png")],
)
def test_plain_files_are_stored_byte_for_byte(kind, mode, extension):
    data = encoded(picture().convert(mode), kind)
    stored = encode(data)
    assert stored.data is data
    assert (stored.extension, stored.height, stored.width) == (extension, 20, 24)


def test_a_1x1_image_is_an_image():
    stored = encode(encoded(Image.new("RGB", (1, 1), "red"), "PNG"))
    assert (stored.height, stored.width) == (1, 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_exif_orientation_is_applied_to_the_pixels(kind, orientation):
    upright = picture()
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = encode(with_orientation(upright.transpose(UPRIGHT[inverse]), kind, orientation))
    assert np.array_equal(pixels(stored.data), np.asarray(upright))
    assert (stored.height, stored.width) == (20, 24)
    assert encode(stored.data).data is stored.data


def test_a_rotated_jpeg_stays_a_jpeg_of_high_quality():
    data = with_orientation(picture().transpose(Image.Transpose.ROTATE_90), "JPEG", 6, quality=95)
    stored = encode(data)
    assert (stored.extension, stored.height, stored.width) == ("jpg", 20, 24)
    assert np.abs(pixels(stored.data) - np.rot90(pixels(data), -1)).mean() < 2
    with Image.open(BytesIO(stored.data)) as image:
        assert image.getexif().get(ExifTags.Base.Orientation) is None
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # no chroma subsampling


def test_orientation_1_changes_nothing():
    data = with_orientation(picture(), "JPEG", 1)
    assert encode(data).data is data


def test_a_broken_exif_block_does_not_cost_the_image():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0this is no TIFF header")
    assert np.abs(pixels(encode(data).data) - pixels(data)).mean() < 2


@pytest.mark.parametrize(("kind", "extension"), [("PNG", "png"), ("TIFF", "png"), ("PPM", "png")])
def test_16_bit_grey_is_scaled_and_not_clipped(kind, extension):
    stored = encode(encoded(Image.fromarray(RAMP_HW), kind))
    assert stored.extension == extension
    assert np.array_equal(pixels(stored.data)[..., 0], np.rint(RAMP_HW / 257).astype(int))


def test_16_bit_colour_png_is_reduced_to_8():
    stored = encode(png_of_16_bits(np.array([[[0x1234, 0x5678, 0x9ABC]]])))
    assert stored.data[24] == 8
    assert pixels(stored.data).ravel().tolist() == [0x12, 0x56, 0x9A]


@pytest.mark.parametrize("mode", ["P", "1", "LA", "RGBA"])
def test_other_png_modes_become_8_bit_and_keep_their_colours(mode):
    image = picture().convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    stored = encode(encoded(image, "PNG"))
    assert stored.extension == "png"
    assert np.array_equal(pixels(stored.data), np.asarray(image.convert("RGB")))


def test_palette_transparency_is_dropped_and_not_stored():
    data = encoded(picture().convert("P"), "PNG", transparency=3)
    stored = encode(data)
    with Image.open(BytesIO(stored.data)) as image:
        assert image.mode == "RGB"
        assert "transparency" not in image.info


def test_cmyk_jpeg_becomes_rgb():
    stored = encode(encoded(picture().convert("CMYK"), "JPEG", quality=95))
    assert stored.extension == "jpg"
    assert np.abs(pixels(stored.data) - np.asarray(picture())).mean() < 8


def test_gif_stores_its_first_picture():
    first, second = picture(1).convert("P"), picture(2).convert("P")
    stored = encode(encoded(first, "GIF", save_all=True, append_images=[second]))
    assert np.array_equal(pixels(stored.data), np.asarray(first.convert("RGB")))


def test_shorter_side_shrinks_keeping_the_aspect_and_the_kind():
    wide = picture(size=(300, 200))
    for kind, extension in (("JPEG", "jpg"), ("PNG", "png")):
        stored = encode(encoded(wide, kind), shorter_side=64)
        assert (stored.extension, stored.height, stored.width) == (extension, 64, 96)
        assert pixels(stored.data).shape == (64, 96, 3)
        reference = np.asarray(wide.resize((96, 64), Image.Resampling.BICUBIC))
        assert np.abs(pixels(stored.data) - reference).mean() < 3


def test_shorter_side_never_enlarges():
    data = encoded(picture(), "JPEG")
    assert encode(data, shorter_side=20).data is data
    assert encode(data, shorter_side=500).data is data


def test_shorter_side_of_a_rotated_image():
    turned = picture(size=(300, 200)).transpose(Image.Transpose.ROTATE_90)
    stored = encode(with_orientation(turned, "JPEG", 6), shorter_side=64)
    assert (stored.height, stored.width) == (64, 96)
    reference = np.asarray(picture(size=(300, 200)).resize((96, 64), Image.Resampling.BICUBIC))
    assert np.abs(pixels(stored.data) - reference).mean() < 3


def test_shrinking_a_strip_keeps_at_least_a_pixel():
    stored = encode(encoded(Image.new("L", (5, 4000)), "PNG"), shorter_side=1)
    assert (stored.height, stored.width) == (800, 1)


def test_quality_is_that_of_shrunk_jpegs():
    data = encoded(picture(size=(300, 200)), "JPEG")
    assert len(encode(data, shorter_side=100, quality=30).data) < len(encode(data, shorter_side=100).data)


JPEG = encoded(picture(size=(150, 120)), "JPEG")
PNG = encoded(picture(size=(150, 120)), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, this is text", "not an image"),
        (b"\0" * 5000, "not an image"),
        (JPEG[: len(JPEG) // 2], "damaged or truncated"),
        (JPEG[:-10], "damaged or truncated"),
        (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "damaged or truncated"),
        (PNG[: len(PNG) // 2], "damaged or truncated"),
        (PNG[:-12], "damaged or truncated"),  # PIL alone would take it, DALI would not
        (PNG[:-14] + bytes([PNG[-14] ^ 1]) + PNG[-13:], "damaged or truncated"),  # likewise
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point pixels"),
        (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "more than 16 bits per pixel"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_what_does_not_decode_is_turned_away_with_a_reason(data, reason):
    with pytest.raises(BadImageError) as error:
        encode(data)
    assert str(error.value) == reason


@pytest.mark.parametrize("factor", [1.5, 3])  # PIL warns above its limit and refuses above twice that
@pytest.mark.parametrize(("shorter_side", "name"), [(None, "MOST_PIXELS"), (10, "MOST_SHRUNK_PIXELS")])
def test_a_decompression_bomb_is_turned_away(monkeypatch, factor, shorter_side, name):
    for limit in (name, "Image.MAX_IMAGE_PIXELS"):
        monkeypatch.setattr(f"shards.encode.{limit}", int(150 * 120 / factor))
    with pytest.raises(BadImageError, match="more than 0 megapixels"):
        encode(PNG, shorter_side)


def test_an_image_above_the_limit_of_stored_ones_is_shrunk(monkeypatch):
    monkeypatch.setattr("shards.encode.MOST_PIXELS", 150 * 120 - 1)
    monkeypatch.setattr("shards.encode.Image.MAX_IMAGE_PIXELS", 150 * 50)
    with pytest.raises(BadImageError, match="; --shorter-side would shrink it"):
        encode(JPEG)
    for data in (JPEG, PNG):
        assert encode(data, shorter_side=60).width == 75


@pytest.mark.parametrize(("size", "shorter_side"), [((20, 400), 20), ((20, 400), 500), ((60, 800), 30)])
def test_what_stays_too_large_for_a_loader_is_turned_away_with_shorter_side_too(monkeypatch, size, shorter_side):
    monkeypatch.setattr("shards.encode.MOST_PIXELS", 20 * 400 - 1)
    for kind in ("JPEG", "PNG"):
        with pytest.raises(BadImageError, match="more than 0 megapixels, shrunk as far as --shorter-side asks"):
            encode(encoded(picture(size=size), kind), shorter_side)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_of_fewer_bits_keeps_its_levels(bits):
    ramp_HW = np.arange(1 << bits, dtype=np.uint32)[:: max(1, (1 << bits) // 1024)].astype(np.uint16).reshape(-1, 32)
    ramp_HW[-1, -1] = (1 << bits) - 1
    shown_HW = pixels(encode(encoded(Image.fromarray(ramp_HW), "PNG"), grey_bits=bits).data)[..., 0]
    assert np.array_equal(shown_HW, np.rint(ramp_HW.astype(float) * 255 / ((1 << bits) - 1)))
    assert len(np.unique(shown_HW)) == 256


def test_grey_above_its_bits_is_turned_away():
    with pytest.raises(BadImageError, match="more than 12 bits per pixel"):
        encode(encoded(Image.fromarray(RAMP_HW), "PNG"), grey_bits=12)


@pytest.mark.parametrize(
    ("start", "name"), [(b"RIFF\0\0\0\0WEBP", "WebP"), (b"\0\0\0\x18ftypheic", "HEIC"), (b"\0\0\0\x18ftypavif", "AVIF")]
)
def test_pictures_that_this_pil_lacks_are_named_whatever_their_extension(start, name):
    if name != "HEIC" and features.check(name.lower()):
        pytest.skip(f"this PIL reads {name}")
    with pytest.raises(BadImageError, match=f"{name}, which this PIL does not read"):
        encode(start + bytes(100))


def test_a_format_that_this_pil_lacks_is_not_called_damaged(monkeypatch):
    def without(*_: object, **__: object) -> Image.Image:
        raise OSError("decoder libtiff not available")

    monkeypatch.setattr(shards.encode.Image, "open", without)
    with pytest.raises(BadImageError, match="this PIL was built without its format"):
        encode(PNG)


@pytest.mark.skipif(not features.check("webp"), reason="this PIL was built without WebP")
def test_webp_becomes_jpeg():
    assert encode(encoded(picture(), "WEBP")).extension == "jpg"


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L")])
def test_keep_bytes_keeps_plain_files(kind, mode):
    data = encoded(picture().convert(mode), kind)
    assert encode(data, keep_bytes=True).data is data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (with_orientation(picture(), "JPEG", 6), "cannot be kept: EXIF does not say upright"),
        (with_orientation(picture(), "PNG", 3), "cannot be kept: EXIF does not say upright"),
        (encoded(picture().convert("CMYK"), "JPEG"), "cannot be kept: not plain 8-bit RGB or grey"),
        (encoded(picture().convert("RGBA"), "PNG"), "cannot be kept: not plain 8-bit RGB or grey"),
        (encoded(Image.fromarray(RAMP_HW), "PNG"), "cannot be kept: not plain 8-bit RGB or grey"),
        (encoded(picture(), "BMP"), "cannot be kept: neither a JPEG nor a PNG"),
        (with_orientation(picture(size=(150, 120)), "JPEG", 6)[:-10], "damaged or truncated"),
        (JPEG[: len(JPEG) // 2], "damaged or truncated"),
        (b"", "empty file"),
    ],
)
def test_keep_bytes_turns_away_what_would_be_written_again(data, reason):
    with pytest.raises(BadImageError) as error:
        encode(data, keep_bytes=True)
    assert str(error.value) == reason
    if reason.startswith("cannot be kept"):
        encode(data)


@pytest.mark.parametrize("shorter_side", [213, 200, 186, 182, 150, 107, 92, 75])
def test_decoding_at_a_fraction_costs_no_more_than_storing_does(shorter_side):
    # A picture of much detail; its height of 427 is no multiple of anything.
    data = encoded(Image.fromarray(load_sample_image("china.jpg")), "JPEG", quality=95)
    stored_HWC = pixels(encode(data, shorter_side).data)
    exact = Image.open(BytesIO(data)).resize(stored_HWC.shape[1::-1], Image.Resampling.BICUBIC)
    exact_HWC = np.asarray(exact).astype(int)
    again_HWC = pixels(encoded(exact, "JPEG", quality=90))
    assert np.square(stored_HWC - exact_HWC).mean() < 2.05 * np.square(again_HWC - exact_HWC).mean()


def test_a_file_of_a_few_bytes_is_an_image():
    assert encode(b"P5 1 1 255\n\x07").extension == "png"


def test_16_bit_grey_needs_little_memory():
    data = encoded(Image.fromarray(np.zeros((2000, 1000), np.uint16)), "PNG")
    tracemalloc.start()
    try:
        encode(data)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["profile", "text", "wide letters", "two of one name"])
def test_a_large_profile_or_text_does_not_cost_the_image(kind, monkeypatch):
    text = PngImagePlugin.PngInfo()
    if kind in ("text", "two of one name"):
        text.add_text("project", "x" * 1_500_000, zip=True)
    if kind == "two of one name":
        text.add_text("project", "x", zip=True)
    if kind == "wide letters":
        text.add_itxt("project", "\u8a9e" * 500_000, zip=True)
    options = {"icc_profile": bytes(1_500_000)} if kind == "profile" else {"pnginfo": text}
    data = encoded(picture(), "PNG", **options)
    stored = encode(data)
    with pytest.raises(BadImageError, match="a colour profile or text of more than a megabyte"):
        encode(data, keep_bytes=True)
    assert encode(stored.data).data is stored.data
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", shards.encode.MOST_TEXT)  # as where PIL is used alone
    assert np.array_equal(pixels(stored.data), np.asarray(picture()))


@pytest.mark.parametrize("kind", ["plain", "other letters", "small"])
def test_a_text_that_every_pil_reads_stays(kind):
    text = PngImagePlugin.PngInfo()
    if kind == "other letters":
        text.add_itxt("project", "\u8a9e" * 500_000)
    else:
        text.add_text("project", "x" * (1000 if kind == "small" else 1_500_000), zip=kind == "small")
    data = encoded(picture(), "PNG", pnginfo=text, icc_profile=bytes(1000))
    assert encode(data).data is data
    assert encode(data, keep_bytes=True).data is data
