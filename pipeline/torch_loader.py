"""The portable loader: PIL in a PyTorch DataLoader. The reference that tests hold the other loaders against."""

import multiprocessing
import weakref
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.batch import Loader, Shown, steps_from
from pipeline.faults import BadImage, Faults
from pipeline.fork_server import fork_server
from pipeline.plan import Plan
from pipeline.reader import ShardReader
from shards.errors import UserError


class _Step(NamedTuple):
    """What a worker sends back: each stream's images, and what its `Faults` took."""

    streams: list[Shown]
    faults: tuple[dict[int, BadImage], dict[int, int]]


class _Steps(Dataset[_Step | UserError]):
    """Maps a step number to the loaded streams of that step; lives in the DataLoader's workers."""

    def __init__(self, plan: Plan, fault_limit: int) -> None:
        self._plan, self._reader, self._faults = plan, ShardReader(plan.split), Faults(fault_limit)

    def __getitem__(self, step: int) -> _Step | UserError:
        """Return the step. A user's mistake is returned too: raised, the DataLoader would wrap it in a traceback."""
        try:
            return self._load(step)
        except UserError as error:
            return error

    def _load(self, step: int) -> _Step:
        streams = []
        for draw in self._plan.draws(step):
            images_BHWC, shown = self._faults.rescue(self._plan, self._reader, draw)
            self._faults.count(draw)
            streams.append(Shown(images_BHWC, shown))
        return _Step(streams, self._faults.take())


def _as_it_is(step: Any) -> Any:
    return step


def _kill(workers: set[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


class TorchLoader(Loader):
    """Worker processes prepare whole steps, two ahead each."""

    def __init__(self, plan: Plan, device: torch.device, workers: int, start_step: int) -> None:
        super().__init__(plan, device)
        others = set(multiprocessing.active_children())
        self._steps: Iterator[_Step | UserError] = iter(
            DataLoader(
                _Steps(plan, self.faults.limit),
                batch_size=None,
                sampler=steps_from(plan, start_step),
                collate_fn=_as_it_is,
                num_workers=workers,
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
        return step.streams

    def close(self) -> None:
        """Stop the worker processes."""
        self._steps = iter(())
        self._end()
