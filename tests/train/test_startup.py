"""A command line is answered before what takes seconds is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "torchvision", "timm", "accelerate", "scipy", "sklearn", "matplotlib", "nvidia.dali"}
RUN = """
import json, runpy, sys
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
finally:
    print(json.dumps(sorted(sys.modules)))
"""


# Pages that are launched as modules, and a command line that is wrong only as a whole.
MODULES = {"predict": ["a.jpg"], "export": [], "calibrate": ["--run", "a", "--per-class"], "card": []}


@pytest.mark.parametrize("page", ["bbn", "erm", "sdn", "afg", "decouple", "frozen"])
@pytest.mark.parametrize(("option", "status"), [("--help", 0), ("--optim.lrr", 2), ("--optim.lr=-1", 2)])
def test_help_and_wrong_options_wait_for_no_torch(page, option, status, tmp_path):
    answered_at_once(page, f"train/{page}.py", [option], status, tmp_path)


@pytest.mark.parametrize("page", MODULES)
@pytest.mark.parametrize(("options", "status"), [(["--help"], 0), (["--rum", "a"], 2), (None, 2)])
def test_so_do_pages_about_a_finished_run(page, options, status, tmp_path):
    answered_at_once(page, f"python -m train.{page}", MODULES[page] if options is None else options, status, tmp_path)


def answered_at_once(page, program, options, status, tmp_path):
    path = str(ROOT / "train" / f"{page}.py")
    code = RUN.replace("sys.argv[1]", repr(path)).replace("try:", f"sys.argv = {[path, *options]}\ntry:", 1)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    if status:
        assert done.stderr.count("\n") == 1
        assert f"{program}: error: " in done.stderr
    else:
        assert done.stdout.startswith(f"usage: {program}")
    assert not HEAVY & set(json.loads(done.stdout.splitlines()[-1]))
