"""Evaluating a method, and what a finished run leaves: results, and the lines that people read."""

import hashlib
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from analysis.metrics import Tally, percent, summarize, tally
from pipeline.augment import find_recipe
from pipeline.faults import faults_of
from pipeline.pictures import FILTER_NAMES
from pipeline.plan import EvalPlan
from shards.atomic import write_json
from shards.errors import UserError
from shards.index import MANIFEST, Dataset, Split
from train.engine import runs
from train.engine.checkpoints import Counters, read_selected
from train.engine.config import Config, Input
from train.engine.diagnostics import Compactness, write_diagnostics
from train.engine.guards import StallGuard
from train.engine.method import Method, unwrapped
from train.engine.predictions import FILES as PREDICTIONS
from train.engine.predictions import Collector, Predictions, write_predictions
from train.networks.model_files import (
    FILES,
    Description,
    describe_model,
    load_weights,
    save_model,
    save_selected_model,
)
from train.networks.networks import Network

# What a line says of an epoch in its own way, or leaves to metrics.jsonl; everything else that is logged follows.
SAID = {"epoch", "step", "loss", "lr", "images_per_second", "eval", "eval_seconds", "seconds"}


def test_split(dataset: Dataset) -> Split:
    """Return the split that results are reported on: test, else val."""
    for name in ("test", "val"):
        if name in dataset.splits and len(dataset.splits[name]):
            return dataset.splits[name]
    raise UserError(f"{dataset.root} has neither a test nor a val split; build it again with --test-fraction 0.25")


@torch.inference_mode()
def evaluate(
    method: Method,
    split: Split,
    config: Config,
    accelerator: Accelerator,
    collector: Collector | None = None,
    compactness: Compactness | None = None,
) -> Tally:
    """Evaluate `method.predict` on every image of a split exactly once over all ranks; `collector` takes the logits.

    All ranks evaluate one model, which the first one saves: they take over its buffers, since batch norm's statistics
    are of each rank's own images. DDP does the same before its next step.
    """
    network = unwrapped(method.network)
    if accelerator.num_processes > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    was_training = network.training
    network.eval()
    rank, input = accelerator.process_index, config.input
    # As many images at once as a training step computes with, which is known to fit.
    at_once = max(1, input.batch_size // accelerator.num_processes // config.optim.accumulate)
    plan = EvalPlan(split, at_once, input.image_size, input.eval_augment, rank, accelerator.num_processes)
    total = Tally.zeros(len(split.class_counts))
    with (
        input.open_loader(plan, accelerator.device) as loader,
        StallGuard(loader, plan.streams, rank, 60 * config.loop.stall_minutes) as batches,
    ):
        for batch in batches:
            with accelerator.autocast():
                logits_BC = method.predict(batch["eval"].images_BHWC)
            try:
                total = total + tally(logits_BC.float().cpu().numpy(), batch["eval"].labels_B.cpu().numpy())
            except ValueError as error:
                raise UserError(f"on {split.name}, {error}") from None
            if collector is not None:
                collector.add(batch["eval"].ids_B, batch["eval"].labels_B, logits_BC)
            if compactness is not None:
                compactness.add(batch["eval"].labels_B)
    network.train(was_training)
    # Through float64, which the counts fit exactly.
    vector = torch.from_numpy(total.to_vector()).to(accelerator.device)
    return Tally.from_vector(accelerator.reduce(vector, "sum").cpu().numpy(), len(split.class_counts))


def finish(
    method: Method, config: Config, dataset: Dataset, run_folder: Path, accelerator: Accelerator, counters: Counters
) -> None:
    """Evaluate the last and the selected weights on the test split and write the run's results."""
    network, test = method.model, test_split(dataset)

    def measure(compactness: Compactness | None = None) -> tuple[Tally, dict[str, Predictions]]:
        tallies, kept = {}, {}
        # What results are reported on comes first. Calibration needs a split beside it.
        for split in dict.fromkeys([test.name, *held_out_beside(test, dataset)]):
            collector = Collector(len(dataset.classes), logits=split != test.name)
            watching = compactness if split == test.name else None
            tallies[split] = evaluate(method, dataset.splits[split], config, accelerator, collector, watching)
            kept[split] = collector.gather(accelerator)
        return tallies[test.name], kept

    with Compactness(network, len(dataset.classes)) as compactness:
        final, kept = measure(compactness)
    last, selected = summarize(final, dataset.train_counts), None
    distances_C = compactness.distances(accelerator)
    if accelerator.is_main_process:
        write_diagnostics(run_folder, network, distances=distances_C)
        for name in (runs.CALIBRATION, *PREDICTIONS.values()):  # of weights that are replaced now
            (run_folder / name).unlink(missing_ok=True)
        for name in runs.MADE_OF_A_MODEL:
            if (run_folder / name).exists():
                print(f"note: {run_folder / name} is of the weights that the run had before; make it again")
        # Until `describe` has its turn, nobody takes what is there for a model.
        save_model(network, run_folder)
        write_predictions(run_folder, kept)
    epochs = {"last": config.optim.epochs}
    chosen = read_selected(run_folder) if config.loop.select else None
    if chosen is not None:
        path, epochs["selected"], _ = chosen
        load_weights(network, path)
        of_selected, kept = measure()
        selected = {"epoch": epochs["selected"], **summarize(of_selected, dataset.train_counts)}
        if accelerator.is_main_process:
            save_selected_model(network, run_folder)
            write_predictions(run_folder, kept, "selected")
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
        "faults": report_faults(dataset, accelerator),
        "environment": runs.environment(device_name(accelerator.device), accelerator.num_processes)
        | {"loader": config.input.loader},
        "command": runs.command(),
    }
    if accelerator.is_main_process:
        describe(run_folder, network, dataset, config.input, summary, epochs)
        write_results(run_folder, summary, final, dataset)


def held_out_beside(test: Split, dataset: Dataset) -> list[str]:
    """Return ["val"] where the dataset has such images, and results are not reported on them."""
    return ["val"] if test.name != "val" and len(dataset.splits.get("val", ())) else []


def describe(
    run_folder: Path, network: Network, dataset: Dataset, input: Input, summary: dict[str, Any], epochs: dict[str, int]
) -> None:
    """Write into model.json what it takes to use the model.

    Args:
        run_folder: holds the model.
        network: gives mean and standard deviation.
        dataset: what it was trained on.
        input: size and recipe of its images.
        summary: the run's figures.
        epochs: for "last", and "selected" where there is one: the epoch of these weights.
    """
    options, recipe = dataset.manifest["options"], find_recipe(input.eval_augment)
    weights = {name: {"file": FILES[name], "epoch": epoch, "figures": summary[name]} for name, epoch in epochs.items()}
    describe_model(
        run_folder,
        Description(
            classes=dataset.classes,
            train_counts=dataset.train_counts.tolist(),
            image_size=input.image_size,
            eval_augment=input.eval_augment,
            crop_share=recipe.centre_share,
            interpolation=FILTER_NAMES[recipe.interpolation],
            mean=network.normalize.mean.flatten().tolist(),
            std=network.normalize.std.flatten().tolist(),
            shorter_side=options.get("shorter_side"),
            quality=options.get("quality", 90),
            grey_bits=dataset.manifest.get("grey_bits", 16),
            dataset={"name": dataset.name, "fingerprint": _digest(dataset.root / MANIFEST)},
            method=summary["title"],
            commit=summary["environment"]["commit"],
            evaluated_on=summary["evaluated_on"],
            weights=weights,
        ),
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_results(run_folder: Path, summary: dict[str, Any], final: Tally, dataset: Dataset) -> None:
    """Write per_class.json, then summary.json, and say where they are."""
    write_json(
        run_folder / "per_class.json",
        {
            "split": summary["evaluated_on"],
            "classes": dataset.classes,
            "train_counts": dataset.train_counts.tolist(),
            "correct": final.correct_C.tolist(),
            "total": final.total_C.tolist(),
        },
    )
    write_json(run_folder / "summary.json", summary)
    runs.unlock()
    print(f"{summary['title']}, last epoch, on {summary['evaluated_on']}: {accuracy_line(summary['last'])}")
    if summary["selected"]:
        chosen = summary["selected"].get("name") or f"{summary['title']}, epoch {summary['selected']['epoch']}"
        which = f"{chosen}, which {summary['selected_on']} chose"
        print(f"{which}, on {summary['evaluated_on']}: {accuracy_line(summary['selected'])}")
    print(f"wrote {run_folder}/summary.json; for a page with figures: tailstream report {run_folder}")


def gather_faults(dataset: Dataset, accelerator: Accelerator) -> list[dict[str, Any]]:
    """Return a row per image that did not decode, in whichever process; every process calls it, and knows all then."""
    mine = [{"split": name} | row for name, split in dataset.splits.items() for row in faults_of(split).rows()]
    found, times = {}, Counter[tuple[str, int]]()
    for row in gather_object(mine):
        image = row["split"], row["sample"]
        found[image] = row
        times[image] += row["times"]
    rows = [row | {"times": times[image]} for image, row in sorted(found.items())]
    if accelerator.num_processes > 1:
        _recall(dataset, rows, counted=False)
    return rows


def recall_faults(dataset: Dataset, rows: list[dict[str, Any]], accelerator: Accelerator) -> None:
    """Go on from what `gather_faults` returned before the run was resumed."""
    _recall(dataset, rows, counted=accelerator.is_main_process)


def _recall(dataset: Dataset, rows: list[dict[str, Any]], *, counted: bool) -> None:
    for name, split in dataset.splits.items():
        faults_of(split).recall(split, [row for row in rows if row["split"] == name], counted)


def report_faults(dataset: Dataset, accelerator: Accelerator) -> list[dict[str, Any]]:
    """Return what `gather_faults` does, and say how many there are."""
    rows = gather_faults(dataset, accelerator)
    if rows:
        times = sum(row["times"] for row in rows)
        images = f"{len(rows)} images did not decode and were" if len(rows) > 1 else "1 image did not decode and was"
        accelerator.print(
            f"{images} replaced or left out, {times} time{'s' * (times > 1)} in all:"
            f" see summary.json, and run: tailstream verify {shlex.quote(dataset.place)}"
        )
    return rows


def device_name(device: torch.device) -> str:
    """Return what a person calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def device_text(device: torch.device) -> str:
    """Return the device and, for a CPU, the threads that compute there."""
    threads = torch.get_num_threads()
    return f"{device} with {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)


def accuracy_line(result: dict[str, Any]) -> str:
    """Return "overall 97.1, many …" in percent."""
    return f"overall {percent(result['top1'])}" + "".join(
        f", {group} {percent(result[group])}" for group in ("many", "medium", "few")
    )


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """Return the one line that an epoch leaves on the screen."""
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}", f"loss {row['loss']:.4f}", f"lr {row['lr']:.2g}"]
    parts += [f"{name} {value:.4g}" for name, value in row.items() if name not in SAID and isinstance(value, float)]
    parts += [f"{row['images_per_second']:,.0f} images/s"]
    if "eval" in row:
        parts.append(f"{row['eval']['split']}: {accuracy_line(row['eval'])}")
    return "  ".join(parts)
