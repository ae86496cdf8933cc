"""Small datasets of real pictures that several rooms test with: built once per session."""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from shards.build import build
from shards.index import Dataset, open_dataset

ROOT = Path(__file__).parents[1]

# One thread: with more, tests beside other busy processes spend their time waiting for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def permissions() -> Iterator[None]:
    """Makes permissions count, for this thread, where the tests run as root."""
    library = ctypes.CDLL(None, use_errno=True)
    version_3, words = 0x20080522, 6  # effective, permitted and inheritable, each of two words
    header, held = (ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * words)()
    assert library.capget(header, held) == 0, ctypes.get_errno()
    fewer = (ctypes.c_uint32 * words)(*held)
    fewer[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert library.capset(header, fewer) == 0, ctypes.get_errno()
    yield
    assert library.capset(header, held) == 0, ctypes.get_errno()


@pytest.fixture
def signalled(tmp_path: Path) -> Callable[[Sequence[object], Path, Sequence[int]], tuple[int, str]]:
    """Run Python in a session of its own, and signal all processes there once a file appears: its status and output."""

    def run(words: Sequence[object], begun: Path, numbers: Sequence[int]) -> tuple[int, str]:
        log = tmp_path / "signalled.log"
        with log.open("w") as output:
            job = subprocess.Popen(
                [sys.executable, *map(str, words)],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + 120
        while not begun.exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        for number in numbers:
            os.killpg(job.pid, number)
        return job.wait(60), log.read_text()

    return run


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """scikit-learn's digits, long-tailed: 120 to 6 images per class."""
    return open_dataset(build("digits", out=tmp_path_factory.mktemp("data") / "digits", workers=1))


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEGs of several sizes, cut from scikit-learn's two photographs; three classes, 24, 12 and 6."""
    root = tmp_path_factory.mktemp("source") / "photos"
    generator = np.random.default_rng(0)
    photographs = load_sample_images().images
    for label, (name, count) in enumerate({"temple": 24, "flower": 12, "both": 6}.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            photograph = photographs[label if label < 2 else number % 2]
            height, width = generator.integers(90, 200), generator.integers(90, 300)
            top = generator.integers(0, photograph.shape[0] - height)
            left = generator.integers(0, photograph.shape[1] - width)
            picture = Image.fromarray(photograph[top : top + height, left : left + width])
            picture.save(root / name / f"{number:02}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def photos(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """`photo_folder` as a dataset, in several shards."""
    out = tmp_path_factory.mktemp("data") / "photos"
    return open_dataset(build("folder", source=photo_folder, out=out, workers=1, shard_samples=7))
