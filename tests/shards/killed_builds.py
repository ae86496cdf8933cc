"""Kill builds and resume them. Runs as a process of its own, without threads, so that it may fork.

python killed_builds.py MODE SOURCE FOLDER: builds SOURCE in FOLDER, killed in different ways as MODE says, resumes
until it is done, and compares all bytes with those of a build that nobody disturbed. Prints how often it killed.
"""

import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from shards.build import build
from shards.staging import STAGING

OPTIONS = {"shard_samples": 4, "workers": 1}

os.fsync = lambda descriptor: None  # it takes long, and only matters where the whole machine dies
tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and one that is killed may hold it


def child(work: Callable[[], object]) -> int:
    """Do the work in a forked, silent process; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def killed(pid: int) -> bool:
    """Wait for the child: whether it was killed; it must not have failed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def dying_at(step: int) -> None:
    """Have this process killed before the given one of the calls that change what is on disk."""
    calls = 0

    def counted(call):
        def counting(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counting

    os.fsync = counted(os.fsync)
    os.ftruncate = counted(os.ftruncate)
    for name in ("replace", "unlink", "mkdir", "rmdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    shutil.rmtree = counted(shutil.rmtree)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(out: Path) -> dict[str, int]:
    """The shards with a record, and the file that holds each."""
    tars = list((out / STAGING).glob("*-*.tar"))
    return {path.name: path.stat().st_ino for path in tars if path.with_suffix(".json").exists()}


def goes_on(source: Path, out: Path, wanted: dict[str, bytes], **options: object) -> None:
    """The same command again: it ends well, keeps the finished shards, and gives the wanted bytes."""
    before = finished(out)
    assert not killed(child(lambda: build("folder", source=source, out=out, **OPTIONS, **options)))
    for name, inode in before.items():
        if name in wanted:  # a shard of bad images is left out
            assert (out / name).stat().st_ino == inode, f"{name} was written again"
    assert contents(out) == wanted


def at_every_step(source: Path, folder: Path, wanted: dict[str, bytes]) -> int:
    """Kill at every fourth call that changes the disk, until a build gets through."""
    out = folder / "out"
    for kills, step in enumerate(range(1, 10_000, 4)):

        def work(step: int = step) -> None:
            dying_at(step)
            build("folder", source=source, out=out, **OPTIONS)

        if not killed(child(work)):
            assert contents(out) == wanted
            return kills
        goes_on(source, out, wanted)
        shutil.rmtree(out)
    raise AssertionError("no build got through")


def while_overwriting(source: Path, folder: Path, wanted: dict[str, bytes]) -> int:
    """The same on top of a dataset built otherwise, which stays until the new one is complete."""
    other, out = folder / "other", folder / "out"
    build("folder", source=source, out=other / "out", seed=1, shard_samples=3, workers=1)
    before = contents(other / "out")
    for kills, step in enumerate(range(2, 10_000, 8)):
        shutil.copytree(other / "out", out)

        def work(step: int = step) -> None:
            dying_at(step)
            build("folder", source=source, out=out, overwrite=True, **OPTIONS)

        if not killed(child(work)):
            assert contents(out) == wanted
            return kills
        if (
            not (out / STAGING / "dataset.json").exists()
            and (out / "dataset.json").read_bytes() != wanted["dataset.json"]
        ):
            assert contents_without_staging(out) == before
        goes_on(source, out, wanted, overwrite=True)
        shutil.rmtree(out)
    raise AssertionError("no build got through")


def contents_without_staging(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != STAGING}


def at_random(source: Path, folder: Path, wanted: dict[str, bytes]) -> int:
    """Kill at random moments, the same build up to three times over."""
    out = folder / "out"
    chance = random.Random(0)

    def work() -> None:
        build("folder", source=source, out=out, **OPTIONS)

    start = time.monotonic()
    assert not killed(child(work))
    seconds = time.monotonic() - start
    shutil.rmtree(out)
    kills = 0
    while kills < 20:
        for _ in range(chance.randint(1, 3)):
            pid = child(work)
            time.sleep(chance.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            kills += killed(pid)
        goes_on(source, out, wanted)
        shutil.rmtree(out)
    return kills


if __name__ == "__main__":
    mode, source, folder = globals()[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    undisturbed = folder / "undisturbed" / "out"
    build("folder", source=source, out=undisturbed, **OPTIONS)
    print("kills:", mode(source, folder, contents(undisturbed)))
