"""The files that start a run on many GPUs: understood by accelerate, and what Slurm's script does."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts" / "launch"


@pytest.mark.parametrize(
    ("name", "machines", "processes"), [("one-gpu", 1, 1), ("eight-gpus", 1, 8), ("two-nodes", 2, 16)]
)
def test_accelerate_reads_the_configurations(name, machines, processes):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.mixed_precision == "bf16"
    assert config.distributed_type == ("NO" if processes == 1 else "MULTI_GPU")


def test_accelerate_has_nothing_to_remark_on_a_launch_with_one(tmp_path):
    (tmp_path / "script.py").write_text("print('started')\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            "launch",
            "--config_file",
            LAUNCH / "one-gpu.yaml",
            "script.py",
        ],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("started\n", "")


def test_a_log_has_the_epochs_of_a_run_that_is_killed(workplace):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    settings = ["--run", "runs/a", "--optim.epochs", "500", "--input.image_size", "8", "--input.batch_size", "48"]
    with Path("log").open("wb") as log:
        training = subprocess.Popen(
            [sys.executable, ROOT / "train/erm.py", *settings], env=environment, stdout=log, stderr=log
        )
    rows, deadline = Path("runs/a/metrics.jsonl"), time.monotonic() + 60
    try:
        while not rows.exists() or rows.read_text().count("\n") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        training.kill()
        training.wait()
    assert "epoch   1/500" in Path("log").read_text()


# As srun(1) says: with --kill-on-bad-exit a task that fails has the others killed, and the status is the highest.
SRUN = r"""
while [ "${1#-}" != "$1" ]; do
    echo "$1" >> options
    case "$1" in --kill-on-bad-exit=1 | --kill-on-bad-exit | -K*) kill=yes ;; esac
    shift
done
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & pids[$i]=$!; done
first=0; wait "${pids[0]}" || first=$?
if [ "$first" != 0 ] && [ -n "${kill-}" ]; then kill -9 "${pids[1]}" 2>/dev/null; fi
second=0; wait "${pids[1]}" || second=$?
exit $((first > second ? first : second))
"""


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (2, False)])
def test_a_slurm_job_that_stopped_for_its_time_is_queued_again(tmp_path, status, requeued):
    """With stand-ins for Slurm's commands and for Python."""
    stand_ins = {
        "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" >> calls; fi',
        "srun": SRUN,
        "python": 'echo "$RANK $LOCAL_RANK $LOCAL_WORLD_SIZE $WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $@" >> calls;'
        ' if [ "$RANK" = 1 ]; then sleep 0.3; fi; exit $STATUS',
    }
    for name, body in stand_ins.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": str(status)}
    environment |= {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "6",
        "SLURM_NTASKS_PER_NODE": "8",
    }
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "train/bbn.py", "--run", "runs/a b"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if requeued else status), done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    ranks = [f"{rank} {rank} 8 2 first 20007: train/bbn.py --run runs/a b --resume" for rank in range(2)]
    assert sorted(calls[:2]) == ranks
    options = dict(option.split("=") for option in (tmp_path / "options").read_text().split())
    assert options["--cpus-per-task"] == "6"
    assert int(options["--wait"]) >= 600  # also after a task that ends well: the first one writes results alone
    assert calls[2:] == (["requeue 7"] if requeued else [])
