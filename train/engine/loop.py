"""The loop: one for all methods, on Accelerate. It never asks which method runs."""

import copy
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from analysis.metrics import summarize
from pipeline.batch import Batch, Loader
from pipeline.plan import TrainPlan
from pipeline.sampling import random_generator
from shards.index import Dataset
from train.engine import runs
from train.engine.checkpoints import Counters, read_selected, save_checkpoint, save_selected
from train.engine.config import Config, Loop
from train.engine.evaluation import device_text, epoch_line, evaluate, gather_faults, recall_faults, test_split
from train.engine.guards import LossGuard, StallGuard, check_weights
from train.engine.interrupts import Consensus, Interrupted, Interrupts
from train.engine.method import Method, Progress, unwrapped
from train.engine.optimisers import lr_factor, make_optimizer, warnings_about
from train.engine.tracking import Tracking
from train.networks.backbones import Normalize
from train.networks.batch_norm import use_stream_batch_norm

# Images that a split needs to select an epoch: of fewer, each is a point or more of accuracy.
IMAGES_TO_SELECT = 100


class Training:
    """A method on its way to its last epoch: a row of numbers each, checkpoints, and the selected weights."""

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
        self._average = None
        if config.optim.ema is not None:
            self._average = AveragedModel(
                method.network,
                accelerator.device,
                multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema),
                # Batch norm's statistics, too: those of the weights of this step fit the average of many steps' badly.
                use_buffers=True,
            )
        optimizer = make_optimizer(method, config.optim)
        method.network, self._optimizer = accelerator.prepare(method.network, optimizer)
        # What methods are given, and what is logged: there each part counts by its share of the step, so that a run may
        # be resumed with other numbers of parts and processes in the middle of an epoch.
        self._sums, self._means = Sums(accelerator.device), Sums(accelerator.device)
        self._network = unwrapped(method.network)
        # A dataset without a test split reports on val, which must not choose an epoch then.
        self._watched = dataset.splits.get("val") or test_split(dataset)
        self._selecting = config.loop.select and self._watched.name != test_split(dataset).name
        if self._selecting and len(self._watched) < IMAGES_TO_SELECT:
            self._selecting = False
            accelerator.print(
                f"note: {self._watched.name} has {len(self._watched):,} images, which tell epochs apart only by chance:"
                f" none is selected (from {IMAGES_TO_SELECT} images on; --val-fraction holds out more)"
            )
        selected = read_selected(run_folder)
        # Also of an epoch that a resumed run takes again: its weights are kept, and must be beaten.
        self._best = selected[2] if selected and selected[1] <= config.optim.epochs else -1.0

    @property
    def evaluated(self) -> Method:
        """The method as it is now, with the weights that are evaluated and kept: those trained, or their average."""
        if self._average is None:
            return self._method
        method = copy.copy(self._method)
        method.network = self._average.module
        return method

    def run(self, loader: Loader) -> None:
        """Train to the last epoch.

        Args:
            loader: opened on the plan at the step where the run is.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint is written.
            UserError: the loss is not finite.
        """
        config, plan, counters, accelerator = self._config, self._plan, self._counters, self._accelerator
        epochs, steps = config.optim.epochs, plan.steps_per_epoch
        accelerator.print(
            f"{self._method.title} on {self._dataset.name}: {len(plan.split):,} images, {len(self._dataset.classes):,}"
            f" classes, {epochs} epoch{'s' * (epochs > 1)} of {steps} step{'s' * (steps > 1)}, {config.model.backbone},"
            f" {device_text(accelerator.device)} -> {self._run_folder}"
        )
        for warning in warnings_about(config.optim, plan.steps_per_epoch):
            accelerator.print(warning)
        self._started = time.perf_counter() - counters.seconds
        self._saved = time.perf_counter()
        self._due = 0  # of the epoch's last step: a checkpoint is wanted
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
                self._epoch(stalls)
                self._end_of_epoch()
            # A signal that came after the last epoch had asked.
            heard = self._consensus(self._interrupts.received)
            (signal,) = self._consensus.wait() or heard
            if signal:
                raise Interrupted(signal)

    def _epoch(self, batches: StallGuard) -> None:
        """Take the steps of an epoch that are left."""
        config, plan, counters = self._config, self._plan, self._counters
        epoch, last_step = counters.epochs + 1, (counters.epochs + 1) * plan.steps_per_epoch
        self._network.train()
        began = time.perf_counter() - counters.epoch_seconds
        while counters.step < last_step:
            within = counters.step % plan.steps_per_epoch
            lr = config.optim.lr * lr_factor(config.optim, epoch, within, plan.steps_per_epoch)
            batch = next(batches)
            progress = Progress(epoch, config.optim.epochs, within, config.loop.seed)
            loss = self._step(batch, progress, lr)
            self._losses.seen(loss, {"epoch": epoch, "step": counters.step + 1, "lr": lr}, batch)
            counters.step += 1
            self._bar.update()
            signal, self._due = self._consensus(self._interrupts.received, self._is_due())
            if (signal or self._due) and counters.step < last_step:
                self._gather(began)
                self._save()
                if signal:
                    raise Interrupted(signal)
        self._gather(began)

    def _step(self, batch: dict[str, Batch], progress: Progress, lr: float) -> torch.Tensor:
        """Make one step of the optimiser and add to the epoch's sums; return the loss, detached."""
        accelerator, optim = self._accelerator, self._config.optim
        if self._config.model.drop_path:
            # What is dropped depends on the step alone, and differs between ranks.
            drawn = random_generator(
                progress.seed, "drop path", progress.epoch, progress.step, accelerator.process_index
            )
            torch.manual_seed(int(drawn.integers(2**63)))
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        loss = torch.zeros((), device=accelerator.device)
        parts = split_batch(batch, optim.accumulate)
        for number, part in enumerate(parts, start=1):
            # Gradients are exchanged between processes once a step.
            with accelerator.no_sync(self._method.network) if number < len(parts) else nullcontext():
                with accelerator.autocast():
                    result = self._method.step(part, progress)
                accelerator.backward(result.loss / len(parts))
            loss += result.loss.detach() / len(parts)
            self._sums.add(result.sums)
            scalars = {name: value for name, value in result.sums.items() if torch.as_tensor(value).ndim == 0}
            share = 1 / (len(parts) * accelerator.num_processes)
            self._means.add({name: value * share for name, value in {"loss": result.loss, **scalars}.items()})
        if optim.clip_norm is not None:
            accelerator.clip_grad_norm_(self._method.network.parameters(), optim.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update_parameters(self._network)
        return loss

    def _is_due(self) -> bool:
        """Return whether a checkpoint is wanted at this step, in mid-epoch."""
        loop = self._config.loop
        by_steps = loop.checkpoint_steps is not None and self._counters.step % loop.checkpoint_steps == 0
        # The clocks of ranks differ; the first one's counts.
        late = time.perf_counter() - self._saved > 60 * loop.checkpoint_minutes
        return by_steps or (late and self._accelerator.is_main_process)

    def _gather(self, began: float) -> None:
        """Bring what is known of the epoch under way up to date."""
        self._losses.check()
        self._sums.gather(self._accelerator)
        self._means.gather(self._accelerator)
        self._counters.epoch_seconds = time.perf_counter() - began

    def _end_of_epoch(self) -> None:
        """Evaluate, write the row, keep what is to be kept."""
        config, plan, counters, accelerator = self._config, self._plan, self._counters, self._accelerator
        epochs, epoch, took = config.optim.epochs, counters.epochs + 1, counters.epoch_seconds
        images = plan.steps_per_epoch * plan.batch_size * len(plan.streams)
        row: dict[str, Any] = {"epoch": epoch, "step": counters.step}
        means = {name: float(total) / plan.steps_per_epoch for name, total in self._means.totals().items()}
        lr = config.optim.lr * lr_factor(config.optim, epoch, plan.steps_per_epoch - 1, plan.steps_per_epoch)
        row |= {"loss": means.pop("loss"), "lr": lr}
        row |= {"images_per_second": images / took, **means}
        progress = Progress(epoch, epochs, plan.steps_per_epoch, config.loop.seed)
        row |= self._method.end_of_epoch(self._sums.totals(), progress)
        self._sums.clear()
        self._means.clear()
        if epoch % config.loop.eval_every == 0 or epoch == epochs:
            began = time.perf_counter()
            tally = evaluate(self.evaluated, self._watched, config, accelerator)
            result = summarize(tally, self._dataset.train_counts)
            row["eval"] = {"split": self._watched.name, **result}
            row["eval_seconds"] = time.perf_counter() - began
            counters.evaluation_seconds += row["eval_seconds"]
            score = result["balanced_accuracy"]
            if self._selecting and score is not None and score > self._best:
                self._best = score
                if accelerator.is_main_process:
                    save_selected(self._run_folder, self.evaluated.model, epoch, score)
        counters.epochs, counters.images = epoch, counters.images + images
        counters.training_seconds += took
        counters.epoch_seconds = 0.0
        row["seconds"] = counters.seconds = time.perf_counter() - self._started
        if accelerator.is_main_process:
            runs.append_row(self._run_folder, row)
            self._tracking.row(row)
            self._bar.write(epoch_line(row, epochs))
        signal, due = self._consensus(self._interrupts.received, self._is_due())
        # Several ranks hear of a step one call later: what was due before the last step was heard of after it.
        if signal or due or self._due or epoch % config.loop.checkpoint_every == 0 or epoch == epochs:
            self._save()
        if signal:
            raise Interrupted(signal)

    def _save(self) -> None:
        """Write a checkpoint; every rank returns when it is there."""
        self._counters.seconds = time.perf_counter() - self._started
        step = self._counters.step
        check_weights(self._network, -(-step // self._plan.steps_per_epoch), step)
        faults = gather_faults(self._dataset, self._accelerator)
        if self._accelerator.is_main_process:
            keep = self._config.loop.keep_checkpoints
            states = self._states() | {"faults": faults}
            save_checkpoint(self._run_folder, self._network, states, self._counters, keep)
        self._accelerator.wait_for_everyone()
        self._consensus.wait()  # whether this checkpoint is due
        self._saved = time.perf_counter()

    def _states(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the network and the counters."""
        states = {"optimizer": self._optimizer.state_dict(), "random": torch.get_rng_state()}
        states |= {"method": self._method.state_dict(), "sums": self._sums.totals(), "means": self._means.totals()}
        if self._accelerator.device.type == "cuda":
            states["random_cuda"] = torch.cuda.get_rng_state(self._accelerator.device)
        if self._accelerator.scaler is not None:
            states["scaler"] = self._accelerator.scaler.state_dict()
        if self._average is not None:
            states["average"] = self._average.state_dict()
        return states

    def restore(self, states: dict[str, Any]) -> None:
        """Undo `_states`; what the checkpoint lacks, because the run was configured otherwise, starts afresh."""
        # The settings are the configuration's: a resumed run may have been given others.
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(states["optimizer"])
        for group, of_group in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(of_group)
        torch.set_rng_state(states["random"])
        recall_faults(self._dataset, states.get("faults", []), self._accelerator)
        self._method.load_state_dict(states["method"])
        # Every rank has the same names, whose sums are then gathered one by one; the first one has the values.
        share = 1.0 if self._accelerator.is_main_process else 0.0
        for sums, before in ((self._sums, states["sums"]), (self._means, states.get("means", {}))):
            sums.add({name: share * value for name, value in before.items()})
        if self._accelerator.device.type == "cuda" and "random_cuda" in states:
            torch.cuda.set_rng_state(states["random_cuda"], self._accelerator.device)
        if self._accelerator.scaler is not None and "scaler" in states:
            self._accelerator.scaler.load_state_dict(states["scaler"])
        if self._average is not None and "average" in states:
            self._average.load_state_dict(states["average"])


class Sums:
    """What the steps of an epoch add up: named tensors in float64, each rank's share until they are gathered."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, torch.Tensor] = {}
        self._gathered: dict[str, torch.Tensor] = {}

    def add(self, values: Mapping[str, torch.Tensor | float]) -> None:
        """Add to the sums of these names, which begin at 0; nothing waits for a GPU here."""
        for name, value in values.items():
            exact = torch.float64 if isinstance(value, float) else None  # torch's own of a float is float32
            part = torch.as_tensor(value, dtype=exact).detach().to(self._device, torch.float64)
            self._sums[name] = self._sums[name] + part if name in self._sums else part.clone()

    def gather(self, accelerator: Accelerator) -> None:
        """Give the totals over ranks to the first one, and nothing to the others, which is as much as before."""
        if accelerator.num_processes > 1:
            self._gathered = {name: accelerator.reduce(value, "sum") for name, value in sorted(self._sums.items())}
            keep = 1.0 if accelerator.is_main_process else 0.0
            self._sums = {name: value * keep for name, value in self._gathered.items()}
        else:
            self._gathered = self._sums

    def totals(self) -> dict[str, torch.Tensor]:
        """Return the totals over ranks as of the last `gather`, on the CPU."""
        return {name: value.cpu().clone() for name, value in self._gathered.items()}

    def clear(self) -> None:
        """Begin an epoch."""
        self._sums, self._gathered = {}, {}


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
        return of.part(slice(number * size, (number + 1) * size))

    return [{name: part(of, number) for name, of in batch.items()} for number in range(parts)]
