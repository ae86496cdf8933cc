"""One interface for every loader: a plan goes in, batches of both streams come out.

with open_loader(plan, kind="auto", device=device, start_step=k) as loader:
    for step in loader:                      # endless for a TrainPlan
        step["uniform"].images_BHWC          # uint8, on the device
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch

from pipeline.batch import Loader, steps_from
from pipeline.budget import numbered
from pipeline.faults import faults_of
from pipeline.kinds import ChosenLoader, Decode, LoaderKind
from pipeline.plan import Plan, Stream
from pipeline.reader import ShardReader
from pipeline.resident_loader import ResidentLoader, check_room, room_for, set_aside
from shards.errors import UserError
from shards.index import Split

FIRST_STEPS = 16
REMOTE_WINDOW = 16  # shards


def open_loader(
    plan: Plan,
    kind: LoaderKind = "auto",
    device: torch.device | str = "cpu",
    threads: int = 2,
    start_step: int = 0,
    resident_gb: float | None = None,
    fault_limit: int | None = None,
    decode: Decode = "auto",
    first_steps: int = FIRST_STEPS,
) -> Loader:
    """Open a loader for a plan; of a remote dataset the shards that its first steps want are fetched first.

    Args:
        plan: a TrainPlan or an EvalPlan.
        kind: "dali" (two pipelines, decoding on the GPU where the device is one), "resident" (every image is decoded
            once and kept on the device), "torch" (the portable reference), or "auto": resident where the decoded
            images fit, else DALI where it is installed.
        device: where batches shall lie.
        threads: decoding threads per stream (DALI, resident) or worker processes (torch; 0 loads in this process).
        start_step: the first step to deliver, counted from 0 over all epochs.
        resident_gb: 10^9 bytes that decoded images of all splits may take on the device in this process; None for a
            quarter of what is free, on a CPU divided by the processes of this machine.
        fault_limit: how many images of the split may fail to decode before the run is stopped; None for 10, or a
            thousandth of the split if that is more.
        decode: what DALI decodes of an image: the window that is shown, the whole, or auto: the window on a CPU, which
            is faster, and the whole on a GPU, where decoding windows has crashed with some versions of nvImageCodec
            (its issue 55).
        first_steps: of how many steps the shards of a remote dataset are fetched first.

    Raises:
        UserError: DALI is asked for and not installed, threads is out of range, or the resident loader is asked for
            and the images do not fit.
    """
    device = numbered(device)
    if fault_limit is not None:
        faults_of(plan.split).limit = fault_limit
    if threads < (0 if kind == "torch" else 1):
        raise UserError(f"input.threads={threads} is too small for the {kind} loader; use at least 1")
    _fetch_first(plan, start_step, first_steps)
    if kind == "auto":
        kind, _ = choose_loader([plan.split], device, resident_gb)
    if kind == "resident":
        return ResidentLoader(plan, device, threads, start_step, resident_gb)
    if kind == "dali":
        try:
            from pipeline.dali_loader import DaliLoader
        except (ImportError, OSError) as error:  # not there, or its library does not load
            raise UserError(
                f"the DALI loader needs nvidia-dali-cuda130 ({error}); install it, or use --input.loader torch"
            ) from None
        chosen = ("window" if device.type == "cpu" else "whole") if decode == "auto" else decode
        return DaliLoader(plan, device, threads, start_step, chosen)
    from pipeline.torch_loader import TorchLoader

    return TorchLoader(plan, device, threads, start_step)


def choose_loader(
    splits: Iterable[Split],
    device: torch.device | str,
    resident_gb: float | None = None,
    agree: Callable[[ChosenLoader], ChosenLoader] = lambda mine: mine,
    before: ChosenLoader | None = None,
) -> tuple[ChosenLoader, str]:
    """Decide what "auto" is for all splits of a run, and set memory aside where it is the resident loader.

    Args:
        splits: all that will be loaded; all of them fit, or none is resident.
        device, resident_gb: as for `open_loader`.
        agree: makes one choice out of all processes'.
        before: what a run that is resumed began with, which is taken again where it can be.

    Returns:
        The choice, and why.
    """
    device, splits = numbered(device), list(splits)
    size, room = room_for(splits, device, resident_gb)
    decoded = f"{size / 1e9:.3g} GB of decoded images, room for {max(0, room) / 1e9:.3g} GB on {device}"
    fallback: ChosenLoader = "dali" if find_spec("nvidia") and find_spec("nvidia.dali") else "torch"
    mine: ChosenLoader = "resident" if size <= room else fallback
    chosen = agree(before if before and before in (mine, fallback, "torch") else mine)
    if chosen == "resident":
        for split in splits:
            set_aside(split, device)
    elif chosen == before:
        return chosen, "with which the run began"
    elif size <= room:
        return chosen, "what another process of this run must use"
    return chosen, decoded


def keep_resident(splits: Iterable[Split], device: torch.device | str, resident_gb: float | None = None) -> None:
    """Set memory aside for the images of all splits of a run, before the run takes it; arguments as `choose_loader`'s.

    Raises:
        TooLargeError: they do not fit together.
    """
    device, splits = numbered(device), list(splits)
    check_room(splits, device, resident_gb)
    for split in splits:
        set_aside(split, device)


def windowed(streams: Sequence[Stream], split: Split, shard_window: int | None) -> tuple[Stream, ...]:
    """Return streams whose epochs of the data as it is read so many shards at a time.

    Args:
        streams: those that draw with replacement, repeat another or have a window of their own stay as they are.
        split: what they draw from.
        shard_window: 0 shuffles over all shards; None does so too, except where the split is remote and no stream draws
            with replacement (a draw wants any shard, so that a window would spare nothing): there it is
            `REMOTE_WINDOW`.
    """
    sampling = [stream for stream in streams if stream.repeats is None]
    if shard_window is None and split.remote is not None and all(stream.permutes for stream in sampling):
        shard_window = REMOTE_WINDOW
    if not shard_window:
        return tuple(streams)
    return tuple(
        replace(stream, shard_window=stream.shard_window or shard_window)
        if stream.permutes and stream.repeats is None
        else stream
        for stream in streams
    )


def _fetch_first(plan: Plan, start_step: int, first_steps: int) -> None:
    """Fetch, with progress, what a global shuffle wants at once: most shards, which takes longer than a step may."""
    if plan.split.remote is None:
        return
    steps = itertools.islice(steps_from(plan, start_step), first_steps)
    ids = [draw.ids_B for step in steps for draw in plan.draws(step)]
    if ids:
        reader = ShardReader(plan.split)
        try:
            reader.fetch(np.concatenate(ids))
        finally:
            reader.close()
