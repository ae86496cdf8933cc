"""What every second stage shares: the run that it starts from, its features, who judges, and what is left behind.

finished run of stage one ─ open_stage ─> Stage: frozen network, features of train, val and test
                                             │  (the launchable file trains a linear classifier)
                                        close_stage ─> run folder: model, rows, summary
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from analysis.metrics import summarize
from pipeline.loader import LoaderKind
from shards.errors import UserError
from shards.index import Dataset
from train.engine import runs
from train.engine.config import Input, find_dataset, make_parser, parse, peek, plain_sections, preset
from train.engine.evaluation import collect_faults, describe, device_name, test_split, write_results
from train.engine.launch import make_accelerator
from train.engine.predictions import Collector, write_predictions
from train.features.bank import bank_ids, feature_bank
from train.features.candidates import Judge
from train.features.classifiers import FEATURES_PER_BLOCK, ClassifierOptim, measure
from train.networks.model_files import choose_weights, load_model, save_model


@dataclass
class Extraction:
    """How features are taken; size and recipe of the images are stage one's.

    Attributes:
        batch_size: images at a time.
        loader: dali, torch, or auto.
        threads: decoding threads.
        views: how often each training image is taken with stage one's training recipe; 0: once, as in evaluation.
    """

    views: NonNegativeInt = 0
    batch_size: PositiveInt = 256
    loader: LoaderKind = "auto"
    threads: PositiveInt = 2


@dataclass
class Loop:
    """How the run goes about it.

    Attributes:
        seed: of everything random.
        precision: of the feature extraction: no (float32), bf16, fp16, or auto (what accelerate was told).
    """

    seed: NonNegativeInt = 0
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"


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
        watched: the name of the split that may choose, or None.
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


def stage_parser(name: str, description: str, settings: type) -> ArgumentParser:
    """Make the parser of a second stage; `settings` is its own section, `method`."""
    parser = make_parser(
        f"train/{name}.py", description, input=Extraction, method=settings, optim=ClassifierOptim, loop=Loop
    )
    parser.add_argument("--variant", type=str | None, help="of the dataset's preset, such as glag")
    parser.add_argument("--from", type=str | None, help="the stage-one run (default: the newest finished one)")
    parser.add_argument(
        "--weights",
        type=Literal["last", "selected"] | None,
        help="of that run (default: those of the epoch that val chose, where it chose one)",
    )
    return parser


def open_stage(
    name: str,
    title: str,
    parser: ArgumentParser,
    argv: list[str] | None,
    check: Callable[[Any], None] = lambda config: None,
) -> Stage:
    """Read the command line, open the run that is named or the newest one, and take or find its features.

    Args:
        name: the launchable file's name.
        title: what the first line calls the stage.
        parser: from `stage_parser`.
        argv: the command line.
        check: raises UserError for settings that cannot be used together, before anything is made.

    Raises:
        UserError: no finished run, a dataset of other classes, or what the loader raises.
    """
    asked = peek(parser, argv)
    wanted = find_dataset(asked.data).name if asked.data else None
    source = Path(asked["from"]) if asked["from"] else runs.newest_run({1}, dataset=wanted)
    saved = runs.read_config(source)
    if not (source / "summary.json").exists():
        raise UserError(f"{source} is not finished; resume it: train/{saved['about']['method']}.py --resume")
    dataset = find_dataset(asked.data or saved["about"]["data"])
    settings = parse(parser, argv, preset(dataset, name, variant=asked.variant))
    config = parser.instantiate(settings)
    check(config)

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
        folder = [runs.use_run(Path(asked.run), False) if asked.run else runs.new_run(f"{dataset.name}-{name}")]
    (run_folder,) = broadcast_object_list(folder)
    assert run_folder is not None
    if accelerator.is_main_process:
        about = {"method": name, "dataset": dataset.name, "data": dataset.place, "from": str(source)}
        about["weights"] = weights
        runs.write_config(run_folder, {"about": about, **plain_sections(parser, settings)})
    accelerator.print(
        f"{title} on the {weights} weights of {source} ({dataset.name}, {len(dataset.classes):,} classes) ->"
        f" {run_folder}"
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
        watched,
        test.name,
        started,
        weights,
        input,
    )


def close_stage(stage: Stage, title: str, linear: nn.Linear, rows: list[dict[str, Any]], **more: Any) -> None:
    """Evaluate the classifier on the test split and leave a finished run folder.

    Args:
        stage: from `open_stage`.
        title: what tables call the stage; stage one's title comes before it.
        linear: the trained classifier, in the place of stage one's.
        rows: a row of numbers per epoch.
        more: further keys of summary.json.
    """
    final, _ = measure(linear, stage.judge.test)
    seconds = time.perf_counter() - stage.started
    summary = {
        "method": stage.name,
        "title": f"{runs.read_summary(stage.source)['title']} + {title}",
        "stage": 2,
        "from": stage.source.resolve().name,
        "from_weights": stage.weights,
        "dataset": stage.dataset.name,
        "seed": stage.config.loop.seed,
        "epochs": stage.config.optim.epochs,
        "last": summarize(final, stage.dataset.train_counts),
        "selected": None,
        "selected_on": None,
        "evaluated_on": stage.tested,
        **more,
        "images_per_second": sum(row["images_per_second"] for row in rows) / len(rows) if rows else None,
        "seconds": seconds,
        "faults": collect_faults(stage.dataset, stage.accelerator),
        "environment": runs.environment(device_name(stage.accelerator.device), stage.accelerator.num_processes),
        "command": runs.command(),
    }
    if stage.accelerator.is_main_process:
        stage.network.classifier = linear
        save_model(stage.network, stage.run_folder)
        epochs = {"last": stage.config.optim.epochs}
        describe(stage.run_folder, stage.network, stage.dataset, stage.input, summary, epochs)
        keep_predictions(stage, linear)
        for row in rows:
            runs.append_row(stage.run_folder, {**row, "seconds": seconds})
        write_results(stage.run_folder, summary, final, stage.dataset)


@torch.no_grad()
def keep_predictions(stage: Stage, linear: nn.Linear) -> None:
    """Write predictions.npz: what a classifier says of the features of test, and of val where there is one."""
    kept = {}
    for name, bank in ((stage.tested, stage.judge.test), (stage.watched, stage.judge.watched)):
        if name is not None and bank is not None:
            collector = Collector(linear.out_features, logits=name != stage.tested)
            ids_N = bank_ids(stage.source, stage.dataset.splits[name])
            for ids_B, features_BD, labels_B in zip(
                np.split(ids_N, range(FEATURES_PER_BLOCK, len(ids_N), FEATURES_PER_BLOCK)),
                *(part.split(FEATURES_PER_BLOCK) for part in bank),
                strict=True,
            ):
                collector.add(ids_B, labels_B, linear(features_BD.float()))
            kept[name] = collector.gather()
    write_predictions(stage.run_folder, kept)
