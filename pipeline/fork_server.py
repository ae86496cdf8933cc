"""A server that forks processes fast, and that signals to a whole job leave alone.

Slurm's --signal, scancel, systemd, Ctrl-C and a terminal that closes reach every process of a job. Only the one that
trains acts on them: its workers have to prepare the batches that it still needs, and they end when their server does.
"""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

LEFT_ALONE = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def fork_server(preload: list[str]) -> ForkServerContext:
    """Return the context whose processes are forked from a server, which has imported the modules.

    The signals of `LEFT_ALONE` are blocked in the server and in its processes: SIGKILL ends them. One that runs already
    is taken as it is.
    """
    # Forking a process that runs threads (or CUDA) is unsafe; a server that has imported torch once forks fast.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_ALONE)
    try:
        resource_tracker.ensure_running()  # which unblocks two of them here
        signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_ALONE)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
