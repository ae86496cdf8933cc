"""From a command line to a finished run: the whole of what a launchable file does."""

import hashlib
import json
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from jsonargparse import Namespace

from pipeline.loader import windowed
from pipeline.plan import TrainPlan
from shards.errors import UserError, user_errors_exit_2
from shards.index import Dataset
from train.engine import runs
from train.engine.checkpoints import Counters, has_checkpoint, load_checkpoint
from train.engine.config import (
    Config,
    Input,
    Loop,
    Model,
    Optim,
    changed_settings,
    find_dataset,
    make_parser,
    parse,
    peek,
    plain_sections,
    preset,
)
from train.engine.evaluation import finish, test_split
from train.engine.guards import check_devices, told_in_one_line
from train.engine.interrupts import EXIT_STATUS, Interrupted
from train.engine.loop import Training
from train.engine.machine import check_launcher, launched_by, take_threads, unusable_gpu
from train.engine.method import Method
from train.engine.predictions import FILES as PREDICTIONS
from train.engine.tracking import Tracking

# For network file systems; on one machine a folder is seen at once.
SEEN_WITHIN_S = 30.0


def run(method_class: type[Method], argv: list[str] | None = None) -> None:
    """Run a method from its command line: the whole of what a launchable file does.

    Exits with 2 for a user's mistake, in one line, and with 75 when a signal stopped it.
    """
    source = getattr(sys.modules[method_class.__module__], "__file__", None) or sys.argv[0]  # none in a notebook
    ours = Path(source).parent == Path(__file__).parents[1]
    # From Python, with a command line of its own, the method's file is what would be started.
    script = sys.argv[0] if argv is None else os.path.relpath(source)
    program = f"train/{method_class.name}.py" if ours else Path(script).name
    command = shlex.join([*launched_by(script), script])
    with user_errors_exit_2(program):
        try:
            _run(method_class, program, argv, command)
        finally:
            runs.unlock()


def _run(method_class: type[Method], program: str, argv: list[str] | None, command: str) -> None:
    description = (sys.modules[method_class.__module__].__doc__ or "").split("\n")[0]
    parser = make_parser(
        program, description, input=Input, model=Model, method=method_class.Settings, optim=Optim, loop=Loop
    )
    parser.add_argument("--resume", action="store_true", help="resume --run, or the newest unfinished run")
    parser.add_argument("--variant", type=str | None, help="of the dataset's preset, such as 2x or glag")

    asked = peek(parser, argv)
    resumed = None
    if asked.resume:
        resumed = Path(asked.run) if asked.run else runs.newest_run({1}, method=method_class.name, finished=False)
    if resumed is not None and (resumed / "config.yaml").exists():
        saved = runs.read_config(resumed)
        about = saved.pop("about", {})
        if about.get("method") != method_class.name:
            raise UserError(f"{resumed} is a run of {about.get('method')}, not of {method_class.name}; name another")
        begun_with = about.get("variant")
        if asked.variant not in (None, begun_with):
            begun = f"--variant {begun_with}" if begun_with else "no --variant"
            raise UserError(f"{resumed} was begun with {begun}; begin another run for --variant {asked.variant}")
        asked.variant = begun_with
        dataset = _dataset_of(resumed, about, asked.data)
        defaults = saved
    else:
        dataset = find_dataset(asked.data)
        defaults = preset(dataset, "training", method_class.name, variant=asked.variant)
    settings = parse(parser, argv, defaults)
    chosen = parser.instantiate(settings)
    config = Config(chosen.input, chosen.model, chosen.method, chosen.optim, chosen.loop)

    accelerator = make_accelerator(config.loop.precision, config.loop.device, config.loop.threads)
    with told_in_one_line(resumed):
        sections = plain_sections(parser, settings)
        usual = preset(dataset, "training", method_class.name, variant=asked.variant)
        asked.changed = changed_settings(parser, sections, usual, method_class.in_title)
        _train_and_finish(method_class, config, dataset, resumed, asked, sections, accelerator, command)


def _dataset_of(run: Path, about: dict[str, Any], data: str | None) -> Dataset:
    """Open the dataset that a run was trained on, which may lie elsewhere now."""
    try:
        dataset = find_dataset(data or about["data"])
    except UserError as error:
        if data:
            raise
        raise UserError(f"{error}; {run} was trained on it: if it has moved, name its new place with --data") from None
    if about.get("fingerprint", _fingerprint(dataset)) != _fingerprint(dataset):
        raise UserError(
            f"{dataset.place} does not hold the images that {run} was trained on; name that dataset with --data, or"
            " start a new run"
        )
    return dataset


def _fingerprint(dataset: Dataset) -> str:
    """Return what the dataset's training images, their labels and their order come down to."""
    return hashlib.sha256(json.dumps(dataset.manifest["splits"]["train"], sort_keys=True).encode()).hexdigest()[:16]


def _train_and_finish(
    method_class: type[Method],
    config: Config,
    dataset: Dataset,
    resumed: Path | None,
    asked: Namespace,
    sections: dict[str, Any],
    accelerator: Accelerator,
    command: str,
) -> None:
    if resumed and (resumed / "config.yaml").exists() and accelerator.is_main_process:
        runs.lock(resumed)  # before its checkpoint is read
    if config.loop.seed >= 2**32:
        raise UserError(f"loop.seed={config.loop.seed} must be below 2**32, NumPy's limit")
    set_seed(config.loop.seed)
    if resumed and has_checkpoint(resumed):
        # Its weights replace the pretrained ones, whose file or server may be out of reach by now.
        config = replace(config, model=replace(config.model, weights=None))
    method = method_class(config, dataset.train_counts)
    plan = TrainPlan(
        dataset.splits["train"],
        windowed(method.streams, dataset.splits["train"], config.input.shard_window),
        config.input.batch_size,
        config.input.image_size,
        config.loop.seed,
        config.optim.epochs,
        accelerator.process_index,
        accelerator.num_processes,
    )
    if plan.rank_batch % config.optim.accumulate:
        raise UserError(
            f"optim.accumulate={config.optim.accumulate} does not divide the {plan.rank_batch} images per stream of"
            " each process; choose a divisor"
        )
    test_split(dataset)  # tells early where there is none
    tracking = Tracking(config.loop.track)
    # Whatever can fail comes before the folder is made or touched.
    restored = load_checkpoint(resumed, method.network) if resumed else None
    counters = restored[1] if restored else Counters()
    if resumed and counters.epochs >= config.optim.epochs and (resumed / "summary.json").exists():
        if (resumed / PREDICTIONS["last"]).exists():
            accelerator.print(f"{resumed} is finished: it has its {counters.epochs} epochs (more with --optim.epochs)")
            return
        accelerator.print(f"{resumed} is of an older version: its last checkpoint is evaluated again")
    if counters.step // plan.steps_per_epoch != counters.epochs:
        raise UserError(
            f"{resumed} did {counters.step} steps in {counters.epochs} epochs, and an epoch has {plan.steps_per_epoch}"
            " now: resume with the dataset and input.batch_size that it began with"
        )
    if counters.step > config.optim.epochs * plan.steps_per_epoch:
        raise UserError(
            f"{resumed} has done {counters.step} steps, and optim.epochs={config.optim.epochs} are"
            f" {config.optim.epochs * plan.steps_per_epoch}; give more epochs, or start a new run"
        )
    (first_step,) = broadcast_object_list([counters.step])
    if first_step != counters.step:
        raise UserError(
            f"process {accelerator.process_index} finds a checkpoint of step {counters.step} in {resumed}, the first"
            f" process one of step {first_step}; put the run on a file system that all machines share"
        )
    config.input.settle_loader(dataset, accelerator)
    loader = config.input.open_loader(plan, accelerator.device, counters.step)
    folder: list[Path | None] = [None]
    if accelerator.is_main_process:
        if resumed or asked.run:
            folder = [runs.use_run(resumed or Path(asked.run), bool(resumed))]
        else:
            folder = [runs.new_run(f"{dataset.name}-{method.name}")]
    (run_folder,) = broadcast_object_list(folder)
    assert run_folder is not None
    if accelerator.is_main_process:
        about = {"method": method.name, "dataset": dataset.name, "data": dataset.place, "changed": asked.changed}
        about |= {"fingerprint": _fingerprint(dataset), "variant": asked.variant}
        runs.write_config(run_folder, {"about": about, **sections})
        runs.truncate_rows(run_folder, counters.epochs)
        (run_folder / "summary.json").unlink(missing_ok=True)  # of a finished run that is given more epochs
        tracking.open(run_folder, counters.step)
    accelerator.wait_for_everyone()
    _wait_to_see(run_folder, accelerator.process_index)
    if restored:
        within = counters.step - counters.epochs * plan.steps_per_epoch
        where = f" and {within} of {plan.steps_per_epoch} steps" if within else ""
        accelerator.print(f"resuming {run_folder} after epoch {counters.epochs}{where}")
    with loader, told_in_one_line(run_folder):
        training = Training(method, config, dataset, plan, run_folder, accelerator, counters, tracking)
        if restored:
            training.restore(restored[0])
        try:
            training.run(loader)
        except Interrupted as interrupted:
            accelerator.print(
                f"stopped by {interrupted.signal} after step {counters.step}, with a checkpoint; resume with:"
                f" {command} {runs.resuming(run_folder, asked.data)}",
                flush=True,
            )
            sys.exit(EXIT_STATUS)
        finally:
            tracking.close()
        finish(training.evaluated, config, dataset, run_folder, accelerator, counters)


def _wait_to_see(run_folder: Path, rank: int) -> None:
    """Wait until this process sees the run's folder, which the first one made: network file systems take a moment."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not (run_folder / "config.yaml").exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"process {rank} does not see {run_folder}, where the first process writes; put the run on a file"
                " system that all machines share, and start every process in the same folder"
            )
        time.sleep(0.1)


def make_accelerator(precision: str, device: str = "auto", threads: int | None = None) -> Accelerator:
    """Make the Accelerator and take this process's share of the cores, or say in one line what stands in the way."""
    check_launcher(os.environ, device)
    check_devices(os.environ, device, torch.cuda.device_count())
    cpu = device == "cpu" or not torch.cuda.is_available()
    if device != "cpu" and os.environ.get("RANK", "0") == "0" and (warning := unusable_gpu(os.environ)):
        print(warning, file=sys.stderr, flush=True)
    take_threads(threads, os.environ)
    if cpu and precision == "fp16":
        raise UserError("loop.precision=fp16 needs a GPU; use --loop.precision bf16, or no")
    try:
        with told_in_one_line():
            # Without cpu=True several processes on CPUs would each run as if they were alone.
            return Accelerator(mixed_precision=None if precision == "auto" else precision, cpu=cpu)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"loop.precision={precision}: {' '.join(str(error).split())}") from None
