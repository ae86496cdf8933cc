"""Damage shards under running loaders. Runs as a process of its own, so that a crash or a hang is seen from outside.

python chaos.py KIND,… DATASET FOLDER SEED…: for each kind and seed opens a loader on a copy of the dataset, damages a
shard in the middle, keeps loading, and prints one line with the outcome: "whole", "replaced" or "error: …". After each,
all threads, processes and files must be gone. Leaves a last loader of each kind open, with which the interpreter must
end.
"""

import gc
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from pipeline.kinds import LoaderKind
from pipeline.loader import open_loader
from pipeline.mix import CutMix, Mixup
from pipeline.plan import EvalPlan, Stream, TrainPlan
from shards.errors import UserError
from shards.index import Split, open_dataset

HOLD: list[object] = []  # what lives as long as the interpreter


def damage(shard: Path, chance: random.Random) -> str:
    """Do one of the things that befall files."""
    size = shard.stat().st_size
    at, length = chance.randrange(size), chance.randrange(1, size)
    match how := chance.choice(["truncate", "empty", "zero", "noise", "remove", "replace", "folder"]):
        case "truncate":
            os.truncate(shard, at)
        case "empty":
            os.truncate(shard, 0)
        case "zero" | "noise":
            length = min(length, size - at)
            with shard.open("r+b") as file:
                file.seek(at)
                file.write(bytes(length) if how == "zero" else chance.randbytes(length))
        case "remove":
            shard.unlink()
        case "replace":
            shard.unlink()
            shard.write_bytes(chance.randbytes(at))
        case "folder":
            shard.unlink()
            shard.mkdir()
    return how


def make_plan(split: Split, chance: random.Random) -> TrainPlan | EvalPlan:
    if chance.random() < 0.3:
        return EvalPlan(split, chance.randrange(1, 6), 24)
    augment = chance.choice(["imagenet", "cifar", "none+trivial"])
    batch_size, seed = chance.randrange(1, 9), chance.randrange(99)
    mix = (None, Mixup(partner="reversed"), CutMix(partner="reversed"))[seed % 3]
    streams = (Stream("uniform", 1.0, augment, mix=mix), Stream("reversed", -1.0, augment))
    return TrainPlan(split, streams, batch_size, 24, seed=seed, epochs=2)


def check_step(plan: TrainPlan | EvalPlan, step: dict) -> None:
    """What is delivered is in order, whatever happened."""
    assert list(step) == list(plan.streams)
    for batch in step.values():
        assert batch.images_BHWC.shape == (len(batch.ids_B), 24, 24, 3)
        np.testing.assert_array_equal(batch.labels_B, plan.split.samples["label"][batch.ids_B])
        if isinstance(plan, TrainPlan):
            assert len(batch.ids_B) == plan.rank_batch
        if batch.partners_B is not None:
            assert torch.equal(batch.partners_B, step["reversed"].labels_B)


def disturb(kind: LoaderKind, threads: int, root: Path, chance: random.Random) -> str:
    split = open_dataset(root).splits["train"]
    plan = make_plan(split, chance)
    how, steps = "nothing", 0
    loader = open_loader(plan, kind, threads=threads, fault_limit=chance.choice([None, 2]))
    try:
        for step in islice(loader, chance.randrange(4)):
            check_step(plan, step)
            steps += 1
        how = damage(chance.choice(split.shard_paths), chance)
        for step in islice(loader, plan.steps or 15):
            check_step(plan, step)
            steps += 1
        outcome = "replaced" if loader.faults.bad else "whole"
    except UserError as error:
        outcome = f"error: {error}"
    if chance.random() < 0.5:  # else it is abandoned
        loader.close()
    if isinstance(plan, EvalPlan) and outcome == "whole":
        assert steps == plan.steps
    return f"{how}: {outcome}"


def leavings() -> tuple[int, int, int]:
    """Threads, worker processes and open files of this process."""
    gc.collect()
    return threading.active_count(), len(multiprocessing.active_children()), len(os.listdir("/proc/self/fd"))


def main(name: str, dataset: Path, folder: Path, seeds: list[int]) -> None:
    kind, threads = {"workers": ("torch", 2), "torch": ("torch", 0)}.get(name, (name, 2))
    before = None
    for seed in seeds:
        root = Path(shutil.copytree(dataset, folder / f"{name}-{seed}"))
        print(f"{name}: {disturb(kind, threads, root, random.Random(seed))}", flush=True)
        before = before or leavings()  # what libraries begin once and keep
        deadline = time.monotonic() + 10
        while any(now > then for now, then in zip(leavings(), before, strict=True)):
            assert time.monotonic() < deadline, f"{name}, seed {seed}: {before} before, {leavings()} after"
            time.sleep(0.05)
    split = open_dataset(dataset).splits["train"]
    loader = open_loader(TrainPlan(split, (Stream("uniform"),), 4, 24, seed=1, epochs=1), kind, threads=threads)
    next(loader)
    if name == "workers":
        victim, *_ = multiprocessing.active_children()
        os.kill(victim.pid, signal.SIGKILL)
        try:
            list(loader)
        except UserError as error:
            print(f"{name}: kill: error: {error}", flush=True)
    HOLD.append(loader)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in sys.argv[1].split(","):
        main(kind, Path(sys.argv[2]), Path(sys.argv[3]), [int(seed) for seed in sys.argv[4:]])
