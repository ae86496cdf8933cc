"""A loader in a process of its own: loads steps on command, and is stopped by a signal in between.

    LoaderProcess(command)       ──── starts ───>  serve(open_steps)
    .load(30)                    ───── "30" ────>  takes 30 steps
                                 <── images ─────
    .stop()                      ─── SIGSTOP ───>  nothing runs, no prefetching either

CPU time and memory are those of all processes of its session: a loader's workers are in it.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

Steps = Generator[list[tuple[Any, Any]], None, None]  # per step, each stream's images and labels
SECONDS_TO_ANSWER = 300
SECONDS_TO_END = 20


class LoaderError(RuntimeError):
    """A loader that did not start or stopped; the message is its last line."""


@dataclass(frozen=True)
class Load:
    """What some steps took: seconds by the clock, CPU seconds of all its processes, images of all streams."""

    seconds: float
    cpu_seconds: float
    images: int


class LoaderProcess:
    """Starts `command`, which must call `serve`; use it in a with block.

    Attributes:
        about: what `serve` said: what a step delivers, how long the first took, and versions of libraries.

    Raises:
        LoaderError: it ended, or gave no answer for five minutes.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        with ExitStack() as opened:
            self._errors = opened.enter_context(tempfile.TemporaryFile("w+"))
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                start_new_session=True,
            )
            opened.callback(self._end)
            self.about: dict[str, Any] = self._answer()
            self._opened = opened.pop_all()  # closed here only if there was no answer

    def load(self, steps: int) -> Load:
        """Take steps, and measure."""
        cpu_seconds, start = self._cpu_seconds(), time.perf_counter()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        images = self._answer()
        return Load(time.perf_counter() - start, self._cpu_seconds() - cpu_seconds, images)

    def stop(self) -> None:
        """Stop all its processes where they are."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let them run again."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def memory_mb(self) -> float:
        """Its own memory, shared pages counted once; without mapped files, which are the page cache's."""
        kilobytes = 0
        for pid, _ in self._session():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        return kilobytes / 1024

    def _end(self) -> None:
        """End it, and what it started: first as it would end by itself, for it may have shared memory to free."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(ProcessLookupError):
            self.go_on()
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(SECONDS_TO_END)
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; a second time does nothing."""
        self._opened.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], SECONDS_TO_ANSWER)[0]:
            raise LoaderError(f"no answer within {SECONDS_TO_ANSWER} seconds")
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
            raise LoaderError(lines[-1] if lines else f"ended with status {self._process.returncode}")
        return json.loads(answer)

    def _session(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the id of each of its processes, and the fields of /proc/PID/stat behind the name."""
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._process.pid:
                    yield path.name, fields

    def _cpu_seconds(self) -> float:
        # User and system time of each process and of its children that have ended.
        ticks = sum(int(field) for _, fields in self._session() for field in fields[11:15])
        return ticks / os.sysconf("SC_CLK_TCK")


def serve(open_steps: Callable[[], Steps], device: str, versions: Callable[[], dict[str, str]]) -> None:
    """Open a loader and take steps from it as the standard input says: a number of steps per line.

    Args:
        open_steps: returns the loader's steps.
        device: where a step's images shall be, "cpu" or "cuda"; they are copied there if they are not.
        versions: returns versions of the libraries that matter.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between
    start = time.perf_counter()
    steps = open_steps()
    first = next(steps)
    about = {
        "delivers": [_describe(images) for images, _ in first],
        "first_step_seconds": time.perf_counter() - start,
        "versions": versions(),
    }
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        images_seen = 0
        for _ in range(int(line)):
            for images, _labels in next(steps):
                images_seen += len(images)
                if device != "cpu":
                    images = images.to(device, non_blocking=True)
        if device != "cpu":
            import torch

            torch.cuda.synchronize()
        print(images_seen, file=answers)
    steps.close()


def _describe(images: Any) -> str:
    if isinstance(images, list):
        return f"{len(images)} pictures of any size"
    return f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
