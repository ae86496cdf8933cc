"""What inspect prints."""

import numpy as np
import pytest
from shards_pictures import encoded, picture

from shards.build import build
from shards.index import open_dataset
from shards.show import BLOCKS, draw_tail, inspect


def test_inspect_shows_splits_tail_bytes_and_groups(digits):
    lines = inspect(open_dataset(digits)).splitlines()
    assert "train 412, val 136, test 451; 10 classes" in lines
    assert "training images per class: 120 to 6, imbalance factor 20; 1 many, 5 medium, 4 few" in lines
    assert lines[4:6] == [f"{'0':>24}  120", f"{'1':>24}  88"]
    assert lines[13] == f"{'9':>24}  6"
    assert f"120 │{'█' * 6}▅▅▅▅▅▅▂▂▂▂▂▂" in lines
    n_bytes = sum(path.stat().st_size for path in digits.glob("val-*.tar"))
    assert f"val: {n_bytes:,} bytes in 1 shard" in lines
    assert lines[-1] == "rejected images: 0"


def test_inspect_counts_rejected_images_by_reason(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 3, "b": 3})
    (source / "a" / "1.jpg").write_text("")
    (source / "a" / "2.jpg").write_text("text")
    (source / "b" / "3.jpg").write_text("text")
    (source / "b" / "4.jpg").write_bytes(encoded(picture(), "JPEG")[:-9])
    root = build("folder", source=source, out=tmp_path / "out", test_fraction=0, val_fraction=0, workers=1)
    assert inspect(open_dataset(root)).splitlines()[-4:] == [
        "rejected images: 4",
        f"{'damaged or truncated':>45}  1",
        f"{'empty file':>45}  1",
        f"{'not an image':>45}  2",
    ]


@pytest.mark.parametrize(("n_classes", "width"), [(1, 7), (2, 14), (13, 52), (64, 64), (65, 64), (8142, 64)])
def test_the_tail_fits_and_falls(n_classes, width):
    counts_C = np.geomspace(1000, 2, n_classes).astype(int)
    lines = draw_tail(np.random.default_rng(0).permutation(counts_C))
    assert len(lines) == 7
    bars = [line.partition("│")[2].ljust(width) for line in lines[:-1]]
    assert {len(bar) for bar in bars} == {width}
    heights = [sum(BLOCKS.index(bar[column]) for bar in bars) for column in range(width)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == 48
    assert heights[-1] >= 1


def test_the_drawing_names_the_groups_below():
    assert draw_tail(np.array([9, 500, 120, 60, 30]), width=20, height=3) == [
        "500 │████▃▃▃▃",
        " 62 │████████████▅▅▅▅▁▁▁▁",
        "  7 │████████████████████",
        "     many    medium  few",
    ]
