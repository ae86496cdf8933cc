"""The portable loader: PIL in a PyTorch DataLoader. The reference that tests hold the other loaders against."""

import itertools
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from pipeline.batch import Batch
from pipeline.faults import BadImage, Faults, faults_of
from pipeline.plan import Plan
from pipeline.reader import ShardReader
from shards.errors import UserError


class _Step(NamedTuple):
    """What a worker sends back: images, labels and ids of each stream, and what its `Faults` took."""

    streams: list[tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]]
    faults: tuple[dict[int, BadImage], Counter[int]]


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
            labels_B = self._plan.split.samples["label"][shown.ids_B].astype(np.int64)
            streams.append((images_BHWC, torch.from_numpy(labels_B), shown.ids_B))
        return _Step(streams, self._faults.take())


def _worker_context() -> BaseContext:
    # Forking a process that runs threads (or CUDA) is unsafe; a server that has imported torch once forks fast.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _as_it_is(step: Any) -> Any:
    return step


class TorchLoader:
    """See `pipeline.batch.Loader`. Worker processes prepare whole steps, two ahead each."""

    waiting_for: str | None

    def __init__(self, plan: Plan, device: torch.device, workers: int, start_step: int) -> None:
        self._plan, self._device = plan, device
        self.faults, self.waiting_for = faults_of(plan.split), None
        steps = itertools.count(start_step) if plan.steps is None else range(start_step, plan.steps)
        self._steps: Iterator[_Step | UserError] = iter(
            DataLoader(
                _Steps(plan, self.faults.limit),
                batch_size=None,
                sampler=steps,
                collate_fn=_as_it_is,
                num_workers=workers,
                multiprocessing_context=_worker_context() if workers else None,
                pin_memory=device.type == "cuda",
            )
        )

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        return self

    def __next__(self) -> dict[str, Batch]:
        while (step := self._next_step()) is not None:
            self.faults.merge(*step.faults)
            self.faults.check()
            if any(len(ids) for _, _, ids in step.streams):  # else no image of an evaluation's batch decodes
                return {
                    name: Batch(
                        images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True), ids
                    )
                    for name, (images, labels, ids) in zip(self._plan.streams, step.streams, strict=True)
                }
        raise StopIteration

    def _next_step(self) -> _Step | None:
        try:
            step = next(self._steps, None)
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
        return step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker processes."""
        self._steps = iter(())
