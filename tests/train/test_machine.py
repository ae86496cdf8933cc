"""What the machine and the launcher give a training: settings that are refused, threads, a GPU that cannot be used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shards.errors import UserError
from train.engine import machine
from train.engine.launch import run
from train.engine.machine import (
    check_launcher,
    launched_by,
    make_accelerator,
    started_by,
    take_threads,
    unusable_gpu,
)
from train.erm import ERM

ROOT = Path(__file__).parents[2]
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "ACCELERATE_DYNAMO_BACKEND",
            "INDUCTOR",
            "dynamo_backend inductor, which is not supported; start it with --dyn",
        ),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "compile with --loop.compile true"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "work in parts with --optim.accumulate 4"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP, which is not supported; "),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed, which is not supported; "),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM, which is not supported; "),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism configuration, which is not supported; "),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed precision fp8, which is not supported; use bf16"),
    ],
)
def test_what_the_launcher_would_change_is_refused(workplace, capsys, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match="2"):
        run(ERM, [])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (workplace / "runs").exists()


def test_what_accelerate_sets_by_itself_is_accepted():
    check_launcher({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", **LAUNCHED})
    check_launcher({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_CPU": "true"}, "cpu")
    with pytest.raises(UserError, match=r"loop.device=cuda, but accelerate was started with --cpu"):
        check_launcher({"ACCELERATE_USE_CPU": "True"}, "cuda")


@pytest.fixture
def parent(tmp_path, monkeypatch):
    """Let this process have a parent of another environment and command line: parent(line, **environment)."""

    def pretend(line: str, **environment: str) -> None:
        folder = tmp_path / "proc" / str(os.getppid())
        folder.mkdir(parents=True)
        entries = [f"{name}={value}" for name, value in environment.items()]
        (folder / "environ").write_bytes("\0".join([*entries, ""]).encode())
        (folder / "cmdline").write_bytes("\0".join([*line.split("|"), ""]).encode())
        monkeypatch.setattr(machine, "PROC", tmp_path / "proc")

    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    yield pretend
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("environment", "line", "parents", "threads"),
    [
        (LAUNCHED, "accelerate|launch|x.py", {}, 6),
        ({"RANK": "0", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, "torchrun|x.py", {}, 3),
        ({"RANK": "0", "LOCAL_WORLD_SIZE": "8", "OMP_NUM_THREADS": "1"}, "torchrun|x.py", {}, 1),
        (LAUNCHED, "accelerate|launch|x.py", {"OMP_NUM_THREADS": "1"}, 2),  # the user's own
        (LAUNCHED, "accelerate|launch|--num_cpu_threads_per_process|1|x.py", {}, 2),
        (LAUNCHED | {"OMP_NUM_THREADS": "4"}, "accelerate|launch|x.py", {}, 2),
        ({"OMP_NUM_THREADS": "1"}, "bash", {}, 2),
        ({}, "bash", {}, 2),  # torch's own choice
        ({"RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "bash", {}, 3),
    ],
)
def test_threads_are_the_cores_shared_unless_the_user_said_otherwise(parent, environment, line, parents, threads):
    parent(line, **parents)
    torch.set_num_threads(2)  # as torch began
    assert take_threads(None, environment) == torch.get_num_threads() == threads
    assert take_threads(5, environment) == torch.get_num_threads() == 5


def test_a_container_that_may_use_fewer_cores_than_it_sees_takes_fewer_threads(parent, monkeypatch):
    parent("bash")
    monkeypatch.setattr(machine, "cores", lambda: 1)
    torch.set_num_threads(2)  # as torch began
    assert take_threads(None, {"OMP_NUM_THREADS": "2"}) == 2
    assert take_threads(None, {}) == torch.get_num_threads() == 1


def test_a_parent_that_cannot_be_read_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert take_threads(None, LAUNCHED) == torch.get_num_threads()


@pytest.mark.parametrize(("users", "shared"), [({}, True), ({"OMP_NUM_THREADS": "1"}, False)])
def test_under_the_real_launcher(tmp_path, users, shared):
    script = tmp_path / "my script.py"
    script.write_text(
        "import os, sys\nfrom train.engine.machine import launched_by, take_threads\n"
        "print(take_threads(None, os.environ), launched_by(sys.argv[0]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **users}
    launch = ["accelerate", "launch", "--num_processes", "1", "--dynamo_backend", "no"]
    done = subprocess.run([*launch, str(script)], env=environment, capture_output=True, text=True, check=True)
    threads = len(os.sched_getaffinity(0)) if shared else 1
    assert done.stdout.strip() == f"{threads} {launch}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{bin}/python|{bin}/accelerate|launch|--cpu|--x|a b|a.py|-x", "accelerate|launch|--cpu|--x|a b"),
        ("/other/python|-m|torch.distributed.run|--|a.py", "/other/python|-m|torch.distributed.run|--"),
        ("bash|other.sh", "python"),
        ("srun|bash|-c|\nexport RANK=1\nexec python|bash|a.py", "python"),
        ("a.py", "python"),
    ],
)
def test_the_launcher_is_the_parents_command_line(parent, monkeypatch, line, words):
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("RANK", "0")
    parent(line.format(bin=folder))
    assert launched_by("a.py") == words.split("|")
    monkeypatch.delenv("RANK")
    assert launched_by("a.py") == ["python"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert launched_by("a.py") == [str(folder / "python")]


def test_a_second_stage_is_resumed_on_as_many_processes(parent, monkeypatch):
    parent("torchrun|--nproc-per-node|2|a b.py|--|tailstream")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["a b.py"])
    assert started_by("afg") == "torchrun --nproc-per-node 2 'a b.py'"
    monkeypatch.setattr(sys, "argv", ["/bin/tailstream"])
    assert started_by("afg") == "torchrun --nproc-per-node 2 'a b.py' -- tailstream train afg"
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert started_by("afg") == "tailstream train afg"


@pytest.mark.parametrize("seen", ["driver", "device"])
def test_a_gpu_that_torch_cannot_use_is_named(tmp_path, monkeypatch, capsys, seen):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert unusable_gpu({}) is None
    if seen == "driver":
        (tmp_path / "driver/nvidia").mkdir(parents=True)
        (tmp_path / "driver/nvidia/version").write_text(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version 12\n"
        )
    else:
        (tmp_path / "nvidia0").touch()
    make_accelerator("auto")
    warning = capsys.readouterr().err
    assert warning.startswith("warning: this machine has an NVIDIA GPU, but torch ")
    assert warning.count("\n") == 1
    assert ("with this driver 535.104.05; update" if seen == "driver" else "with this driver; update") in warning
    assert "install torch and DALI that are made for CUDA 12 (README names them)" in warning
    make_accelerator("auto", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    make_accelerator("auto")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is made without CUDA; install one with CUDA" in unusable_gpu({})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unusable_gpu({}) is None
