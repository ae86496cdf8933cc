"""Do the same thing for many shards, in this process or in several."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from shards.errors import UserError

IMAGES_PER_WORKER = 1000  # with fewer, starting a process costs more than it saves

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    n_images: int,
    workers: int | None,
    done: Callable[[Result], None],
) -> list[Result]:
    """Return `function` of each job, in the order of the jobs.

    Args:
        function: of a module, so that worker processes find it.
        jobs: what to call it with.
        n_images: images in all jobs together.
        workers: processes, 1 for none but this; if None, one per available core as far as `n_images` pays.
        done: called here with each result as it comes.

    Raises:
        UserError: a worker process died.
        Exception: whatever `function` or `done` raised; no worker is left then.
    """
    workers = workers or min(len(os.sched_getaffinity(0)), n_images // IMAGES_PER_WORKER)
    workers = min(workers, len(jobs))
    if workers <= 1:
        results = []
        for job in jobs:
            results.append(function(job))
            done(results[-1])
        return results
    # Spawned, because a fork would copy whatever threads and devices the caller holds.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_ctrl_c_to_parent) as pool:
        try:
            futures = [pool.submit(function, job) for job in jobs]
            for future in as_completed(futures):
                done(future.result())
            return [future.result() for future in futures]
        except BaseException as error:
            # Not to wait for jobs that nobody wants any more, some perhaps stuck in a slow file system.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"a worker process died, perhaps for lack of memory; try fewer than --workers {workers}"
                ) from None
            raise


def _leave_ctrl_c_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
