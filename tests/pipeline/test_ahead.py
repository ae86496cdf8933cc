import threading
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.ahead import READ_AHEAD, ReadAhead, RunAhead
from pipeline.dali_loader import _Stream
from pipeline.loader import open_loader
from pipeline.plan import EvalPlan, Stream, TrainPlan
from pipeline.reader import ShardReader
from shards.errors import UserError
from shards.index import Split

PATIENCE = 20  # seconds, for what takes none


def two_streams(split: Split, batch_size: int = 4) -> TrainPlan:
    streams = (Stream("uniform", 1.0, "imagenet"), Stream("reversed", -1.0, "imagenet"))
    return TrainPlan(split, streams, batch_size, 32, seed=5, epochs=3)


class SlowReader:
    """Notes which batches are read, by which threads, and has those of `slow` wait until `go_on` is set."""

    def __init__(self, monkeypatch) -> None:
        self.slow: set[bytes] = set()
        self.go_on, self.noted = threading.Event(), threading.Condition()
        self.read: Counter[bytes] = Counter()
        self.threads: set[int] = set()
        encoded = ShardReader.encoded

        def read(reader: ShardReader, ids_B: np.ndarray) -> list:
            with self.noted:
                self.read[ids_B.tobytes()] += 1
                self.threads.add(threading.get_ident())
                self.noted.notify_all()
            if ids_B.tobytes() in self.slow:
                assert self.go_on.wait(PATIENCE)
            return encoded(reader, ids_B)

        monkeypatch.setattr(ShardReader, "encoded", read)

    def wait_for(self, ids_B: np.ndarray) -> bool:
        with self.noted:
            return self.noted.wait_for(lambda: ids_B.tobytes() in self.read, PATIENCE)


@pytest.fixture
def slow_reader(monkeypatch) -> SlowReader:
    return SlowReader(monkeypatch)


def test_a_slow_read_holds_up_no_other(photos, slow_reader):
    plan = two_streams(photos.splits["train"])
    slow = 7  # nobody has asked for it when the loop begins
    slow_reader.slow = {plan.draws(slow)[0].ids_B.tobytes()}
    with open_loader(plan, "dali", threads=1) as loader:
        shown = list(islice(loader, 2))
        # The streams want step 7 at most when steps are read ahead of them; it hangs, and steps behind it are read.
        assert slow_reader.wait_for(plan.draws(slow)[0].ids_B)
        assert slow_reader.wait_for(plan.draws(slow + 1)[1].ids_B)
        slow_reader.go_on.set()
        shown += list(islice(loader, 8))
    for step, batches in enumerate(shown):
        for draw, name in zip(plan.draws(step), plan.streams, strict=True):
            np.testing.assert_array_equal(batches[name].ids_B, draw.ids_B)


def test_the_thread_that_feeds_dali_reads_nothing(photos, slow_reader):
    """On a GPU the training thread feeds: what it does there is done here, with DALI on the CPU."""
    plan, cpu = two_streams(photos.splits["train"]), torch.device("cpu")
    reader = ShardReader(plan.split)
    reads = ReadAhead(plan, reader, 0)
    stream = _Stream(plan, 1, reads, reader, cpu, threads=1, steps=100, decode="window")
    shown = [part.shown.draw.ids_B for part in islice(stream.run(), 5)]
    np.testing.assert_array_equal(shown, [plan.draws(step)[1].ids_B for step in range(5)])
    assert slow_reader.threads
    assert threading.get_ident() not in slow_reader.threads
    stream.close()
    reads.close()


def test_each_step_is_drawn_and_read_once_and_not_far_ahead(photos, slow_reader):
    plan = two_streams(photos.splits["train"])
    reads = ReadAhead(plan, ShardReader(plan.split), 3)
    for step in range(3, 20):
        read = reads.next(0)
        np.testing.assert_array_equal(read.drawn.ids_B, plan.draws(step)[0].ids_B)
    reads.close()
    for step in range(3, 20):  # the other stream finds them as they were read, closed or not
        np.testing.assert_array_equal(reads.next(1).fed.ids_B, plan.draws(step)[1].ids_B)
    assert slow_reader.read.total() <= 2 * (17 + READ_AHEAD)


def test_a_plans_end_ends_every_stream(photos):
    reads = ReadAhead(EvalPlan(photos.splits["test"], 4, 32), ShardReader(photos.splits["test"]), 0)
    ids = [reads.next(0).drawn.ids_B for _ in range(3)]
    np.testing.assert_array_equal(np.concatenate(ids), np.arange(11))
    with pytest.raises(StopIteration):
        reads.next(0)
    reads.close()


def test_what_a_read_raises_is_raised_where_it_is_asked_for(photos, monkeypatch):
    def fail(reader: ShardReader, ids_B: np.ndarray) -> list:
        raise UserError("gone")

    monkeypatch.setattr(ShardReader, "encoded", fail)
    reads = ReadAhead(two_streams(photos.splits["train"]), ShardReader(photos.splits["train"]), 0)
    for stream in (0, 1):
        with pytest.raises(UserError, match="gone"):
            reads.next(stream)
    reads.close()


def test_a_loader_is_closed_while_a_read_hangs(photos, slow_reader):
    plan = two_streams(photos.splits["train"])
    before = threading.active_count()
    slow_reader.slow = {plan.draws(6)[0].ids_B.tobytes()}
    loader = open_loader(plan, "dali", threads=1)
    next(loader)
    assert slow_reader.wait_for(plan.draws(6)[0].ids_B)
    threading.Timer(0.2, slow_reader.go_on.set).start()
    loader.close()
    assert slow_reader.go_on.is_set()  # a read cannot be broken off; the ones behind it are not begun
    assert threading.active_count() <= before + 1  # the timer's


def test_a_thread_ahead_ends_although_nobody_takes_what_it_makes():
    endless = RunAhead(lambda: iter(int, 1), most=2)
    assert next(endless) == 0
    endless.close()


def test_a_loader_that_cannot_be_opened_leaves_no_thread(photos, monkeypatch):
    before, begun = threading.active_count(), []

    class SecondFails(RunAhead):
        def __init__(self, *arguments) -> None:
            if begun:
                raise RuntimeError("can't start new thread")
            begun.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr("pipeline.dali_loader.RunAhead", SecondFails)
    with pytest.raises(RuntimeError, match="new thread"):
        open_loader(two_streams(photos.splits["train"]), "dali", threads=1)
    assert begun
    assert threading.active_count() == before


def test_few_steps_of_large_files_are_read_ahead(photos, slow_reader, monkeypatch):
    plan = two_streams(photos.splits["train"])
    monkeypatch.setattr("pipeline.ahead.READ_AHEAD_BYTES", 1000)
    reads = ReadAhead(plan, ShardReader(plan.split), 0)
    reads.next(0)
    reads.close()
    assert slow_reader.read.total() <= 2 * 2
