"""Do the same thing for many shards: in this process, in several, or on a Dask cluster."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from shards.cores import cores
from shards.errors import UserError

IMAGES_PER_WORKER = 1000  # with fewer, starting a process costs more than it saves
IN_FLIGHT = 256  # jobs an executor is given at once: enough for a cluster, and it keeps them all in memory
CONNECT_SECONDS = 20
PR_SET_PDEATHSIG = 1

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    n_images: int,
    workers: int | None,
    done: Callable[[Result], None],
    scheduler: str | None = None,
) -> list[Result]:
    """Return `function` of each job, in the order of the jobs.

    Args:
        function: of a module, so that worker processes find it.
        jobs: what to call it with.
        n_images: images in all jobs together.
        workers: processes, 1 for none but this; if None, one per available core as far as `n_images` pays.
        done: called here with each result as it comes.
        scheduler: the address of a Dask scheduler whose workers do it instead.

    Raises:
        UserError: a worker process died, or the cluster cannot be used.
        Exception: whatever `function` or `done` raised; no worker process is left then.
    """
    workers = workers or min(cores(), n_images // IMAGES_PER_WORKER)
    workers = min(workers, len(jobs))
    if scheduler is not None and jobs:
        with _cluster(scheduler) as executor:
            return _run(executor, function, jobs, done)
    if workers > 1:
        with _processes(workers) as executor:
            return _run(executor, function, jobs, done)
    results = []
    for job in jobs:
        results.append(function(job))
        done(results[-1])
    return results


def _run(
    executor: Executor, function: Callable[[Job], Result], jobs: Sequence[Job], done: Callable[[Result], None]
) -> list[Result]:
    results: dict[int, Result] = {}
    running: dict[Future[Result], int] = {}
    waiting = iter(enumerate(jobs))
    while len(results) < len(jobs):
        while len(running) < IN_FLIGHT and (following := next(waiting, None)) is not None:
            i, job = following
            running[executor.submit(function, job)] = i
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            i = running.pop(future)
            results[i] = future.result()
            done(results[i])
    return [results[i] for i in range(len(jobs))]


@contextmanager
def _processes(workers: int) -> Iterator[Executor]:
    # Spawned, because a fork would copy whatever threads and devices the caller holds.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_live_and_die_with, initargs=(os.getpid(),)
    ) as pool:
        try:
            yield pool
        except BaseException as error:
            # Not to wait for jobs that nobody wants any more, some perhaps stuck in a slow file system.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"a worker process died, perhaps for lack of memory; try fewer than --workers {workers}"
                ) from None
            raise


def _live_and_die_with(parent: int) -> None:
    """Leave Ctrl-C to the parent, and have the kernel kill this process when the parent dies, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


@contextmanager
def _cluster(scheduler: str) -> Iterator[Executor]:
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise UserError("--executor dask needs Dask; install it with: pip install 'tailstream[cluster]'") from None
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--scheduler {scheduler} cannot be reached ({reason}); give a running one's address") from None
    with client:
        executor = client.get_executor(pure=False, retries=2)
        try:
            yield executor
        except KilledWorker:
            raise UserError(f"workers of {scheduler} died again and again, perhaps for lack of memory") from None
        except CancelledError:
            raise UserError(f"the scheduler {scheduler} is gone; start it again") from None
        finally:
            executor.shutdown(wait=False)
