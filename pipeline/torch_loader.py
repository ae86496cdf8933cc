"""The portable loader: PIL in a PyTorch DataLoader. The reference that tests hold the other loaders against."""

import multiprocessing
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import cache
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from pipeline.batch import Loader, Shown, steps_from
from pipeline.faults import BadImage, Faults
from pipeline.fork_server import fork_server
from pipeline.plan import Draw, Plan
from pipeline.reader import ShardReader
from shards.errors import UserError

# Each worker prepares two steps ahead (a DataLoader's prefetch_factor); one more is sent and one is used.
STEPS_AHEAD, STEPS_UNDER_WAY = 2, 2
PATIENCE = 2.0  # seconds in which workers end by themselves


class _Step(NamedTuple):
    """What a worker sends back: each stream's images and the draw they show, and what its `Faults` took."""

    streams: list[tuple[torch.Tensor | NDArray[np.uint8], Draw]]
    faults: tuple[dict[int, BadImage], dict[int, int]]


class _Steps(Dataset[_Step | UserError]):
    """Maps a step number to the loaded streams of that step; lives in the DataLoader's workers."""

    def __init__(self, plan: Plan, fault_limit: int, through_pipes: bool) -> None:
        self._plan, self._reader, self._faults = plan, ShardReader(plan.split), Faults(fault_limit)
        self._through_pipes = through_pipes

    def __getitem__(self, step: int) -> _Step | UserError:
        """Return the step. A user's mistake is returned too: raised, the DataLoader would wrap it in a traceback."""
        try:
            return self._load(step)
        except UserError as error:
            return error

    def _load(self, step: int) -> _Step:
        streams: list[tuple[torch.Tensor | NDArray[np.uint8], Draw]] = []
        for draw in self._plan.draws(step):
            images_BHWC, shown = self._faults.rescue(self._plan, self._reader, draw)
            self._faults.count(draw)
            # Tensors travel through shared memory, and arrays through a pipe.
            streams.append((images_BHWC.numpy() if self._through_pipes else images_BHWC, shown))
        return _Step(streams, self._faults.take())


def _as_it_is(step: Any) -> Any:
    return step


def _kill(workers: set[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _shared_memory() -> int:
    """Return the free bytes of shared memory, which belongs to all processes of a machine."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _has_room(plan: Plan, workers: int) -> bool:
    """Return whether the steps that workers prepare fit the shared memory: in a full one they would wait for ever."""
    images = plan.rank_batch * len(plan.streams) * 3 * plan.image_size**2
    wanted = images * (STEPS_AHEAD * workers + STEPS_UNDER_WAY)
    room = _shared_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if wanted > room:
        _say_small(f"{room / 1e9:.2g}", f"{wanted / 1e9:.2g}")
    return wanted <= room


@cache
def _say_small(room: str, wanted: str) -> None:
    print(
        f"note: /dev/shm has {room} GB free for each process and batches would take {wanted} GB, so they go through"
        " pipes, which takes longer; in a container, --ipc=host or --shm-size gives it more",
        file=sys.stderr,
    )


class TorchLoader(Loader):
    """Worker processes prepare whole steps, two ahead each."""

    def __init__(self, plan: Plan, device: torch.device, workers: int, start_step: int) -> None:
        super().__init__(plan, device)
        others = set(multiprocessing.active_children())
        self._steps: Iterator[_Step | UserError] = iter(
            DataLoader(
                _Steps(plan, self.faults.limit, through_pipes=bool(workers) and not _has_room(plan, workers)),
                batch_size=None,
                sampler=steps_from(plan, start_step),
                collate_fn=_as_it_is,
                num_workers=workers,
                prefetch_factor=STEPS_AHEAD if workers else None,
                multiprocessing_context=fork_server([__name__]) if workers else None,
                pin_memory=device.type == "cuda",
                # Else each opening takes a number from torch's own generator, and a run's losses depend on how often it
                # was evaluated, resumed, or which loader it had.
                generator=torch.Generator(),
            )
        )
        # For one that hangs: the SIGTERM with which the DataLoader, or the interpreter's end, would stop it is blocked.
        self._end = weakref.finalize(self, _kill, set(multiprocessing.active_children()) - others)

    def _next_step(self) -> list[Shown]:
        try:
            step = next(self._steps)
        except (RuntimeError, EOFError, OSError) as error:
            # Named by the DataLoader, or met here in the middle of a worker's batch; else it is what a worker raised.
            lost = "exited unexpectedly" in str(error) or isinstance(
                error, EOFError | ConnectionError | FileNotFoundError
            )
            if lost and "Caught" not in str(error):
                raise UserError(
                    "a worker process of the torch loader was killed, perhaps for lack of memory; lower --input.threads"
                ) from error
            raise
        if isinstance(step, UserError):
            raise step
        self.faults.merge(*step.faults)
        return [Shown(torch.as_tensor(images_BHWC), shown) for images_BHWC, shown in step.streams]

    def close(self) -> None:
        """Stop the worker processes."""
        # Else the DataLoader waits ten seconds for each that waits for storage: its SIGTERM is blocked.
        impatient = threading.Timer(PATIENCE, self._end)
        impatient.start()
        self._steps = iter(())
        impatient.cancel()
        self._end()
