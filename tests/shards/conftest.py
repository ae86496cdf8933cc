from collections.abc import Callable
from pathlib import Path

import pytest
from shards_pictures import encoded, picture

from shards.build import build


@pytest.fixture(scope="session")
def image_folder() -> Callable[..., Path]:
    """Write a source folder: image_folder(root, {"cat": 3, "train/dog": 2}) writes that many PNGs in each."""

    def write(root: Path, counts: dict[str, int]) -> Path:
        for i, (name, count) in enumerate(counts.items()):
            folder = root / name
            folder.mkdir(parents=True)
            for j in range(count):
                (folder / f"{j:03d}.png").write_bytes(encoded(picture(1000 * i + j), "PNG"))
        return root

    return write


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded dataset in several shards; tests only read it."""
    return build("digits", out=tmp_path_factory.mktemp("digits") / "digits", shard_samples=150, workers=1)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    """A source folder of 19 pictures and a file that is none."""
    root = image_folder(tmp_path_factory.mktemp("pets"), {"cat": 9, "dog": 6, "eel": 4})
    (root / "cat" / "text.jpg").write_text("no image")
    return root
