"""What scripts/setup.sh promises about the environment that it makes."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import PIL
import pytest

ROOT = Path(__file__).parents[2]


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_only_one_pil_is_installed_and_it_is_the_active_one():
    files = {
        name: [str(file) for file in importlib.metadata.files(name) or () if str(file).startswith("PIL/")]
        for name in ("pillow", "pillow-simd")
        if installed(name)
    }
    (holder,) = [name for name, of in files.items() if of]
    assert PIL.__version__ == installed(holder)


def test_nobody_misses_a_package_and_one_pil_answers_for_both_names():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert installed("pillow") == installed("pillow-simd").partition(".post")[0]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


def test_pinned_versions_are_plain_and_fit_what_is_declared():
    pinned, for_tests = pins("requirements.txt"), pins("requirements-test.txt")
    assert pinned.items() <= for_tests.items()
    assert "pillow" not in for_tests
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [re.match(r"[a-z0-9-]+", wanted)[0] for wanted in project["dependencies"]]
    assert "torch" in declared
    assert set(declared) <= set(pinned)
    assert {"pytest", "ruff", "mypy", "dask", "s3fs", "moto"} <= set(for_tests)


@pytest.mark.skipif(installed("tailstream") is None, reason="runs from a checkout that is not installed")
def test_rooms_are_importable_from_anywhere():
    for room in ("shards", "shards.sources", "pipeline", "train", "analysis", "tailstream"):
        assert importlib.util.find_spec(room) is not None
