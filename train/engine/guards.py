"""Guards: what goes wrong in a run of three days is one line, with what is needed to find out why."""

import errno
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.batch import Batch, Loader
from shards.atomic import write_json
from shards.errors import UserError
from shards.index import Split
from train.engine import runs

STALLED_STATUS = 1


class LossGuard:
    """Stops a run whose loss is not finite, and writes down on which images it happened.

    A loss is looked at when the next step is under way, so that no GPU waits for it; `check` looks at once.
    """

    def __init__(self, run_folder: Path, split: Split, rank: int) -> None:
        self._path = run_folder / f"nonfinite-loss-rank-{rank}.json"
        self._split = split
        self._last: tuple[torch.Tensor, dict[str, Any], dict[str, NDArray[np.int64]]] | None = None

    def seen(self, loss: torch.Tensor, where: dict[str, Any], batch: dict[str, Batch]) -> None:
        """Take note of a step's loss and look at the one before.

        Args:
            loss: a scalar, on any device.
            where: what to report about the step: epoch, step, lr.
            batch: the step's streams.

        Raises:
            UserError: the loss before was not finite.
        """
        self.check()
        self._last = loss.detach(), where, {name: part.ids_B for name, part in batch.items()}

    def check(self) -> None:
        """Look at the last loss; raises as `seen` does."""
        if self._last is None:
            return
        (loss, where, ids), self._last = self._last, None
        value = loss.item()
        if np.isfinite(value):
            return
        names = self._split.sample_names()
        samples = {name: [names[i] for i in ids_B.tolist()] for name, ids_B in ids.items()}
        write_json(self._path, {"loss": str(value), **where, "samples": samples})
        raise UserError(
            f"the loss is {value} in epoch {where['epoch']}, step {where['step']}, at a rate of {where['lr']:g}; lower"
            f" optim.lr, set --optim.clip_norm 1, or use --loop.precision no; {self._path} names the step's images"
        )


def check_weights(network: torch.nn.Module, epoch: int, step: int) -> None:
    """Refuse weights that are not finite: a checkpoint of them could never be resumed.

    Raises:
        UserError: a gradient was not finite although the loss was.
    """
    for name, weights in network.named_parameters():
        if not bool(torch.isfinite(weights).all()):
            raise UserError(
                f"{name} is not finite in epoch {epoch}, after step {step}, and no checkpoint of it is written; lower"
                " optim.lr, set --optim.clip_norm 1, or use --loop.precision no, then resume with --resume"
            )


class StallGuard:
    """Hands on a loader's batches, and ends the process when one does not come within a limit.

    A thread watches, because a loader that hangs in foreign code can be neither interrupted nor asked. It counts how
    long it watched itself: a process that was suspended (Ctrl-Z, a scheduler's SIGSTOP) did not wait meanwhile.
    """

    def __init__(self, loader: Loader, streams: tuple[str, ...], rank: int, limit_s: float) -> None:
        self._loader, self._streams, self._rank, self._limit_s = loader, streams, rank, limit_s
        self._waiting_since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Batch]:
        self._waiting_since = time.monotonic()
        try:
            return next(self._loader)
        finally:
            self._waiting_since = None

    def _watch(self) -> None:
        tick = min(1.0, self._limit_s / 4)
        waited, of, before = 0.0, None, time.monotonic()
        while not self._closed.wait(tick):
            since, now = self._waiting_since, time.monotonic()
            waited = (waited if since == of else 0.0) + min(now - before, 2 * tick)
            of, before = since, now
            if since is not None and waited > self._limit_s:
                stream = self._loader.waiting_for or " or ".join(self._streams)
                with suppress(OSError):  # nobody may read it
                    print(
                        f"error: rank {self._rank} has waited {self._limit_s:g} s for a batch of the stream {stream}:"
                        " look at the storage of its shards, then resume with --resume (or a longer"
                        " --loop.stall_minutes)",
                        file=sys.stderr,
                        flush=True,
                    )
                os._exit(STALLED_STATUS)


def check_devices(environment: Mapping[str, str], device: str, gpus: int) -> None:
    """Report what is wrong before processes wait for each other.

    Args:
        environment: of the process, with what a launcher has set (LOCAL_RANK).
        device: auto, cpu or cuda, as the user asked.
        gpus: GPUs that torch finds on this machine.

    Raises:
        UserError: a GPU is asked for and there is none, or more processes than GPUs were started.
    """
    if device == "cuda" and not gpus:
        raise UserError("loop.device=cuda, but torch finds no GPU here; use --loop.device cpu, or see nvidia-smi")
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    if device != "cpu" and gpus and local_rank >= gpus:
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own: torch finds {gpus}; start --num_processes"
            f" {gpus}, or use --loop.device cpu"
        )


@contextmanager
def errors_in_one_line(
    run_folder: Path | Sequence[Path] | None = None,
    more_memory: str = "lower input.batch_size, or work in parts with --optim.accumulate 2",
) -> Iterator[None]:
    """Turn errors of the machine, in memory, disk and network, into a `UserError`.

    Args:
        run_folder: of the run that can be resumed; or a list, in which it appears as soon as there is one.
        more_memory: what to do where memory is too small.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(_out_of_memory(error, more_memory)) from error
    except OSError as error:
        run_folder = run_folder if isinstance(run_folder, Path) else next(iter(run_folder or ()), None)
        if run_folder is None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            raise
        raise UserError(
            f"cannot write {error.filename or run_folder} ({error.strerror}); when that is solved, resume with"
            f" {runs.resuming(run_folder)}"
        ) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # of torch's batch norm; see train/networks/batch_norm.py
            raise
        raise UserError(
            "a part of one image with maps of 1x1 has no variance to normalise by; use a larger input.batch_size or"
            " input.image_size, fewer processes, or a smaller optim.accumulate"
        ) from error
    except RuntimeError as error:
        said = " ".join(str(error).split())
        # A GPU that others have filled has no room for what CUDA itself needs, which is no OutOfMemoryError.
        if re.search(r"not enough memory|can't allocate memory|out of memory|STATUS_ALLOC_FAILED", said):
            raise UserError(_out_of_memory(error, more_memory)) from error
        if "EADDRINUSE" in said or "ddress already in use" in said:
            port = os.environ.get("MASTER_PORT", "?")
            raise UserError(
                f"port {port} is in use on this machine; choose another with --main_process_port (or MASTER_PORT)"
            ) from error
        if re.search(
            r"Connection (closed|reset) by peer|Broken pipe|(gloo|NCCL).*(remote process exit|[Tt]imed? ?out)", said
        ):
            raise UserError(
                f"lost another process of this run ({said[:160]}); its own message says why; resume with --resume"
            ) from error
        if re.search(r"gloo|NCCL", said):
            raise UserError(
                f"the processes of this run cannot exchange data ({said[-320:]}); NCCL_DEBUG=INFO makes NCCL say more"
            ) from error
        raise


def _out_of_memory(error: BaseException, remedy: str) -> str:
    return f"out of memory ({' '.join(str(error).split())[:160]}); {remedy}"
