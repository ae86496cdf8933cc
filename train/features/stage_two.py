"""What every second stage shares: the run that it starts from, its features, who judges, and what is left behind.

finished run of stage one ─ open_stage ─> Stage: frozen network, features of train, val and test
                                             │  (the launchable file trains a linear classifier)
                                        close_stage ─> run folder: model, rows, summary
"""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn

from analysis.metrics import summarize
from shards.errors import UserError, user_errors_exit_2
from shards.index import Dataset
from train.engine import runs
from train.engine.config import Input, find_dataset, parse, peek, plain_sections
from train.engine.evaluation import collect_faults, describe, device_name, test_split, write_results
from train.engine.interrupts import EXIT_STATUS, Interrupted
from train.engine.launch import make_accelerator
from train.engine.predictions import Collector, write_predictions
from train.features import passes
from train.features.bank import bank_folder, bank_ids, feature_bank
from train.features.candidates import IMAGES_TO_CHOOSE, RATES, Candidate, Families, Judge
from train.features.classifiers import FEATURES_PER_BLOCK, measure
from train.features.commands import Program, Stops, defaults
from train.features.gaussians import find_support, fit, head_classes
from train.features.mixing import Mixture
from train.networks.model_files import SELECTED_FILE, choose_weights, load_model, save_model, save_selected_model


@dataclass(frozen=True)
class Stage:
    """A second stage that has begun.

    Attributes:
        name: the launchable file's name.
        config: the resolved settings: method, optim, loop.
        source: the folder of the stage-one run.
        network: its network, frozen, on the accelerator's device.
        dataset: what it was trained on.
        run_folder: where this stage's results go.
        accelerator: gives device, precision and ranks.
        features_ND, labels_N: the training images' features, float16, sorted by class, and their classes.
        judge: the held-out and the test features.
        watched: the name of the split that chooses; None where there is none, or one too small.
        tested: the name of the split that is reported.
        started: when it began, by time.perf_counter.
        weights: which of the stage-one run's weights the network has: "last" or "selected".
        input: what the network sees.
    """

    name: str
    config: Any
    source: Path
    network: Any
    dataset: Dataset
    run_folder: Path
    accelerator: Accelerator
    features_ND: Tensor
    labels_N: Tensor
    judge: Judge
    watched: str | None
    tested: str
    started: float
    weights: str
    input: Input

    def average(self, gradient: Tensor) -> Tensor:
        """Return the mean of a gradient over all ranks."""
        if self.accelerator.num_processes == 1:
            return gradient
        mean: Tensor = self.accelerator.reduce(gradient, reduction="mean")
        return mean


def run_stage(program: Program, train: Callable[[Stage], None], argv: list[str] | None) -> None:
    """Run a second stage from its command line; exits with 2 for a user's mistake, with 75 after a signal."""
    begun: list[Path] = []
    with user_errors_exit_2(f"train/{program.name}.py"):
        try:
            with Stops():
                stage = open_stage(program, argv, begun)
                if stage is not None:
                    train(stage)
        except Interrupted as interrupted:
            again = f"resume with: python train/{program.name}.py --run {begun[0]} --resume" if begun else "start again"
            print(
                f"stopped by {interrupted.signal}; features and classifiers that were finished are kept; {again}",
                flush=True,
            )
            sys.exit(EXIT_STATUS)


def open_stage(program: Program, argv: list[str] | None, begun: list[Path] | None = None) -> Stage | None:
    """Read the command line, open the run that is named or the newest one, and take or find its features.

    Args:
        program: the launchable file.
        argv: the command line.
        begun: takes the run's folder as soon as there is one.

    Returns:
        The stage; None where the run to resume is finished.

    Raises:
        UserError: no finished run, a dataset of other classes, or what the loader raises.
    """
    name, parser = program.name, program.parser
    asked = peek(parser, argv)
    resumed = None
    if asked.resume:
        resumed = Path(asked.run) if asked.run else runs.newest_run({2}, method=name, finished=False)
    about: dict[str, Any] = {}
    saved_settings: dict[str, Any] = {}
    if resumed is not None and (resumed / "config.yaml").exists():
        saved_settings = runs.read_config(resumed)
        about = saved_settings.pop("about", {})
        if about.get("method") != name:
            raise UserError(f"{resumed} is a run of {about.get('method')}, not of {name}; name another")
        if (resumed / "summary.json").exists():
            print(f"{resumed} is finished")
            return None
    wanted = find_dataset(asked.data).name if asked.data else None
    place = asked["from"] or about.get("from")
    source = Path(place) if place else runs.newest_run({1}, dataset=wanted)
    saved = runs.read_config(source)
    if not (source / "summary.json").exists():
        raise UserError(f"{source} is not finished; resume it: train/{saved['about']['method']}.py --resume")
    dataset = find_dataset(asked.data or saved["about"]["data"])
    settings = parse(parser, argv, saved_settings or defaults(program, dataset, asked.variant))
    config = parser.instantiate(settings)
    program.check(config)

    accelerator = make_accelerator(config.loop.precision)
    set_seed(config.loop.seed)
    weights = choose_weights(source, asked.weights)
    network = load_model(source, weights)
    if network.classifier.out_features != len(dataset.classes):
        raise UserError(
            f"{source} was trained for {network.classifier.out_features} classes, and {dataset.root} has"
            f" {len(dataset.classes)}; name the dataset it was trained on with --data"
        )
    folder: list[Path | None] = [None]
    if accelerator.is_main_process:
        named = resumed or (Path(asked.run) if asked.run else None)
        folder = [runs.use_run(named, bool(resumed)) if named else runs.new_run(f"{dataset.name}-{name}")]
    (run_folder,) = broadcast_object_list(folder)
    assert run_folder is not None
    if begun is not None:
        begun.append(run_folder)
    if accelerator.is_main_process:
        about = {"method": name, "dataset": dataset.name, "data": dataset.place, "from": str(source)}
        about["weights"] = weights
        runs.write_config(run_folder, {"about": about, **plain_sections(parser, settings)})
        (run_folder / "metrics.jsonl").unlink(missing_ok=True)  # written once, at the end
    doing = "resuming" if resumed else "->"
    accelerator.print(
        f"{program.title} on the {weights} weights of {source} ({dataset.name}, {len(dataset.classes):,} classes)"
        f" {doing} {run_folder}"
    )

    started = time.perf_counter()
    network.to(accelerator.device)
    test, held_out = test_split(dataset), dataset.splits.get("val")
    watched = "val" if held_out and test.name != "val" else None
    taken = vars(config.input)
    views = taken.pop("views")
    input = Input(**{key: saved["input"][key] for key in ("image_size", "augment", "eval_augment")}, **taken)

    def bank(split: str) -> tuple[Tensor, Tensor]:
        seen = views if split == "train" else 0
        return feature_bank(source, network, dataset, split, input, accelerator, seen, weights)

    features_ND, labels_N = bank("train")
    judge = Judge(bank(watched) if watched else None, bank(test.name), dataset.train_counts)
    if not judge.chooses:
        held = f"val has {judge.images_per_class:.1f} images a class" if watched else "there is no val split"
        accelerator.print(
            f"{held}, and a choice needs {IMAGES_TO_CHOOSE}: nothing is selected: β is the paper's, and every"
            " other setting the first of its grid; build the dataset with a larger --val-fraction to have them chosen"
        )
    return Stage(
        name,
        config,
        source,
        network,
        dataset,
        run_folder,
        accelerator,
        features_ND,
        labels_N,
        judge,
        watched if judge.chooses else None,
        test.name,
        started,
        weights,
        input,
    )


def make_families(
    stage: Stage,
    *,
    lam: float = 0.5,
    k: int = 2,
    gamma: float = 0.0,
    chunk: int = 65536,
    head_above: int = 100,
    kind: Literal["scaled", "lws", "linear"] = "scaled",
    rates: list[float] | None = None,
) -> Families:
    """Fit the Gaussians, and return all that makes candidates; arguments as AFG's settings of the same names."""
    accelerator, seed = stage.accelerator, stage.config.loop.seed
    gaussians = fit(stage.features_ND, stage.labels_N, num_classes=len(stage.dataset.classes), lam=lam)
    # By images: several views of one make no class larger.
    images_C = torch.from_numpy(stage.dataset.train_counts).to(stage.labels_N.device)
    mixture = Mixture(
        stage.features_ND,
        stage.labels_N,
        gaussians,
        find_support(gaussians, k, head_classes(images_C, head_above)),
        gaussians.counts_C.max() - gaussians.counts_C,
        gamma=gamma,
        chunk=chunk,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    salt = [
        lam,
        k,
        gamma,
        chunk,
        head_above,
        (bank_folder(stage.source, "train", stage.weights) / "bank.json").read_text(),
    ]
    trainer = passes.Passes(
        stage.network.classifier,
        mixture,
        seed,
        stage.average,
        accelerator.print,
        not (accelerator.is_main_process and sys.stderr.isatty()),
        stage.run_folder,
        accelerator.is_main_process,
        salt,
    )
    optim, reference = stage.config.optim, stage.config.reference
    return Families(stage.network.classifier, mixture, stage.judge, trainer, optim, reference, kind, rates or RATES)


def close_stage(
    stage: Stage,
    title: str,
    last: Candidate,
    selected: dict[str, Any] | None = None,
    winner: nn.Linear | None = None,
    **more: Any,
) -> None:
    """Evaluate the classifier on the test split and leave a finished run folder.

    Args:
        stage: from `open_stage`.
        title: what tables call the stage; stage one's title comes before it.
        last: the stage's own classifier, which takes the place of stage one's.
        selected: what is said of the selected one, whose figures and file are added.
        winner: the selected classifier.
        more: further keys of summary.json.
    """
    rows = last.trained.rows if last.trained else []
    final, _ = measure(last.linear, stage.judge.test)
    if selected is not None and winner is not None:
        selected |= {"file": SELECTED_FILE, **stage.judge.report(winner)}
    seconds = time.perf_counter() - stage.started
    summary = {
        "method": stage.name,
        "title": f"{runs.read_summary(stage.source)['title']} + {title}",
        "stage": 2,
        "from": stage.source.resolve().name,
        "from_weights": stage.weights,
        "dataset": stage.dataset.name,
        "seed": stage.config.loop.seed,
        "epochs": len(rows),
        "last": summarize(final, stage.dataset.train_counts),
        "selected": selected,
        "selected_on": stage.watched if selected else None,
        "held_out_images_per_class": stage.judge.images_per_class,
        "evaluated_on": stage.tested,
        **more,
        "images_per_second": sum(row["images_per_second"] for row in rows) / len(rows) if rows else None,
        "seconds": seconds,
        "faults": collect_faults(stage.dataset, stage.accelerator),
        "environment": runs.environment(device_name(stage.accelerator.device), stage.accelerator.num_processes),
        "command": runs.command(),
    }
    if stage.accelerator.is_main_process:
        stage.network.classifier = last.linear
        save_model(stage.network, stage.run_folder)
        epochs = {"last": len(rows)}
        if winner is not None:
            stage.network.classifier = winner
            save_selected_model(stage.network, stage.run_folder)
            stage.network.classifier = last.linear
            epochs["selected"] = len(rows)
        keep_predictions(stage, last.linear)
        if winner is not None:
            keep_predictions(stage, winner, "selected")
        describe(stage.run_folder, stage.network, stage.dataset, stage.input, summary, epochs)
        (stage.run_folder / "metrics.jsonl").touch()
        for row in rows:
            runs.append_row(stage.run_folder, {**row, "seconds": seconds})
        write_results(stage.run_folder, summary, final, stage.dataset)
        shutil.rmtree(stage.run_folder / passes.FOLDER, ignore_errors=True)


@torch.no_grad()
def keep_predictions(stage: Stage, linear: nn.Linear, weights: str = "last") -> None:
    """Write predictions.npz: what a classifier says of the features of test, and of val where there is one.

    A val split that is too small to choose a classifier may still be large enough for a temperature.
    """
    kept = {}
    for name, bank in ((stage.tested, stage.judge.test), ("val", stage.judge.watched)):
        if bank is not None:
            collector = Collector(linear.out_features, logits=name != stage.tested)
            ids_N = bank_ids(stage.source, stage.dataset.splits[name], stage.weights)
            for ids_B, features_BD, labels_B in zip(
                np.split(ids_N, range(FEATURES_PER_BLOCK, len(ids_N), FEATURES_PER_BLOCK)),
                *(part.split(FEATURES_PER_BLOCK) for part in bank),
                strict=True,
            ):
                collector.add(ids_B, labels_B, linear(features_BD.float()))
            kept[name] = collector.gather()
    write_predictions(stage.run_folder, kept, weights)
