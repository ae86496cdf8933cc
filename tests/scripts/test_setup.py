"""What scripts/setup.sh promises about the environment that it makes."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import PIL
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def pins(name: str, python: str = "3.11") -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z0-9-]+==[\w.]+( ; python_version == "[\d.]+")?', line) for line in lines)
    wanted = [Requirement(line) for line in lines]
    here = [one for one in wanted if one.marker is None or one.marker.evaluate({"python_version": python})]
    return {one.name: str(one.specifier).removeprefix("==") for one in here}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_pins_hold_what_is_needed_on_every_python(python):
    """As far as the packages that are installed here say it."""
    pinned, for_tests = pins("requirements.txt", python), pins("requirements-test.txt", python)
    machine = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    for package in importlib.metadata.distributions():
        needed = [
            one for one in map(Requirement, package.requires or []) if not one.marker or one.marker.evaluate(machine)
        ]
        for held in (pinned, for_tests):
            if canonicalize_name(package.name) in held:
                lacking = {canonicalize_name(one.name) for one in needed} - held.keys() - {"pillow"}
                assert not lacking, package.name


def test_pinned_versions_are_plain_and_fit_what_is_declared():
    pinned, for_tests = pins("requirements.txt"), pins("requirements-test.txt")
    assert pinned.items() <= for_tests.items()
    assert "pillow" not in for_tests
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = list(map(Requirement, project["dependencies"]))
    assert "torch" in [wanted.name for wanted in declared]
    for wanted in declared:
        assert wanted.specifier.contains(pinned[wanted.name]), wanted
    assert {"pytest", "ruff", "mypy", "dask", "s3fs", "moto"} <= set(for_tests)


PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def test_a_wheel_has_every_package():
    rooms = ("shards", "pipeline", "train", "analysis")
    found = {".".join(path.parent.relative_to(ROOT).parts) for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert found == set(PACKAGES)


@pytest.mark.skipif(installed("tailstream") is None, reason="runs from a checkout that is not installed")
def test_rooms_are_importable_from_anywhere(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = f"import importlib.util as u; assert all(u.find_spec(name) for name in {[*PACKAGES, 'tailstream']})"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@pytest.fixture
def checkout(tmp_path):
    """What setup.sh works on, with stand-ins; `calls` says what uv was asked for."""
    for name in ("scripts/setup.sh", "requirements.txt", "requirements-test.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = {".venv/bin/python": "exit 0", ".venv/bin/tailstream": "exit 0", "bin/cc": "cat >/dev/null"}
    for name, body in (programs | {"bin/uv": f'echo "$@" >> {tmp_path}/calls'}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    words = "cat requirements.txt pyproject.toml scripts/setup.sh | sha256sum | cut -c1-16"
    digest = subprocess.run(words, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / f".venv/tailstream-{digest}").touch()
    return tmp_path


def set_up(checkout) -> str:
    environment = os.environ | {"PATH": f"{checkout}/bin:{os.environ['PATH']}"}
    subprocess.run([checkout / "scripts/setup.sh"], env=environment, capture_output=True, check=True)
    return (checkout / "calls").read_text() if (checkout / "calls").exists() else ""


def test_nothing_is_done_twice(checkout):
    assert set_up(checkout) == ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="pillow-simd is for x86-64")
def test_pillow_simd_is_built_once_it_can_be(checkout):
    entry = checkout / ".venv/lib/python3.11/site-packages/pillow_simd-12.1.1.post0.dist-info"
    entry.mkdir(parents=True)
    (entry / "INSTALLER").write_text("setup.sh\n")  # Pillow stands in
    assert "pillow-simd==" in set_up(checkout)


def test_another_python_for_an_environment_that_is_there_is_refused(checkout):
    (checkout / ".venv/bin/python").write_text("#!/bin/sh\necho Python 3.11.2\n")
    (checkout / "bin/python3.12").write_text("#!/bin/sh\necho Python 3.12.1\n")
    (checkout / "bin/python3.12").chmod(0o755)
    environment = os.environ | {"PATH": f"{checkout}/bin:{os.environ['PATH']}", "PYTHON": "python3.12"}
    done = subprocess.run([checkout / "scripts/setup.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert ".venv has Python 3.11.2, and PYTHON=python3.12 is another; remove .venv" in done.stderr


@pytest.mark.parametrize(
    ("words", "marks"),
    [
        ("", ["not slow and not gpu", "gpu"]),
        ("tests/train -k ranks", ["not slow and not gpu", "gpu"]),
        ("-m slow", ["slow"]),
    ],
)
def test_beside_a_gpu_the_other_tests_see_none(checkout, words, marks):
    shutil.copy(ROOT / "scripts/test.sh", checkout / "scripts")
    python = f'if [ "$2" = pytest ]; then echo "${{CUDA_VISIBLE_DEVICES-all}} $*" >> {checkout}/tests; else echo 2; fi'
    for name, body in {"python": python, "ruff": "exit 0", "mypy": "exit 0", "nvidia-smi": "exit 0"}.items():
        (checkout / ".venv/bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (checkout / ".venv/bin" / name).chmod(0o755)
    (checkout / "scripts/setup.sh").write_text("#!/bin/sh\n")
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    subprocess.run([checkout / "scripts/test.sh", *words.split()], env=environment, check=True)
    runs = (checkout / "tests").read_text().splitlines()
    assert [run.partition(" -m ")[2].partition(" -m ")[2] for run in runs] == marks
    assert [run.startswith(" ") for run in runs] == [mark == "not slow and not gpu" for mark in marks]


def test_a_copied_checkout_gets_its_own_programs(checkout):
    (checkout / ".venv/bin/tailstream").write_text("#!/elsewhere/.venv/bin/python\n")
    assert "--editable ." in set_up(checkout)
