"""What the benchmarks share: pictures, environments for other libraries, and what a result says about the machine."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from shards.progress import say

ROOT = Path(__file__).parents[2]
# torch is taken from the environment that the script runs in: mosaicml-streaming imports it.
WITHOUT_TORCH = "torch; python_version < '0'\ntorchvision; python_version < '0'\n"


def photographs(size: Callable[[np.random.Generator], tuple[int, int]]) -> Iterator[Image.Image]:
    """Yield windows of scikit-learn's two photographs without end, mirrored by turns.

    Args:
        size: draws a picture's (width, height), in pixels; the window has its shape and is 480 pixels wide or more,
            or as high as the photograph.
    """
    generator = np.random.default_rng(0)
    originals = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    number = 0
    while True:
        photograph, (wanted_width, wanted_height) = originals[number % 2], size(generator)
        width = int(generator.integers(480, photograph.width + 1))
        height = width * wanted_height // wanted_width
        if height > photograph.height:
            height, width = photograph.height, photograph.height * wanted_width // wanted_height
        left = int(generator.integers(0, photograph.width - width + 1))
        top = int(generator.integers(0, photograph.height - height + 1))
        window = (left, top, left + width, top + height)
        picture = photograph.resize((wanted_width, wanted_height), Image.Resampling.BICUBIC, window)
        yield picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number // 2 % 2 else picture
        number += 1


def make_environment(folder: Path, packages: list[str]) -> Path:
    """Make an environment with these packages first and this one's behind them; return its Python."""
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    folder.mkdir()
    override = folder / "override.txt"
    override.write_text(WITHOUT_TORCH)
    python = folder / "env" / "bin" / "python"
    install = [uv, "pip", "install", "--no-config", "--python", python, "--override", override, *packages]
    for command in ([uv, "venv", "--no-config", "--python", sys.executable, folder / "env"], install):
        subprocess.run(command, check=True, capture_output=True, text=True)
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", site], check=True, capture_output=True, text=True).stdout.strip()
    # A line of a .pth file comes behind the folder that it lies in.
    Path(own, "behind.pth").write_text(str(Path(np.__file__).parents[1]) + "\n")
    return python


def cpu_name() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def environment() -> dict[str, Any]:
    """The machine and the versions that every benchmark depends on."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": version("numpy"),
    }


def commit() -> str:
    """The checked-out commit, with "+" behind it where tracked files differ from it; empty outside of git."""
    command = ["git", "-C", ROOT, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    say(f"written: {path}")
