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


@pytest.mark.parametrize("page", ["bbn", "erm", "sdn", "afg", "decouple", "frozen"])
@pytest.mark.parametrize(("option", "status"), [("--help", 0), ("--optim.lrr", 2), ("--optim.lr=-1", 2)])
def test_help_and_wrong_options_wait_for_no_torch(page, option, status, tmp_path):
    path = str(ROOT / "train" / f"{page}.py")
    code = RUN.replace("sys.argv[1]", repr(path)).replace("try:", f"sys.argv = [{path!r}, {option!r}]\ntry:", 1)
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
        assert f"train/{page}.py: error: " in done.stderr
    else:
        assert done.stdout.startswith(f"usage: train/{page}.py")
    assert not HEAVY & set(json.loads(done.stdout.splitlines()[-1]))
