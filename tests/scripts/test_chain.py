"""The commands that people type, as they type them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def shell(command: str, where: Path, status: int = 0) -> str:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="scripts/setup.sh has not run here")
def test_build_train_generate_report(tmp_path):
    assert "next: tailstream train bbn" in shell(f"{ROOT}/scripts/build_shards.sh digits", tmp_path)
    shell(f"accelerate launch {ROOT}/train/bbn.py --optim.epochs 1", tmp_path)
    shell(f"accelerate launch {ROOT}/train/afg.py --optim.epochs 1", tmp_path)
    shell("python -m analysis report runs/digits-bbn-1 runs/digits-afg-1 --out page.html", tmp_path)
    assert "BBN + AFG" in (tmp_path / "page.html").read_text()
    summary = json.loads((tmp_path / "runs/digits-afg-1/summary.json").read_text())
    assert summary["from"] == "digits-bbn-1"
    assert "no problem found" in shell("python -m shards verify data/digits", tmp_path)


def test_a_mistake_exits_with_2_and_one_line(tmp_path):
    said = shell(f"python {ROOT}/train/bbn.py --data nowhere", tmp_path, status=2)
    assert said.strip().splitlines() == [
        "train/bbn.py: error: nowhere does not exist, so it is not a dataset;"
        " build one with: tailstream build digits --out nowhere"
    ]
