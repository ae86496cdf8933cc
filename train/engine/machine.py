"""The machine and the launcher: what they give a process, and which of it is not supported."""

import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shards.cli import program_name
from shards.cores import cores
from shards.errors import UserError
from train.engine.guards import check_devices, errors_in_one_line

PROC = Path("/proc")
DEVICES = Path("/dev")

# What accelerate's launcher hands on in the environment and would change the training without a word: the variable,
# what it is called, and what to do instead.
_NOT_SUPPORTED = {
    "ACCELERATE_USE_FSDP": ("FSDP", "every process keeps the whole network here; start it with --multi_gpu"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "every process keeps the whole network here; start it with --multi_gpu"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "every process keeps the whole network here; use --multi_gpu"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism configuration", "start it with --multi_gpu"),
}


def check_launcher(environment: Mapping[str, str], device: str = "auto") -> None:
    """Refuse what a launcher asks for and this project does not do, or has a setting of its own for.

    Args:
        environment: of the process, with what the launcher has set.
        device: auto, cpu or cuda, as the user asked.

    Raises:
        UserError: names the launcher's setting and the remedy.
    """
    for variable, (name, remedy) in _NOT_SUPPORTED.items():
        if environment.get(variable, "false").lower() in ("true", "1", "yes"):
            raise UserError(f"accelerate is configured for {name}, which is not supported; {remedy}")
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("no", ""):
        raise UserError(
            f"accelerate is configured with dynamo_backend {backend.lower()}, which is not supported; start it with"
            " --dynamo_backend no, and compile with --loop.compile true"
        )
    parts = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if parts not in ("1", ""):
        raise UserError(
            f"accelerate is configured with gradient_accumulation_steps {parts}, which is not supported; start it with"
            f" --gradient_accumulation_steps 1, and work in parts with --optim.accumulate {parts}"
        )
    if environment.get("ACCELERATE_MIXED_PRECISION", "no").lower() == "fp8":
        raise UserError("accelerate is configured for mixed precision fp8, which is not supported; use bf16")
    if device == "cuda" and environment.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes"):
        raise UserError("loop.device=cuda, but accelerate was started with --cpu; leave one of them out")


def usable_gpu(device: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a run will be on a GPU.

    Args:
        device: auto, cpu or cuda, as the user asked.
        environment: of the process, with what the launcher has set.
    """
    cpu = device == "cpu" or environment.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    return not cpu and torch.cuda.is_available()


def unusable_gpu(environment: Mapping[str, str]) -> str | None:
    """Return what to say about an NVIDIA GPU that is there and that torch cannot use; None where there is no such.

    Args:
        environment: of the process: GPUs may have been hidden on purpose.
    """
    hidden = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    on_purpose = hidden or environment.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    version = PROC / "driver/nvidia/version"
    if on_purpose or torch.cuda.is_available() or not (version.exists() or (DEVICES / "nvidia0").exists()):
        return None
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", version.read_text())
    except OSError:
        found = None
    driver = f"driver {found[1]}" if found else "driver"
    if torch.version.cuda is None:
        cannot = f"torch {torch.__version__} is made without CUDA; install one with CUDA"
    else:
        cannot = (
            f"torch {torch.__version__}, made for CUDA {torch.version.cuda}, cannot use it with this {driver}; update"
            " the driver, or install torch and DALI that are made for CUDA 12 (README names them)"
        )
    return f"warning: this machine has an NVIDIA GPU, but {cannot}; training on the CPU (--loop.device cpu: no warning)"


def take_threads(asked: int | None, environment: Mapping[str, str]) -> int:
    """Let torch compute with this process's share of the cores; return the number of threads.

    Launchers set OMP_NUM_THREADS=1 where the user has not set it, and a training on a CPU would use one core of many.
    Loaders are left out of the sharing: on a CPU a step takes many times as long as decoding its images.

    Args:
        asked: what the user wants; None keeps OMP_NUM_THREADS where the user has set it.
        environment: of the process, with what the launcher has set.
    """
    local = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("MPI_LOCALNRANKS") or 1)
    unset = "OMP_NUM_THREADS" not in environment
    if asked is not None:
        torch.set_num_threads(asked)
    elif _set_by_launcher(environment) or (unset and (local > 1 or cores() < torch.get_num_threads())):
        torch.set_num_threads(max(1, cores() // local))
    return torch.get_num_threads()


def _set_by_launcher(environment: Mapping[str, str]) -> bool:
    """Return whether OMP_NUM_THREADS is there without the user's doing: the launcher itself did not get it."""
    if environment.get("OMP_NUM_THREADS") != "1" or not _is_launched(environment):
        return False
    parent = PROC / str(os.getppid())
    try:
        began_with = (parent / "environ").read_bytes().split(b"\0")
        line = (parent / "cmdline").read_bytes()
    except OSError:
        return False  # another user's, such as Slurm's
    return not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in began_with) and b"num_cpu_threads" not in line


def _is_launched(environment: Mapping[str, str]) -> bool:
    return "RANK" in environment or "ACCELERATE_MIXED_PRECISION" in environment


def launched_by(script: str) -> list[str]:
    """Return the words before the script on the command line that started this process, as one would type them.

    Such as python, or accelerate launch with its options; a launcher is the parent process. A command that is no Python
    file, such as tailstream, needs no word before it.
    """
    words = [sys.executable] if script.endswith(".py") else []
    if _is_launched(os.environ):
        try:
            line = (PROC / str(os.getppid()) / "cmdline").read_bytes().decode().split("\0")[:-1]
        except (OSError, UnicodeDecodeError):
            line = []
        # A launcher that runs a script of several lines, as Slurm's file has one, is none that anybody types.
        if script in line[1:] and not any("\n" in word for word in line):
            words = line[: line.index(script, 1)]
    if len(words) > 1 and _is_on_path(words[1]):
        words = [Path(words[1]).name, *words[2:]]
    elif words and _is_on_path(words[0]):
        words = [Path(words[0]).name, *words[1:]]
    return words


def started_by(name: str) -> str:
    """Return what starts a program again, on as many processes as now: `tailstream train NAME`, or with a launcher."""
    program = program_name(sys.argv[0], f"train {name}")
    words = [program] if program == sys.argv[0] else program.split()
    launcher = launched_by(words[0]) if _is_launched(os.environ) else []
    return shlex.join([*launcher, *words]) if launcher else f"tailstream train {name}"


def _is_on_path(program: str) -> bool:
    found = shutil.which(Path(program).name)
    return found is not None and os.path.abspath(found) == os.path.abspath(program)


class _Accelerator(Accelerator):
    """Accelerate's own, which would print once a machine, and prints once."""

    def print(self, *values: Any, **options: Any) -> None:
        if self.is_main_process:
            print(*values, **options)


def make_accelerator(precision: str, device: str = "auto", threads: int | None = None) -> Accelerator:
    """Make the Accelerator and take this process's share of the cores, or say in one line what stands in the way."""
    check_launcher(os.environ, device)
    check_devices(os.environ, device, torch.cuda.device_count())
    cpu = device == "cpu" or not torch.cuda.is_available()
    if device != "cpu" and os.environ.get("RANK", "0") == "0" and (warning := unusable_gpu(os.environ)):
        print(warning, file=sys.stderr, flush=True)
    taken = take_threads(threads, os.environ)
    if cpu and precision == "fp16":
        raise UserError("loop.precision=fp16 needs a GPU; use --loop.precision bf16, or no")
    try:
        with errors_in_one_line(), warnings.catch_warnings():
            # Among several processes on CPUs it takes another number of threads, where OMP_NUM_THREADS is not set.
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
            # Without cpu=True several processes on CPUs would each run as if they were alone.
            accelerator = _Accelerator(mixed_precision=None if precision == "auto" else precision, cpu=cpu)
            torch.set_num_threads(taken)
            return accelerator
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"loop.precision={precision}: {' '.join(str(error).split())}") from None
