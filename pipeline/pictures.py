"""One image at a time, by PIL: the portable way from encoded bytes to what the network sees."""

import io

import numpy as np
import torch
from PIL import Image

from pipeline.augment import Interpolation
from pipeline.distort import distort
from pipeline.plan import Draw
from pipeline.reader import ShardReader
from shards.index import Split
from shards.strict import check_chunks

STORED = ("JPEG", "PNG")

FILTERS: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# As a model's description has them.
FILTER_NAMES: dict[Interpolation, str] = {
    "bilinear": "bilinear, antialiased (triangle filter)",
    "bicubic": "bicubic, antialiased (a = −1/2)",
}


class UndecodableError(Exception):
    """An image that does not decode: `sample` is its id, `reason` says why on one line."""

    def __init__(self, sample: int, reason: str) -> None:
        super().__init__(f"sample {sample}: {reason}")
        self.sample, self.reason = sample, reason


def decode(split: Split, reader: ShardReader, sample: int) -> Image.Image:
    """Read and decode a sample: an RGB picture of the size that the index says.

    Raises:
        UndecodableError: its bytes are no picture of that size.
        UserError: its shard cannot be read.
    """
    (file,) = reader.encoded([sample])
    row = split.samples[sample]
    expected = (int(row["width"]), int(row["height"]))
    try:
        with Image.open(io.BytesIO(file.data), formats=STORED) as opened:
            # Before any pixel is decoded: damaged bytes may speak of a huge picture.
            if opened.size != expected:
                raise ValueError(f"{opened.size[0]}x{opened.size[1]} pixels, not {expected[0]}x{expected[1]}")
            if opened.format == "PNG":
                check_chunks(file.data)  # PIL fills what is lacking with black
            return opened.convert("RGB")
    except MemoryError:  # it says nothing about the image
        raise
    # PIL's plugins meet damaged bytes with whatever their code runs into: OSError, SyntaxError, struct.error…
    except Exception as error:
        # PIL names the buffer, whose address says nothing.
        reason = " ".join(str(error).split(" <_io")[0].split())
        raise UndecodableError(sample, reason or type(error).__name__) from error


def show_windows(split: Split, reader: ShardReader, draw: Draw, image_size: int) -> torch.Tensor:
    """Decode a draw's images, cut their windows, resize them with antialiasing as PIL does, mirror and distort.

    Args:
        split: what the draw's ids belong to.
        reader: of that split.
        draw: B samples, and what is shown of them.
        image_size: S, in pixels.

    Returns:
        Shape (B, S, S, 3), uint8, RGB, on the CPU.

    Raises:
        UndecodableError: the first image that does not decode.
        UserError: a shard cannot be read.
    """
    filter_ = FILTERS[draw.interpolation]
    images_BHWC = np.empty((len(draw.ids_B), image_size, image_size, 3), dtype=np.uint8)
    for image_HWC, sample, (top, left, height, width), flip in zip(
        images_BHWC, draw.ids_B.tolist(), draw.windows_B4.tolist(), draw.flips_B.tolist(), strict=True
    ):
        window = decode(split, reader, sample).crop((left, top, left + width, top + height))
        shown = np.asarray(window.resize((image_size, image_size), filter_))
        image_HWC[:] = shown[:, ::-1] if flip else shown
    shown_BHWC = torch.from_numpy(images_BHWC)
    return shown_BHWC if draw.distortions_B is None else distort(shown_BHWC, draw.distortions_B)
