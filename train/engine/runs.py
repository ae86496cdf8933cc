"""Run folders: what training leaves behind for people, for the report and for the next stage.

runs/digits-bbn-1/
    config.yaml            the resolved configuration
    metrics.jsonl          a row per epoch
    checkpoints/           to resume from; selected.safetensors where a split chose an epoch
    model.safetensors      the weights after the last epoch, with model.json, which says all that it takes to use them
    model-selected.safetensors   those of the epoch that did best on val, where it chose one
    predictions.npz        what the last weights say of each test and val image; predictions-selected.npz likewise
    diagnostics.npz        lengths of the classifier's rows and how compact features are; feature_sample.npz, from AFG
    per_class.json         the last epoch's correct answers per class
    summary.json           written last: a run that has it is finished
    .lock                  held by the process that writes here
"""

import fcntl
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import yaml

from shards.atomic import write_text
from shards.cli import program_name
from shards.errors import UserError

RUNS = Path("runs")
CALIBRATION = "calibration.json"  # of its probabilities; it fits no other weights
MADE_OF_A_MODEL = ("model.onnx", "model.pt2", "README.md")  # by tailstream export and card, where --out says nothing
LOCK = ".lock"

# What trackers make before config.yaml is there; see `train.engine.tracking`.
OF_TRACKERS = {"tracking.json", "tensorboard", "wandb"}

_held: dict[Path, TextIO] = {}


def lock(run: Path) -> None:
    """Keep other processes from writing to a run's folder, until `unlock` or this process's end, whatever ends it.

    Where the file system knows no locks, nothing is kept.

    Raises:
        UserError: another process holds it.
    """
    path = run.resolve() / LOCK
    while path not in _held:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise UserError(f"{run} is in use by {holder}; wait until that ends, or stop it") from None
        except OSError:
            file.close()
            return
        # The process that held it before may have removed this file in the meantime.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            _held[path] = file
        else:
            file.close()


def unlock(run: Path | None = None) -> None:
    """Let other processes write to a run that this one holds, or to all of them."""
    for path in list(_held) if run is None else [run.resolve() / LOCK]:
        file = _held.pop(path, None)
        if file is not None:
            path.unlink(missing_ok=True)  # while it is locked
            file.close()


def write_config(run: Path, content: dict[str, Any]) -> None:
    """Write a run's resolved configuration."""
    write_text(run / "config.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def append_row(run: Path, row: dict[str, Any]) -> None:
    """Append one epoch's row to metrics.jsonl."""
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())  # as the checkpoint that counts it is


def truncate_rows(run: Path, epochs: int) -> None:
    """Keep the rows of the first epochs only: a resumed run writes the later ones again."""
    path = run / "metrics.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(path, "".join(lines[:epochs]))


def read_config(run: Path) -> dict[str, Any]:
    """Return a run's resolved configuration."""
    path = run / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run} is not a run: it has no config.yaml; give the folder of a training run") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no settings)")
    return content


def read_begun(run: Path, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that a run to be resumed began with, by section, and what it says about itself.

    Raises:
        UserError: it is a run of another method, or what `read_config` raises.
    """
    sections = read_config(run)
    about = sections.pop("about", {})
    if about.get("method") != method:
        raise UserError(f"{run} is a run of {about.get('method')}, not of {method}; name another")
    return sections, about


def read_summary(run: Path) -> dict[str, Any]:
    """Return a finished run's summary."""
    path = run / "summary.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{run} is not finished (no summary.json); resume it: {resuming(run)}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train the run again") from None


def new_run(stem: str) -> Path:
    """Make and lock the next free folder runs/STEM-1, runs/STEM-2, …"""
    if RUNS.is_symlink() and not RUNS.exists():  # every folder under it would seem to be there already
        raise UserError(
            f"{RUNS} is a link to {os.readlink(RUNS)}, which is not there; make that folder, or name one with --run"
        )
    number = 1
    while True:
        run = RUNS / f"{stem}-{number}"
        try:
            run.mkdir(parents=True)
            lock(run)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"cannot make a run folder under {RUNS.resolve()} ({error.strerror})") from None
        else:
            return run


def use_run(path: Path, resume: bool) -> Path:
    """Make and lock the folder of a run that was named, or accept the one that is there when resuming."""
    # A kill may have left the beginnings of a file there, and so may a tracker that did not start.
    taken = path.exists() and (
        not path.is_dir() or any(not name.startswith(".") and name not in OF_TRACKERS for name in os.listdir(path))
    )
    if taken and not (path / "config.yaml").exists():
        raise UserError(f"{path} already exists and is no run of ours; name another folder with --run")
    if taken and not resume:
        raise UserError(f"{path} already holds a run: add --resume to resume it, or name another")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock(path)
    except OSError as error:
        raise UserError(f"cannot make the run folder {path} ({error.strerror}); name another with --run") from None
    return path


def newest_run(stages: set[int], dataset: str | None = None, method: str | None = None, finished: bool = True) -> Path:
    """Return the run under runs/ that was last begun or finished.

    Args:
        stages: which stages to look at, such as {1}.
        dataset: only runs on the dataset of this name.
        method: only runs of this method.
        finished: whether to look for finished runs, or for unfinished ones (then stages is not looked at).
    """
    found: list[tuple[float, bool, Path]] = []  # of a folder and a link to it, such as runs/latest, the folder
    for config in {*RUNS.glob("*/config.yaml"), *RUNS.glob("**/config.yaml")}:  # "**" passes links by
        run = config.parent
        summary_path = run / "summary.json"
        if summary_path.exists() != finished:
            continue
        try:
            content = json.loads(summary_path.read_text(encoding="utf-8")) if finished else read_config(run)["about"]
            fits = dataset in (None, content["dataset"]) and method in (None, content["method"])
            if fits and (not finished or content["stage"] in stages):
                found.append(((summary_path if finished else config).stat().st_mtime, not run.is_symlink(), run))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a run of ours
    if not found:
        wanted = f"{'finished' if finished else 'unfinished'} {method or 'stage-one'} run"
        where = f" on {dataset}" if dataset else ""
        raise UserError(f"there is no {wanted}{where} under {RUNS}/; name one, or train one")
    return max(found)[2]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the code, marked where files differ from it; None outside a checkout."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():  # git would take a repository above for it, such as the one an environment lies in
        return None
    try:
        said = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.machine()


def environment(device: str, processes: int) -> dict[str, Any]:
    """Say what the run ran on: software versions, commit and hardware."""
    import PIL

    return {
        "python": platform.python_version(),
        **{
            name: _version(name)
            for name in ("torch", "torchvision", "accelerate", "numpy", "nvidia-dali-cuda130", "webdataset")
        },
        "pillow": PIL.__version__,
        "commit": _commit(),
        "device": device,
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "processes": processes,
    }


def resuming(run: Path, data: str | None = None) -> str:
    """Return the options that resume a run, as a shell takes them."""
    return shlex.join([*(["--data", data] if data else []), "--run", str(run), "--resume"])


def command() -> str:
    """Return the command line of this process, as one would type it; bytes that are no UTF-8 with escapes."""
    words = shlex.join([program_name(os.path.relpath(sys.argv[0]) if sys.argv[0] else ""), *sys.argv[1:]])
    return os.fsencode(words).decode("utf-8", "backslashreplace")
