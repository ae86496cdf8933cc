"""A run, from its settings to its end: configured, started or resumed, finished."""

import shlex
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from jsonargparse import ArgumentParser, Namespace

from pipeline.augment import check_fixed
from pipeline.budget import keep_freed_memory
from pipeline.loader import windowed
from pipeline.plan import TrainPlan
from shards.errors import UserError
from shards.index import Dataset
from train.engine import runs
from train.engine.checkpoints import Counters, forget_selected, has_checkpoint, load_checkpoint
from train.engine.config import Config, changed_settings, check_seed, find_dataset, find_dataset_of, plain_sections
from train.engine.evaluation import finish, test_split
from train.engine.guards import errors_in_one_line
from train.engine.interrupts import EXIT_STATUS, Interrupted
from train.engine.limits import SCHEDULE, enlarged, estimate_run, said, within_budget
from train.engine.loop import Training
from train.engine.machine import launched_by, make_accelerator, usable_gpu
from train.engine.method import Method, make_method
from train.engine.model import make_adapter
from train.engine.optimisers import check_resumed, check_settings
from train.engine.predictions import FILES as PREDICTIONS
from train.engine.recipes import Choice, choose, chosen_settings, given_settings, resumed_choice
from train.engine.tracking import Tracking
from train.networks.backbones import make_backbone

# For network file systems; on one machine a folder is seen at once.
SEEN_WITHIN_S = 30.0


def train(
    method_class: type[Method], parser: ArgumentParser, argv: list[str] | None, asked: Namespace, words: list[str]
) -> None:
    """Train a method, or resume it.

    Args:
        method_class: the method.
        parser: of its command line.
        argv: the command line; None for that of this process.
        asked: what `peek` found there.
        words: what starts the program, such as train/bbn.py.

    Raises:
        UserError: a mistake in the settings, the data or the run that is to be resumed.
        Interrupted: a signal came before the first step.
    """
    resumed = begun = asked.loader = None
    if asked.resume:
        wanted = find_dataset(asked.data).name if asked.data and not asked.run else None
        resumed = Path(asked.run) if asked.run else runs.newest_run({1}, wanted, method_class.name, finished=False)
    if resumed is not None and (resumed / "config.yaml").exists():
        begun = resumed  # asked once: as soon as the processes have met, the first one may begin it
        saved, about = runs.read_begun(resumed, method_class.name)
        asked.loader = about.get("loader")
        begun_with = about.get("variant")
        if asked.variant not in (None, begun_with):
            before = f"--variant {begun_with}" if begun_with else "no --variant"
            raise UserError(f"{resumed} was begun with {before}; begin another run for --variant {asked.variant}")
        asked.variant = begun_with
        dataset = _dataset_of(resumed, about, asked.data)
        choice = resumed_choice(parser, argv, saved, about, method_class.name)
        if choice.settings.loop.budget != saved.get("loop", {}).get("budget"):
            raise UserError(
                f"loop.budget={choice.settings.loop.budget} fits the epochs of a run that begins, and {resumed} has"
                " begun; leave it out, or set --optim.epochs"
            )
        if choice.settings.loop.budget and "loop.budget" in given_settings(parser, argv):
            _keep_fitted(choice, saved.get("optim", {}))
    else:
        dataset = find_dataset(asked.data)
        gpu = usable_gpu(asked.loop.device)
        choice = choose(parser, argv, dataset, method_class.name, asked.variant, gpu=gpu)
    config = _config(parser, choice.settings)
    if begun and config.input.shard_window is None:
        config.input.shard_window = about.get("shard_window")  # of a dataset that was remote, and may not be now

    accelerator = make_accelerator(config.loop.precision, config.loop.device, config.loop.threads)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with errors_in_one_line(resumed):
        if choice.weights_by_preset and (missing := _missing_weights(config, accelerator)):
            choice = choose(parser, argv, dataset, method_class.name, asked.variant, gpu=gpu, missing=missing)
            config = _config(parser, choice.settings)
        for note in choice.notes:
            accelerator.print(note)
        sections = plain_sections(parser, choice.settings)
        usual = choice.usual(dataset, asked.variant)
        asked.changed = partial(changed_settings, parser, sections, usual, method_class.in_title)
        check_settings(config.optim, config.model, config.loop.grad_checkpointing, chosen_settings(parser, argv))
        if begun:
            check_resumed(config.optim, saved.get("optim", {}), begun)
            if has_checkpoint(begun):
                _check_begun(begun, saved, sections)
        asked.begun = begun is not None
        asked.preset = {"parts": choice.parts, "fitted": choice.fitted}
        command = shlex.join([*launched_by(words[0]), *words])
        _train_and_finish(method_class, config, dataset, resumed, asked, sections, accelerator, command)


def _check_begun(run: Path, saved: dict[str, Any], sections: dict[str, Any]) -> None:
    """Refuse what a checkpoint's steps do not fit, or what it makes a lie of."""
    for section, name in (("input", "batch_size"), ("model", "weights"), ("loop", "seed")):
        now = sections[section][name]
        before = saved.get(section, {}).get(name, now)
        if now != before:
            raise UserError(
                f"{run} was begun with {section}.{name}={before} and cannot be resumed with {now}; begin another run"
            )


def _keep_fitted(choice: Choice, saved: dict[str, Any]) -> None:
    """Keep the schedule that a budget made, where a command is given again, as by a queue, whose own is longer."""
    settings, asked = choice.settings, choice.settings.optim.epochs
    for key in SCHEDULE:
        if key in saved:
            settings[f"optim.{key}"] = saved[key]
    if settings.optim.epochs != asked:
        few = settings.optim.epochs == 1
        choice.notes.append(
            f"the {settings.optim.epochs} epoch{'s' * (not few)} that fitted loop.budget={settings.loop.budget}"
            f" {'is' if few else 'are'} kept; for others give --optim.epochs without it"
        )


def _config(parser: ArgumentParser, settings: Namespace) -> Config:
    chosen = parser.instantiate(settings)
    return Config(chosen.input, chosen.model, chosen.method, chosen.optim, chosen.loop)


def _missing_weights(config: Config, accelerator: Accelerator) -> str | None:
    """Return why the pretrained weights are out of reach, in whichever process; None where they are not."""
    reason = None
    with accelerator.local_main_process_first(), torch.random.fork_rng(devices=[]):  # others find what it downloads
        try:
            make_backbone(config.model.backbone, config.model.weights)
        except UserError as error:
            reason = str(error)
    return next((why for why in gather_object([reason]) if why), None)


def _dataset_of(run: Path, about: dict[str, Any], data: str | None) -> Dataset:
    """Open the dataset that a run was trained on, and see that it is still the same."""
    dataset = find_dataset_of(run, about, data)
    if about.get("fingerprint", dataset.fingerprint) != dataset.fingerprint:
        raise UserError(
            f"{dataset.place} does not hold the images that {run} was trained on; name that dataset with --data, or"
            " start a new run"
        )
    return dataset


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
    if resumed and asked.begun and accelerator.is_main_process and not asked.dry_run:
        runs.lock(resumed)  # before its checkpoint is read
    check_seed(config.loop.seed)
    if config.model.adapt and config.model.weights is None and not (resumed and has_checkpoint(resumed)):
        make_adapter(config.model.adapt)  # which names one that is none
        raise UserError(
            f"model.adapt={config.model.adapt} trains small layers beside frozen ones, which model.weights does not"
            " name: they would be random; give --model.weights default, or a file"
        )
    if resumed and has_checkpoint(resumed):
        # Its weights replace the pretrained ones, whose file or server may be out of reach by now.
        config = replace(config, model=replace(config.model, weights=None))
    method, plan = _make(method_class, config, dataset, accelerator)
    test_split(dataset)  # refused early where there is none
    check_fixed(config.input.eval_augment)
    tracking = Tracking(config.loop.track)
    # Whatever can fail comes before the folder is made or touched.
    restored = load_checkpoint(resumed, method.network) if resumed else None
    counters = restored[1] if restored else Counters()
    if resumed and (resumed / "summary.json").exists():
        done = counters.epochs if restored else int(runs.read_summary(resumed)["epochs"])
        whole = done >= config.optim.epochs
        if whole and (not restored or (resumed / PREDICTIONS["last"]).exists()):
            accelerator.print(
                f"{resumed} is finished: it has its {done} epoch{'s' * (done > 1)} (more with --optim.epochs)"
            )
            return
        if not restored:  # somebody made room
            raise UserError(f"{resumed} is finished, and has no checkpoint to resume from any more; begin another run")
        if whole:
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
    if restored:
        _check_state(method, restored[0]["method"], resumed)
    config.input.settle_loader(dataset, accelerator, asked.loader)
    if note := enlarged(dataset, config.input.image_size):
        accelerator.print(note)
    if config.loop.estimate or config.loop.budget or asked.dry_run:
        left = config.optim.epochs * plan.steps_per_epoch - counters.step
        estimate = estimate_run(method_class, plan, config, dataset, accelerator, thorough=asked.dry_run)
        if config.loop.budget and not asked.begun:
            wanted, config = config.optim.epochs, within_budget(config, plan, dataset, estimate)
            accelerator.print(f"loop.budget={config.loop.budget}: {config.optim.epochs} of {wanted} epochs fit it")
            sections["optim"] |= {key: getattr(config.optim, key) for key in SCHEDULE}
            method, plan = _make(method_class, config, dataset, accelerator)
            left = config.optim.epochs * plan.steps_per_epoch
        for line in said(estimate, config, plan, dataset, left, accelerator.device, begins=not asked.begun):
            accelerator.print(line)
    changed = asked.changed()  # now that a budget has set the epochs
    if asked.dry_run:
        accelerator.print("nothing was written (--dry-run)")
        return
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
        about = {"method": method.name, "dataset": dataset.name, "data": dataset.place, "changed": changed}
        windows = [spec.shard_window or 0 for spec in plan.specs if spec.permutes and spec.repeats is None]
        about |= {"shard_window": min(windows, default=0), "loader": config.input.loader}
        about |= {"fingerprint": dataset.fingerprint, "variant": asked.variant, "preset": asked.preset}
        with errors_in_one_line(run_folder):
            tracking.open(run_folder, counters.step, dataset.name, sections)  # first: it may not start
            runs.write_config(run_folder, {"about": about, **sections})
            runs.truncate_rows(run_folder, counters.epochs)
            (run_folder / "summary.json").unlink(missing_ok=True)  # of a finished run that is given more epochs
            if restored is None:
                forget_selected(run_folder)
    with loader, errors_in_one_line(run_folder):
        try:
            accelerator.wait_for_everyone()
            _wait_to_see(run_folder, accelerator.process_index)
            if restored:
                within = counters.step - counters.epochs * plan.steps_per_epoch
                where = f" and {within} of {plan.steps_per_epoch} steps" if within else ""
                accelerator.print(f"resuming {run_folder} after epoch {counters.epochs}{where}")
            training = Training(method, config, dataset, plan, run_folder, accelerator, counters, tracking)
            if restored:
                training.restore(restored[0])
            try:
                training.run(loader)
            finally:
                tracking.close()
            finish(training.evaluated, config, dataset, run_folder, accelerator, counters)
        except Interrupted as interrupted:
            kept = ", with a checkpoint" if has_checkpoint(run_folder) else ""
            accelerator.print(
                f"stopped by {interrupted.signal} after step {counters.step}{kept}; resume with:"
                f" {command} {runs.resuming(run_folder, asked.data)}",
                flush=True,
            )
            sys.exit(EXIT_STATUS)


def _make(
    method_class: type[Method], config: Config, dataset: Dataset, accelerator: Accelerator
) -> tuple[Method, TrainPlan]:
    """Make the method, from the seed alone, and its plan."""
    set_seed(config.loop.seed)
    method = make_method(method_class, config, dataset.train_counts)
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
    return method, plan


def _check_state(method: Method, state: dict[str, Any], run: Path | None) -> None:
    """Refuse a method whose settings are now others than those that a checkpoint's state was kept under."""
    try:
        method.load_state_dict(state)
    except (AssertionError, KeyError, TypeError, RuntimeError):
        raise UserError(
            f"{run} cannot be resumed with these settings of its method: what its checkpoint keeps of the method does"
            " not fit them; give those of its config.yaml, or begin another run"
        ) from None


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
