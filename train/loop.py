"""The loop: one for all methods, on Accelerate. It never asks which method runs."""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from tqdm import tqdm

from analysis.metrics import Tally, summarize, tally
from pipeline.batch import Loader
from pipeline.faults import faults_of
from pipeline.plan import EvalPlan, TrainPlan
from shards.errors import UserError, user_errors_exit_2
from shards.index import Dataset, Split
from train import runs
from train.checkpoints import Counters, load_checkpoint, read_selected, save_checkpoint, save_selected
from train.config import Input, Loop, Model, Optim, find_dataset, make_parser, parse, peek, plain_sections, preset
from train.method import Method, Progress, unwrapped
from train.networks import load_weights, save_model


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
        defaults = preset(dataset, "training", method_class.name)
    settings = parse(parser, argv, defaults)
    chosen = parser.instantiate(settings)
    config = Config(chosen.input, chosen.model, chosen.method, chosen.optim, chosen.loop)

    accelerator = make_accelerator(config.loop.precision)
    set_seed(config.loop.seed)
    method = method_class(config, len(dataset.classes))
    plan = TrainPlan(
        dataset.splits["train"],
        method.streams,
        config.input.batch_size,
        config.input.image_size,
        config.loop.seed,
        config.optim.epochs,
        accelerator.process_index,
        accelerator.num_processes,
    )
    test_split(dataset)  # tells early where there is none
    # Whatever can fail comes before the folder is made or touched.
    restored = load_checkpoint(resumed, method.network) if resumed else None
    counters = restored[1] if restored else Counters()
    if resumed and counters.epochs >= config.optim.epochs and (resumed / "summary.json").exists():
        accelerator.print(f"{resumed} is finished: it has its {counters.epochs} epochs (more with --optim.epochs)")
        return
    if counters.step != counters.epochs * plan.steps_per_epoch:
        raise UserError(
            f"{resumed} did {counters.step} steps in {counters.epochs} epochs, and an epoch has {plan.steps_per_epoch}"
            " now: resume with the dataset and input.batch_size that it began with"
        )
    loader = config.input.open_loader(plan, accelerator.device, counters.step)
    folder: list[Path | None] = [None]
    if accelerator.is_main_process:
        if resumed or asked.run:
            folder = [runs.use_run(resumed or Path(asked.run), bool(resumed))]
        else:
            folder = [runs.new_run(f"{dataset.name}-{method.name}")]
    (run_folder,) = broadcast_object_list(folder)
    if accelerator.is_main_process:
        about = {"method": method.name, "dataset": dataset.name, "data": dataset.place}
        runs.write_config(run_folder, {"about": about, **plain_sections(parser, settings)})
        runs.truncate_rows(run_folder, counters.epochs)
        (run_folder / "summary.json").unlink(missing_ok=True)  # of a finished run that is given more epochs
    if restored:
        accelerator.print(f"resuming {run_folder} after epoch {counters.epochs}")
    with loader:
        train(method, config, dataset, plan, loader, run_folder, accelerator, counters, restored[0] if restored else {})
    finish(method, config, dataset, run_folder, accelerator, counters)


def train(
    method: Method,
    config: Config,
    dataset: Dataset,
    plan: TrainPlan,
    loader: Loader,
    run_folder: Path,
    accelerator: Accelerator,
    counters: Counters,
    states: dict[str, Any],
) -> None:
    """Train a method to its last epoch: a row of numbers each, checkpoints, and the selected weights.

    Args:
        method: made, with its weights in place.
        config: the run's settings.
        dataset: what is trained and evaluated on.
        plan: the training plan.
        loader: opened on the plan at step `counters.step`.
        run_folder: the run's folder.
        accelerator: gives device, precision and processes.
        counters: how far the run is; moved on.
        states: the checkpoint's state dicts; empty for a new run.
    """
    optimizer: Any = torch.optim.SGD(
        method.network.parameters(),
        lr=config.optim.lr,
        momentum=config.optim.momentum,
        nesterov=config.optim.nesterov and config.optim.momentum > 0,
        weight_decay=config.optim.weight_decay,
    )
    method.network, optimizer = accelerator.prepare(method.network, optimizer)
    network = unwrapped(method.network)
    if states:
        restore_states(states, optimizer, accelerator)

    epochs, epoch_steps = config.optim.epochs, plan.steps_per_epoch
    # A dataset without a test split reports on val, which must not choose an epoch then.
    watched = dataset.splits.get("val") or test_split(dataset)
    selecting = config.loop.select and watched.name != test_split(dataset).name
    selected = read_selected(run_folder)
    best = selected[2] if selected and selected[1] <= counters.epochs else -1.0
    accelerator.print(
        f"{method.title} on {dataset.name}: {len(plan.split):,} images, {len(dataset.classes):,} classes,"
        f" {epochs} epochs of {epoch_steps} steps, {config.model.backbone}, {accelerator.device} -> {run_folder}"
    )
    started = time.perf_counter() - counters.seconds
    bar = tqdm(
        total=epochs * epoch_steps,
        initial=counters.step,
        unit="step",
        disable=not (accelerator.is_main_process and sys.stderr.isatty()),
        leave=False,
    )
    with bar:
        for epoch in range(counters.epochs + 1, epochs + 1):
            network.train()
            epoch_started = time.perf_counter()
            loss_sum = torch.zeros((), device=accelerator.device)
            log: dict[str, float] = {}
            for step in range(epoch_steps):
                lr = config.optim.lr * lr_factor(config.optim, counters.step / epoch_steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                batch = next(loader)
                with accelerator.autocast():
                    result = method.step(batch, Progress(epoch, epochs, step, config.loop.seed))
                accelerator.backward(result.loss)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                loss_sum += result.loss.detach()
                log = result.log
                counters.step += 1
                bar.update()
            loss = float(accelerator.reduce(loss_sum, "mean")) / epoch_steps
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} in epoch {epoch} (optim.lr={lr:g}); lower optim.lr or use --loop.precision no"
                )
            took = time.perf_counter() - epoch_started
            images = epoch_steps * plan.batch_size * len(plan.streams)
            counters.epochs, counters.images = epoch, counters.images + images
            counters.training_seconds += took
            row: dict[str, Any] = {"epoch": epoch, "step": counters.step, "loss": loss, "lr": lr}
            row |= {"images_per_second": images / took, **log}
            if epoch % config.loop.eval_every == 0 or epoch == epochs:
                result_on = summarize(evaluate(method, watched, config.input, accelerator), dataset.train_counts)
                row["eval"] = {"split": watched.name, **result_on}
                score = result_on["balanced_accuracy"]
                if selecting and score is not None and score > best:
                    best = score
                    if accelerator.is_main_process:
                        save_selected(run_folder, network, epoch, score)
            row["seconds"] = counters.seconds = time.perf_counter() - started
            if accelerator.is_main_process:
                runs.append_row(run_folder, row)
                bar.write(epoch_line(row, epochs))
                if epoch % config.loop.checkpoint_every == 0 or epoch == epochs:
                    save_checkpoint(run_folder, network, collect_states(optimizer, accelerator), counters)


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


def make_accelerator(precision: str) -> Accelerator:
    """Make the Accelerator, or say why this precision cannot be had here."""
    try:
        return Accelerator(
            mixed_precision=None if precision == "auto" else precision,
            # Unless it is told, several processes on CPUs would each think itself alone.
            cpu=not torch.cuda.is_available(),
        )
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


def collect_states(optimizer: Any, accelerator: Accelerator) -> dict[str, Any]:
    """Return the state dicts, besides the network's, that a resumed run needs."""
    states = {"optimizer": optimizer.state_dict()}
    if accelerator.scaler is not None:
        states["scaler"] = accelerator.scaler.state_dict()
    return states


def restore_states(states: dict[str, Any], optimizer: Any, accelerator: Accelerator) -> None:
    """Undo `collect_states`."""
    optimizer.load_state_dict(states["optimizer"])
    if accelerator.scaler is not None and "scaler" in states:
        accelerator.scaler.load_state_dict(states["scaler"])


def device_name(device: torch.device) -> str:
    """Return what a person calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def accuracy_line(result: dict[str, Any]) -> str:
    """Return "overall 97.1, many …" in percent."""
    percent: Callable[[float | None], str] = lambda value: "–" if value is None else f"{100 * value:.1f}"  # noqa: E731
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
