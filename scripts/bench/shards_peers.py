"""What bench_shards.py compares with. Runs in an environment of its own, with ordinary Pillow.

    python scripts/bench/shards_peers.py plain|mosaicml SOURCE OUT

Both shrink each image to a shorter side of 256 pixels, antialiased, and store a JPEG of quality 90, as a person would
write it who has not heard of drafts.
"""

import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image

SHORTER_SIDE = 256
QUALITY = 90


def samples(source: Path) -> Iterator[tuple[bytes, int]]:
    """Yield each image's new bytes and its label."""
    for label, folder in enumerate(sorted(source.iterdir())):
        for path in sorted(folder.iterdir()):
            with Image.open(path) as image:
                scale = SHORTER_SIDE / min(image.size)
                size = (round(image.width * scale), round(image.height * scale))
                small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
            buffer = BytesIO()
            small.save(buffer, "JPEG", quality=QUALITY)
            yield buffer.getvalue(), label


def plain(source: Path, out: Path) -> None:
    """Pillow and webdataset's TarWriter."""
    import webdataset

    out.mkdir()
    sink = None
    for i, (data, label) in enumerate(samples(source)):
        if i % 2000 == 0:
            if sink is not None:
                sink.close()
            sink = webdataset.TarWriter(str(out / f"train-{i // 2000:06d}.tar"))
        assert sink is not None
        sink.write({"__key__": f"{i:09d}", "jpg": data, "cls": label})
    if sink is not None:
        sink.close()


def mosaicml(source: Path, out: Path) -> None:
    """Pillow and MosaicML's MDSWriter."""
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"jpg": "bytes", "cls": "int"}) as writer:
        for data, label in samples(source):
            writer.write({"jpg": data, "cls": label})


if __name__ == "__main__":
    {"plain": plain, "mosaicml": mosaicml}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
