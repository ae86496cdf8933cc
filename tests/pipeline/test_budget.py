"""Memory that a process has, it keeps."""

import ctypes
import multiprocessing
import platform
import resource

import pytest

from pipeline.budget import keep_freed_memory

PAGES = 50_000
PR_SET_THP_DISABLE = 41  # of linux/prctl.h


def _faults(keep: bool, queue) -> None:
    library, size = ctypes.CDLL(None), PAGES * resource.getpagesize()
    library.malloc.restype = ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    library.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # so that pages can be counted
    if keep:
        keep_freed_memory()
    faults = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        memory = library.malloc(ctypes.c_size_t(size))
        ctypes.memset(memory, 1, size)
        library.free(memory)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    queue.put(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_serves_the_next_step():
    faults = {}
    context = multiprocessing.get_context("forkserver")  # what is set here must not stay in this process
    for keep in (False, True):
        queue = context.Queue()
        process = context.Process(target=_faults, args=(keep, queue))
        process.start()
        faults[keep] = queue.get(timeout=60)
        process.join()
    assert min(faults[False]) >= PAGES // 2
    assert max(faults[True][2:]) < PAGES // 100
