"""Memory that a process has, it keeps."""

import multiprocessing
import platform
import resource

import pytest
import torch

from pipeline.budget import keep_freed_memory

PAGES = 50_000


def _faults(keep: bool, queue) -> None:
    if keep:
        keep_freed_memory()
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(PAGES * resource.getpagesize() // 4).sum()
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
    if min(faults[False]) < PAGES // 2:
        pytest.skip("this machine has huge pages")
    assert faults[True][0] >= PAGES // 2
    assert max(faults[True][1:]) < PAGES // 100
