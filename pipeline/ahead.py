"""Work that is done before it is asked for: steps are read by a small pool, batches made in threads of their own.

step          4    5    6    7    8
pool          read read read read          a slow read holds up its own step, and none of those behind it
streams       uniform and reversed take their parts in order, each at its own pace
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.faults import faults_of
from pipeline.plan import Draw, Plan
from pipeline.reader import ShardReader

# To read takes a fiftieth of what it takes to decode, so these threads mostly wait: for a disk, or for a network.
READERS = 4
READ_AHEAD = 4  # steps, or fewer where their files take more than this:
READ_AHEAD_BYTES = 2**28
SMALL_FILE = 8192  # bytes

Files = list[NDArray[np.uint8]] | NDArray[np.uint8]
Part = TypeVar("Part")


class Read(NamedTuple):
    """One stream's part of a step, read.

    Attributes:
        drawn: what the plan drew.
        fed: the same without images that are known to be bad; as it was drawn where none is left.
        files: the encoded files of what is fed: a list, or rows with zeros behind them where all are small.
    """

    drawn: Draw
    fed: Draw
    files: Files


class ReadAhead:
    """Draws each step once and reads its files, some steps before a stream asks for them."""

    def __init__(self, plan: Plan, reader: ShardReader, start_step: int) -> None:
        self._plan, self._reader, self._step = plan, reader, start_step
        self._faults = faults_of(plan.split)
        images = plan.rank_batch * len(plan.streams)
        step_bytes = images * float(plan.split.samples["size"][:1000].mean()) if len(plan.split) else 1.0
        self._most = int(min(READ_AHEAD, max(2, READ_AHEAD_BYTES // step_bytes)))
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._asking, self._drawing = threading.Lock(), threading.Lock()
        self._coming: list[deque[Future[list[Read]]]] = [deque() for _ in plan.streams]

    def next(self, stream: int) -> Read:
        """Return the stream's next part, from any thread; StopIteration at the plan's end.

        Raises:
            UserError: a shard cannot be read, or no image of a batch's classes decodes.
        """
        with self._asking:
            while len(self._coming[stream]) < self._most and self._step != self._plan.steps:
                reading = self._pool.submit(self._read, self._step)
                for coming in self._coming:
                    coming.append(reading)
                self._step += 1
            if not self._coming[stream]:
                raise StopIteration
            reading = self._coming[stream].popleft()
        return reading.result()[stream]

    def _read(self, step: int) -> list[Read]:
        with self._drawing:  # a plan keeps one epoch's order: two threads would take turns in making two
            draws = self._plan.draws(step)
        parts = []
        for drawn in draws:
            fed = self._faults.replace(self._plan, drawn)
            if not len(fed.ids_B):  # no loader takes an empty batch; this one fails there once more
                fed = drawn
            parts.append(Read(drawn, fed, self._files(fed.ids_B)))
        return parts

    def _files(self, ids_B: NDArray[np.int64]) -> Files:
        # DALI takes a list apart in Python, which takes longer than to copy a small file.
        small = self._plan.split.samples["size"][ids_B].max() <= SMALL_FILE
        return self._reader.padded(ids_B) if small else self._reader.encoded(ids_B)

    def cancel(self) -> None:
        """Begin no further read; whoever waits for one that has not begun gets a CancelledError."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Return when all reads that were under way have ended."""
        self._pool.shutdown(cancel_futures=True)


class RunAhead(Generic[Part]):
    """Runs an iterator ahead in a thread of its own; what it raises is raised here."""

    def __init__(self, run: Callable[[], Iterator[Part]], most: int) -> None:
        self._queue: queue.Queue[Part | BaseException] = queue.Queue(most)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self._thread.start()

    def _work(self, run: Callable[[], Iterator[Part]]) -> None:
        try:
            for part in run():
                if not self._put(part):
                    return
        except BaseException as error:
            self._put(error)

    def __iter__(self) -> Self:
        return self

    def _put(self, part: Part | BaseException) -> bool:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(part, timeout=0.1)
                return True
        return False

    def __next__(self) -> Part:
        part = self._queue.get()
        if isinstance(part, BaseException):
            raise part
        return part

    def cancel(self) -> None:
        """Have the thread end as soon as it can; what waits is dropped."""
        self._stopped.set()

    def close(self) -> None:
        """Return when the thread has ended."""
        self.cancel()
        self._thread.join()
