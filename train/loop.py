"""The loop: one for all methods, on Accelerate. It never asks which method runs."""

import copy
import math
import os
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from analysis.metrics import Tally, percent, summarize, tally
from pipeline.batch import Batch, Loader
from pipeline.faults import faults_of
from pipeline.loader import windowed
from pipeline.plan import EvalPlan, TrainPlan
from shards.errors import UserError, user_errors_exit_2
from shards.index import Dataset, Split
from train import runs
from train.batch_norm import use_stream_batch_norm
from train.checkpoints import Counters, load_checkpoint, read_selected, save_checkpoint, save_selected
from train.config import Input, Loop, Model, Optim, find_dataset, make_parser, parse, peek, plain_sections, preset
from train.guards import LossGuard, StallGuard, check_devices, told_in_one_line
from train.interrupts import EXIT_STATUS, Consensus, Interrupted, Interrupts
from train.method import Method, Progress, unwrapped
from train.networks import Normalize, load_weights, save_model
from train.tracking import Tracking


@dataclass
class Config:
    """A training run's settings; `method` is the method's own Settings."""

    input: Input
    model: Model
    method: Any
    optim: Optim
    loop: Loop


def run(method_class: type[Method], argv: list[str] | None = None) -> None:
    """Run a method from its command line: the whole of what a launchable file does.

    Exits with 2 for a user's mistake, told in one line.
    """
    program = f"train/{method_class.name}.py"
    with user_errors_exit_2(program):
        _run(method_class, program, argv)


def _run(method_class: type[Method], program: str, argv: list[str] | None) -> None:
    description = (sys.modules[method_class.__module__].__doc__ or "").split("\n")[0]
    parser = make_parser(
        program, description, input=Input, model=Model, method=method_class.Settings, optim=Optim, loop=Loop
    )
    parser.add_argument("--resume", action="store_true", help="go on with --run, or with the newest unfinished run")
    parser.add_argument("--variant", type=str | None, help="of the dataset's preset, such as 2x: twice the epochs")

    asked = peek(parser, argv)
    resumed = None
    if asked.resume:
        resumed = Path(asked.run) if asked.run else runs.newest_run({1}, method=method_class.name, finished=False)
    if resumed is not None and (resumed / "config.yaml").exists():
        saved = runs.read_config(resumed)
        about = saved.pop("about", {})
        if about.get("method") != method_class.name:
            raise UserError(f"{resumed} is a run of {about.get('method')}, not of {method_class.name}; name another")
        dataset = find_dataset(asked.data or about["data"])
        defaults = saved
    else:
        dataset = find_dataset(asked.data)
        defaults = preset(dataset, "training", method_class.name, variant=asked.variant)
    settings = parse(parser, argv, defaults)
    chosen = parser.instantiate(settings)
    config = Config(chosen.input, chosen.model, chosen.method, chosen.optim, chosen.loop)

    accelerator = make_accelerator(config.loop.precision, config.loop.device)
    with told_in_one_line(resumed):
        _train_and_finish(
            method_class, config, dataset, resumed, asked.run, plain_sections(parser, settings), accelerator
        )


def _train_and_finish(
    method_class: type[Method],
    config: Config,
    dataset: Dataset,
    resumed: Path | None,
    named: str | None,
    sections: dict[str, Any],
    accelerator: Accelerator,
) -> None:
    set_seed(config.loop.seed)
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
        accelerator.print(f"{resumed} is finished: it has its {counters.epochs} epochs (more with --optim.epochs)")
        return
    if counters.step // plan.steps_per_epoch != counters.epochs:
        raise UserError(
            f"{resumed} did {counters.step} steps in {counters.epochs} epochs, and an epoch has {plan.steps_per_epoch}"
            " now: resume with the dataset and input.batch_size that it began with"
        )
    (first_step,) = broadcast_object_list([counters.step])
    if first_step != counters.step:
        raise UserError(
            f"process {accelerator.process_index} finds a checkpoint of step {counters.step} in {resumed}, the first"
            f" process one of step {first_step}; put the run on a file system that all machines share"
        )
    loader = config.input.open_loader(plan, accelerator.device, counters.step)
    folder: list[Path | None] = [None]
    if accelerator.is_main_process:
        if resumed or named:
            folder = [runs.use_run(resumed or Path(str(named)), bool(resumed))]
        else:
            folder = [runs.new_run(f"{dataset.name}-{method.name}")]
    (run_folder,) = broadcast_object_list(folder)
    assert run_folder is not None
    if accelerator.is_main_process:
        about = {"method": method.name, "dataset": dataset.name, "data": dataset.place}
        runs.write_config(run_folder, {"about": about, **sections})
        runs.truncate_rows(run_folder, counters.epochs)
        (run_folder / "summary.json").unlink(missing_ok=True)  # of a finished run that is given more epochs
        tracking.open(run_folder, counters.step)
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
                f"stopped by {interrupted.signal} after step {counters.step}, with a checkpoint; go on with:"
                f" train/{method.name}.py --run {run_folder} --resume",
                flush=True,
            )
            sys.exit(EXIT_STATUS)
        finally:
            tracking.close()
        finish(training.evaluated, config, dataset, run_folder, accelerator, counters)


class Training:
    """A method on its way to its last epoch: a row of numbers each, checkpoints, and the selected weights.

    Attributes:
        evaluated: the method with the weights that are evaluated and kept: the trained ones, or their average.
    """

    def __init__(
        self,
        method: Method,
        config: Config,
        dataset: Dataset,
        plan: TrainPlan,
        run_folder: Path,
        accelerator: Accelerator,
        counters: Counters,
        tracking: Tracking,
    ) -> None:
        """Put the network on its device.

        Args:
            method: made, with its weights in place.
            config: the run's settings.
            dataset: what is trained and evaluated on.
            plan: the training plan.
            run_folder: the run's folder.
            accelerator: gives device, precision and processes.
            counters: how far the run is; moved on.
            tracking: takes each epoch's row, on the main process.
        """
        self._method, self._config, self._dataset, self._plan = method, config, dataset, plan
        self._run_folder, self._accelerator, self._counters = run_folder, accelerator, counters
        self._tracking = tracking
        prepare_network(method.network, config.loop)
        self.evaluated, self._average = method, None
        if config.optim.ema is not None:
            self._average = AveragedModel(
                method.network, accelerator.device, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema)
            )
            self.evaluated = copy.copy(method)
            self.evaluated.network = self._average.module
        optimizer = torch.optim.SGD(
            method.network.parameters(),
            lr=config.optim.lr,
            momentum=config.optim.momentum,
            nesterov=config.optim.nesterov and config.optim.momentum > 0,
            weight_decay=config.optim.weight_decay,
        )
        method.network, self._optimizer = accelerator.prepare(method.network, optimizer)
        self._network = unwrapped(method.network)
        # A dataset without a test split reports on val, which must not choose an epoch then.
        self._watched = dataset.splits.get("val") or test_split(dataset)
        self._selecting = config.loop.select and self._watched.name != test_split(dataset).name
        selected = read_selected(run_folder)
        self._best = selected[2] if selected and selected[1] <= counters.epochs else -1.0

    def run(self, loader: Loader) -> None:
        """Train to the last epoch.

        Args:
            loader: opened on the plan at the step where the run is.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint is written.
            UserError: the loss is not finite.
        """
        config, plan, counters, accelerator = self._config, self._plan, self._counters, self._accelerator
        accelerator.print(
            f"{self._method.title} on {self._dataset.name}: {len(plan.split):,} images, {len(self._dataset.classes):,}"
            f" classes, {config.optim.epochs} epochs of {plan.steps_per_epoch} steps, {config.model.backbone},"
            f" {accelerator.device} -> {self._run_folder}"
        )
        self._started = time.perf_counter() - counters.seconds
        self._saved = time.perf_counter()
        self._consensus = Consensus(accelerator.num_processes)
        self._losses = LossGuard(self._run_folder, plan.split, accelerator.process_index)
        self._bar = tqdm(
            total=config.optim.epochs * plan.steps_per_epoch,
            initial=counters.step,
            unit="step",
            disable=not (accelerator.is_main_process and sys.stderr.isatty()),
            leave=False,
        )
        stalls = StallGuard(loader, plan.streams, accelerator.process_index, 60 * config.loop.stall_minutes)
        with self._bar, stalls, Interrupts() as self._interrupts:
            while counters.epochs < config.optim.epochs:
                log = self._epoch(stalls)
                self._end_of_epoch(log)
            self._consensus.wait()

    def _epoch(self, batches: StallGuard) -> dict[str, float]:
        """Take the steps of an epoch that are left; return what the last one logged."""
        config, plan, counters = self._config, self._plan, self._counters
        epoch, last_step = counters.epochs + 1, (counters.epochs + 1) * plan.steps_per_epoch
        self._network.train()
        began = time.perf_counter() - counters.epoch_seconds
        loss_sum = torch.full((), counters.loss_sum, dtype=torch.float64, device=self._accelerator.device)
        log: dict[str, float] = {}
        while counters.step < last_step:
            within = counters.step % plan.steps_per_epoch
            lr = config.optim.lr * lr_factor(config.optim, counters.step / plan.steps_per_epoch)
            batch = next(batches)
            progress = Progress(epoch, config.optim.epochs, within, config.loop.seed)
            loss, log = self._step(batch, progress, lr)
            self._losses.seen(loss, {"epoch": epoch, "step": counters.step + 1, "lr": lr}, batch)
            loss_sum += loss
            counters.step += 1
            self._bar.update()
            signal, due = self._consensus(self._interrupts.received, self._is_due())
            if (signal or due) and counters.step < last_step:
                self._gather(loss_sum, began)
                self._save()
                if signal:
                    raise Interrupted(signal)
        self._gather(loss_sum, began)
        return log

    def _step(self, batch: dict[str, Batch], progress: Progress, lr: float) -> tuple[torch.Tensor, dict[str, float]]:
        """Make one step of the optimiser; return the loss, detached, and what the method logs."""
        accelerator, optim = self._accelerator, self._config.optim
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=accelerator.device)
        parts = split_batch(batch, optim.accumulate)
        for number, part in enumerate(parts, start=1):
            # Gradients are exchanged between processes once a step.
            with accelerator.no_sync(self._method.network) if number < len(parts) else nullcontext():
                with accelerator.autocast():
                    result = self._method.step(part, progress)
                accelerator.backward(result.loss / len(parts))
            loss += result.loss.detach() / len(parts)
        if optim.clip_norm is not None:
            accelerator.clip_grad_norm_(self._method.network.parameters(), optim.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update_parameters(self._network)
        return loss, result.log

    def _is_due(self) -> bool:
        """Return whether a checkpoint is wanted at this step, in mid-epoch."""
        loop = self._config.loop
        by_steps = loop.checkpoint_steps is not None and self._counters.step % loop.checkpoint_steps == 0
        # The clocks of ranks differ; the first one's counts.
        late = time.perf_counter() - self._saved > 60 * loop.checkpoint_minutes
        return by_steps or (late and self._accelerator.is_main_process)

    def _gather(self, loss_sum: torch.Tensor, began: float) -> None:
        """Bring the counters of the epoch under way up to date."""
        self._losses.check()
        # Every rank goes on from the mean, so that the mean over ranks stays what it is.
        self._counters.loss_sum = float(self._accelerator.reduce(loss_sum, "mean"))
        loss_sum.fill_(self._counters.loss_sum)
        self._counters.epoch_seconds = time.perf_counter() - began

    def _end_of_epoch(self, log: dict[str, float]) -> None:
        """Evaluate, write the row, keep what is to be kept."""
        config, plan, counters, accelerator = self._config, self._plan, self._counters, self._accelerator
        epochs, epoch, took = config.optim.epochs, counters.epochs + 1, counters.epoch_seconds
        images = plan.steps_per_epoch * plan.batch_size * len(plan.streams)
        row: dict[str, Any] = {"epoch": epoch, "step": counters.step}
        row |= {"loss": counters.loss_sum / plan.steps_per_epoch, "lr": self._optimizer.param_groups[0]["lr"]}
        row |= {"images_per_second": images / took, **log}
        if epoch % config.loop.eval_every == 0 or epoch == epochs:
            began = time.perf_counter()
            tally = evaluate(self.evaluated, self._watched, config.input, accelerator)
            result = summarize(tally, self._dataset.train_counts)
            row["eval"] = {"split": self._watched.name, **result}
            row["eval_seconds"] = time.perf_counter() - began
            counters.evaluation_seconds += row["eval_seconds"]
            score = result["balanced_accuracy"]
            if self._selecting and score is not None and score > self._best:
                self._best = score
                if accelerator.is_main_process:
                    save_selected(self._run_folder, unwrapped(self.evaluated.network), epoch, score)
        counters.epochs, counters.images = epoch, counters.images + images
        counters.training_seconds += took
        counters.loss_sum = counters.epoch_seconds = 0.0
        row["seconds"] = counters.seconds = time.perf_counter() - self._started
        if accelerator.is_main_process:
            runs.append_row(self._run_folder, row)
            self._tracking.row(row)
            self._bar.write(epoch_line(row, epochs))
        signal, _ = self._consensus(self._interrupts.received, False)
        if signal or epoch % config.loop.checkpoint_every == 0 or epoch == epochs:
            self._save()
        if signal:
            raise Interrupted(signal)

    def _save(self) -> None:
        """Write a checkpoint; every rank returns when it is there."""
        self._counters.seconds = time.perf_counter() - self._started
        if self._accelerator.is_main_process:
            keep = self._config.loop.keep_checkpoints
            save_checkpoint(self._run_folder, self._network, self._states(), self._counters, keep)
        self._accelerator.wait_for_everyone()
        self._consensus.wait()  # whether this checkpoint is due
        self._saved = time.perf_counter()

    def _states(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the network and the counters."""
        states = {"optimizer": self._optimizer.state_dict(), "random": torch.get_rng_state()}
        if self._accelerator.device.type == "cuda":
            states["random_cuda"] = torch.cuda.get_rng_state(self._accelerator.device)
        if self._accelerator.scaler is not None:
            states["scaler"] = self._accelerator.scaler.state_dict()
        if self._average is not None:
            states["average"] = self._average.state_dict()
        return states

    def restore(self, states: dict[str, Any]) -> None:
        """Undo `_states`; what the checkpoint lacks, because the run was set otherwise, begins anew."""
        self._optimizer.load_state_dict(states["optimizer"])
        torch.set_rng_state(states["random"])
        if self._accelerator.device.type == "cuda" and "random_cuda" in states:
            torch.cuda.set_rng_state(states["random_cuda"], self._accelerator.device)
        if self._accelerator.scaler is not None and "scaler" in states:
            self._accelerator.scaler.load_state_dict(states["scaler"])
        if self._average is not None and "average" in states:
            self._average.load_state_dict(states["average"])


def prepare_network(network: torch.nn.Module, loop: Loop) -> None:
    """Set how a network computes, in place: its memory layout, its batch norm, whether it is compiled."""
    for module in network.modules():
        if isinstance(module, Normalize):
            module.channels_last = loop.channels_last
    if loop.channels_last:
        network.to(memory_format=torch.channels_last)
    if loop.sync_batch_norm:
        use_stream_batch_norm(network, synchronised=True)
    if loop.compile:
        network.compile()


def split_batch(batch: dict[str, Batch], parts: int) -> list[dict[str, Batch]]:
    """Cut every stream of a step into so many equal parts."""
    if parts == 1:
        return [batch]

    def part(of: Batch, number: int) -> Batch:
        size = len(of.ids_B) // parts
        mine = slice(number * size, (number + 1) * size)
        return Batch(of.images_BHWC[mine], of.labels_B[mine], of.ids_B[mine])

    return [{name: part(of, number) for name, of in batch.items()} for number in range(parts)]


def finish(
    method: Method, config: Config, dataset: Dataset, run_folder: Path, accelerator: Accelerator, counters: Counters
) -> None:
    """Evaluate the last and the selected weights on the test split and write the run's results."""
    network, test = unwrapped(method.network), test_split(dataset)
    final = evaluate(method, test, config.input, accelerator)
    last, selected = summarize(final, dataset.train_counts), None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_model(network, run_folder)
    chosen = read_selected(run_folder) if config.loop.select else None
    if chosen is not None:
        path, epoch, _ = chosen
        load_weights(network, path)
        measured = summarize(evaluate(method, test, config.input, accelerator), dataset.train_counts)
        selected = {"epoch": epoch, **measured}
    summary = {
        "method": method.name,
        "title": method.title,
        "stage": 1,
        "from": None,
        "dataset": dataset.name,
        "seed": config.loop.seed,
        "epochs": config.optim.epochs,
        "last": last,
        "selected": selected,
        "selected_on": "val" if selected else None,
        "evaluated_on": test.name,
        "images_per_second": counters.images / counters.training_seconds if counters.training_seconds else None,
        "seconds": counters.seconds,
        "evaluation_seconds": counters.evaluation_seconds,
        "faults": collect_faults(dataset, accelerator),
        "environment": runs.environment(device_name(accelerator.device), accelerator.num_processes),
        "command": runs.command(),
    }
    if accelerator.is_main_process:
        write_results(run_folder, summary, final, dataset)


def write_results(run_folder: Path, summary: dict[str, Any], final: Tally, dataset: Dataset) -> None:
    """Write per_class.json, then summary.json, and say where they are."""
    runs.write_json(
        run_folder / "per_class.json",
        {
            "split": summary["evaluated_on"],
            "classes": dataset.classes,
            "train_counts": dataset.train_counts.tolist(),
            "correct": final.correct_C.tolist(),
            "total": final.total_C.tolist(),
        },
    )
    runs.write_json(run_folder / "summary.json", summary)
    print(f"{summary['title']}, last epoch, on {summary['evaluated_on']}: {accuracy_line(summary['last'])}")
    print(f"wrote {run_folder}/summary.json; for a page with figures: python -m analysis report {run_folder}")


def make_accelerator(precision: str, device: str = "auto") -> Accelerator:
    """Make the Accelerator, or say in one line what stands in its way here."""
    check_devices(os.environ, device, torch.cuda.device_count())
    cpu = device == "cpu" or not torch.cuda.is_available()
    if cpu and precision == "fp16":
        raise UserError("loop.precision=fp16 needs a GPU; use --loop.precision bf16, or no")
    try:
        with told_in_one_line():
            # Unless it is told about CPUs, several processes on them would each think itself alone.
            return Accelerator(mixed_precision=None if precision == "auto" else precision, cpu=cpu)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"loop.precision={precision}: {' '.join(str(error).split())}") from None


def test_split(dataset: Dataset) -> Split:
    """Return the split that results are reported on: test, else val."""
    for name in ("test", "val"):
        if name in dataset.splits and len(dataset.splits[name]):
            return dataset.splits[name]
    raise UserError(f"{dataset.root} has neither a test nor a val split; build it again with --test-fraction 0.25")


@torch.inference_mode()
def evaluate(method: Method, split: Split, input: Input, accelerator: Accelerator) -> Tally:
    """Evaluate `method.predict` on every image of a split exactly once over all ranks."""
    network = unwrapped(method.network)
    was_training = network.training
    network.eval()
    plan = EvalPlan(
        split,
        input.batch_size,
        input.image_size,
        input.eval_augment,
        accelerator.process_index,
        accelerator.num_processes,
    )
    total = Tally.zeros(len(split.class_counts))
    with input.open_loader(plan, accelerator.device) as loader:
        for batch in loader:
            with accelerator.autocast():
                logits_BC = method.predict(batch["eval"].images_BHWC)
            try:
                total = total + tally(logits_BC.float().cpu().numpy(), batch["eval"].labels_B.cpu().numpy())
            except ValueError as error:
                raise UserError(f"on {split.name}, {error}") from None
    network.train(was_training)
    # Through float64, which the counts fit exactly.
    vector = torch.from_numpy(total.to_vector()).to(accelerator.device)
    return Tally.from_vector(accelerator.reduce(vector, "sum").cpu().numpy(), len(split.class_counts))


def lr_factor(optim: Optim, epoch: float) -> float:
    """Return the learning rate's factor at a time counted in epochs from 0 (fractions within an epoch).

    Warm-up rises linearly, an epoch a stair, as in BBN's code; drops and cosine count whole epochs too.
    """
    whole = math.floor(epoch)
    if whole < optim.warmup_epochs:
        return (whole + 1) / optim.warmup_epochs
    if optim.schedule == "step":
        return optim.decay ** sum(whole >= round(share * optim.epochs) for share in optim.milestones)
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (whole - optim.warmup_epochs) / (optim.epochs - optim.warmup_epochs)))
    return 1.0


def collect_faults(dataset: Dataset, accelerator: Accelerator) -> list[dict[str, Any]]:
    """Return a row per image that did not decode, in whichever process, and say how many there are."""
    mine = [{"split": name} | row for name, split in dataset.splits.items() for row in faults_of(split).rows()]
    found, times = {}, Counter[tuple[str, int]]()
    for row in gather_object(mine):
        image = row["split"], row["sample"]
        found[image] = row
        times[image] += row["times"]
    if found:
        accelerator.print(
            f"{len(found)} images did not decode and were replaced or left out, {times.total()} times in all:"
            f" see summary.json, and run: python -m shards verify {dataset.place}"
        )
    return [row | {"times": times[image]} for image, row in sorted(found.items())]


def device_name(device: torch.device) -> str:
    """Return what a person calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def accuracy_line(result: dict[str, Any]) -> str:
    """Return "overall 97.1, many …" in percent."""
    return f"overall {percent(result['top1'])}" + "".join(
        f", {group} {percent(result[group])}" for group in ("many", "medium", "few")
    )


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """Return the one line that an epoch leaves on the screen."""
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}", f"loss {row['loss']:.4f}", f"lr {row['lr']:.2g}"]
    parts += [f"alpha {row['alpha']:.3f}"] if "alpha" in row else []
    parts += [f"{row['images_per_second']:,.0f} images/s"]
    if "eval" in row:
        parts.append(f"{row['eval']['split']}: {accuracy_line(row['eval'])}")
    return "  ".join(parts)
