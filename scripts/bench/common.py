"""What the benchmarks share: pictures, environments for other libraries, and what a result says about the machine."""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from shards.errors import UserError
from shards.progress import say
from shards.sources.arrays import png

ROOT = Path(__file__).parents[2]
# torch is taken from the environment that the script runs in: mosaicml-streaming imports it.
WITHOUT_TORCH = "torch; python_version < '0'\ntorchvision; python_version < '0'\n"


class OneLineParser(argparse.ArgumentParser):
    """Argparse's, whose mistakes are one line."""

    def __init__(self, program: str, about: str | None, **options: Any) -> None:
        super().__init__(program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Print it and exit with status 2."""
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def write_photographs(
    source: Path,
    labels: Iterable[int],
    size: Callable[[np.random.Generator], tuple[int, int]],
    suffix: Literal["jpg", "png"] = "jpg",
    quality: int = 90,
) -> float:
    """Write one of `photographs` per label, in a folder per class; return the mean file size in bytes."""
    pictures, sizes = photographs(size), []
    for i, label in enumerate(labels):
        picture, path = next(pictures), source / f"class-{label:02d}" / f"{i:06d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "jpg":
            picture.save(path, quality=quality)
        else:
            path.write_bytes(png(np.asarray(picture)))  # as CIFAR is stored
        sizes.append(path.stat().st_size)
    return float(np.mean(sizes))


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


def read_counts(path: Path) -> list[int]:
    """Read images per class from a JSON list."""
    try:
        counts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a JSON list of images per class") from None
    if not isinstance(counts, list) or not counts or not all(isinstance(n, int) and n > 0 for n in counts):
        raise UserError(f"{path} must hold a JSON list of positive integers, images per class")
    return counts


def peer_environments(folder: Path, peers: dict[str, list[str]], skipped: dict[str, str]) -> dict[str, Path]:
    """Make an environment per set of packages; return each peer's Python. What does not install is skipped."""
    pythons: dict[str, Path] = {}
    made: dict[tuple[str, ...], Path | str] = {}
    for peer, needed in peers.items():
        packages = tuple(needed)
        if packages not in made:
            say(f"making an environment with {', '.join(packages)}")
            try:
                made[packages] = make_environment(folder / f"env-{peer}", packages)
            except subprocess.CalledProcessError as error:
                made[packages] = f"does not install: {reason(error.stderr)}"
            except OSError as error:  # there is no uv
                made[packages] = f"does not install: {error}"
        python = made[packages]
        if isinstance(python, Path):
            pythons[peer] = python
        else:
            skipped[peer] = python
    return pythons


def make_environment(folder: Path, packages: Iterable[str]) -> Path:
    """Make an environment with these packages first and this one's behind them; return its Python."""
    folder.mkdir()
    override = folder / "override.txt"
    override.write_text(WITHOUT_TORCH)
    python = folder / "env" / "bin" / "python"
    uv("venv", "--python", sys.executable, folder / "env")
    uv("pip", "install", "--python", python, "--override", override, *packages)
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", site], check=True, capture_output=True, text=True).stdout.strip()
    # A line of a .pth file comes behind the folder that it lies in.
    Path(own, "behind.pth").write_text(str(Path(np.__file__).parents[1]) + "\n")
    return python


def uv(*words: str | Path) -> None:
    """Run uv without the project's settings for it."""
    program = shutil.which("uv") or Path(sys.executable).with_name("uv")
    subprocess.run([program, "--no-config", *words], check=True, capture_output=True, text=True)


def reason(errors: str) -> str:
    """Return the line that says what went wrong: the last that names an error, else the last."""
    lines = [line.strip() for line in errors.strip().splitlines()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])


def header(**environment: Any) -> dict[str, Any]:
    """What every result begins with: the command, the commit, and the machine with whatever else is given."""
    return {
        "command": shlex.join(sys.orig_argv[1:]),
        "commit": commit(),
        "environment": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "numpy": version("numpy"),
            **environment,
        },
    }


def cpu_name() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str:
    """The checked-out commit, with "+" behind it where tracked files differ from it; empty outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    say(f"written: {path}")
