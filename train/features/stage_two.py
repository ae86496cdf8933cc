"""What every second stage shares: the run that it starts from, its features, who judges, and what is left behind.

finished run of stage one ─ open_stage ─> Stage: frozen network, features of train, val and test
                                             │  (the launchable file trains a linear classifier)
                           close_stage (train/features/results.py) ─> run folder: model, rows, summary
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from jsonargparse import Namespace
from numpy.typing import NDArray
from torch import Tensor

from pipeline.resident_loader import let_go
from shards.errors import UserError
from shards.index import Dataset
from train.engine import runs
from train.engine.config import (
    Input,
    changed_settings,
    check_seed,
    find_dataset,
    find_dataset_of,
    parse,
    plain_sections,
)
from train.engine.evaluation import test_split
from train.engine.machine import make_accelerator
from train.features import passes
from train.features.bank import FOLDER as BANK
from train.features.bank import bank_ids, feature_bank, weights_digest
from train.features.candidates import IMAGES_TO_CHOOSE, Families, Judge
from train.features.commands import RATES, Program, check_resumed, defaults
from train.features.estimate import estimate_lines
from train.features.gaussians import find_support, fit, fitting_lambda, head_classes, held, no_support
from train.features.mixing import Mixture
from train.features.shift import FOLDER as SHIFTED
from train.features.shift import batch_norms, shifted
from train.networks.model_files import choose_weights, load_model, read_description
from train.networks.networks import BilateralNetwork


@dataclass(frozen=True)
class Stage:
    """A second stage that has begun.

    Attributes:
        name: the launchable file's name.
        config: the resolved settings: method, optim, loop.
        source: the folder of the stage-one run.
        source_title: what tables call that run.
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
        home: the folder that keeps the network's features: that of stage one, or of the shifted network.
        ids: by split, the samples that the held-out and the test features are of, row by row.
        made_of: what made the training features, the text of their bank.json.
    """

    name: str
    config: Any
    source: Path
    source_title: str
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
    home: Path
    ids: dict[str, NDArray[np.int64]]
    made_of: str

    def average(self, gradient: Tensor) -> Tensor:
        """Return the mean of a gradient over all ranks."""
        if self.accelerator.num_processes == 1:
            return gradient
        mean: Tensor = self.accelerator.reduce(gradient, reduction="mean")
        return mean


def open_stage(
    program: Program, argv: list[str] | None, asked: Namespace, begun: list[Path] | None = None
) -> Stage | None:
    """Read the command line, open the run that is named or the newest one, and take or find its features.

    Args:
        program: the launchable file.
        argv: the command line.
        asked: what `peek` found there.
        begun: takes the run's folder as soon as there is one.

    Returns:
        The stage; None where the run to resume is finished.

    Raises:
        UserError: no finished run, a dataset of other classes, or what the loader raises.
    """
    name, parser = program.name, program.parser
    resumed = None
    wanted = find_dataset(asked.data).name if asked.data else None
    if asked.resume:
        resumed = Path(asked.run) if asked.run else runs.newest_run({2}, wanted, name, finished=False)
    about: dict[str, Any] = {}
    saved_settings: dict[str, Any] = {}
    if resumed is not None and (resumed / "config.yaml").exists():
        saved_settings, about = runs.read_begun(resumed, name)
        if (resumed / "summary.json").exists():
            if os.environ.get("RANK", "0") == "0":
                print(f"{resumed} is finished")
            return None
        check_resumed(resumed, asked, about)
    place = asked["from"] or about.get("from")
    source = Path(place) if place else runs.newest_run({1}, dataset=wanted)
    saved = runs.read_config(source)
    if not (source / "summary.json").exists():
        again = f"tailstream train {saved['about']['method']} {runs.resuming(source)}"
        raise UserError(f"{source} is not finished; resume it: {again}")
    first = runs.read_summary(source)  # now: it goes when that run is given more epochs
    if first["stage"] != 1:
        begun_with = saved["about"].get("from", "RUN")
        raise UserError(
            f"{source} is of stage {first['stage']} itself; name the run that it began with: --from {begun_with}"
        )
    dataset = find_dataset_of(source, about if "data" in about else saved["about"], asked.data)
    settings = parse(parser, argv, saved_settings or defaults(program, dataset, asked.variant))
    config = parser.instantiate(settings)
    program.check(config)

    accelerator = make_accelerator(config.loop.precision, config.loop.device, config.loop.threads)
    check_seed(config.loop.seed)
    set_seed(config.loop.seed)
    weights = choose_weights(source, asked.weights or about.get("weights"))
    digest = weights_digest(source, weights)
    network: Any = load_model(source, weights)
    if config.input.branch != "both" and not isinstance(network, BilateralNetwork):
        raise UserError(
            f"input.branch={config.input.branch} names a branch of a bilateral network, and {source} has one branch;"
            " leave it out, or name a run of train/bbn.py with --from"
        )
    if network.classifier.out_features != len(dataset.classes):
        raise UserError(
            f"{source} was trained for {network.classifier.out_features} classes, and {dataset.root} has"
            f" {len(dataset.classes)}; name the dataset it was trained on with --data"
        )
    described = read_description(source)
    if described is not None and described.classes != list(dataset.classes):
        one, other = next(pair for pair in zip(described.classes, dataset.classes, strict=True) if pair[0] != pair[1])
        raise UserError(
            f"{source} was trained for other classes than {dataset.root} has: {one!r} is {other!r} there; name"
            " the dataset it was trained on with --data"
        )
    if saved["about"].get("fingerprint") not in (None, dataset.fingerprint):
        raise UserError(
            f"{dataset.place} does not hold the images that {source} was trained on, and may test on some of them; name"
            " that dataset with --data, or train stage one again"
        )
    test, held_out = test_split(dataset), dataset.splits.get("val")
    watched = "val" if held_out and test.name != "val" else None
    taken = {key: value for key, value in vars(config.input).items() if value is not None}
    shifts = taken.pop("shift_batch_norm", None)
    views, branch = (taken.pop(key) for key in ("views", "branch"))
    shown = ("image_size", "augment", "eval_augment", "fault_limit", "resident_gb", "decode")
    input = Input(**{key: saved["input"][key] for key in shown if key in saved["input"]} | taken)
    moves = (program.shifts(config) if shifts is None else shifts) and bool(batch_norms(network))
    network.to(accelerator.device)
    if asked.dry_run:
        chooses = watched is not None and len(dataset.splits["val"]) >= IMAGES_TO_CHOOSE * len(dataset.classes)
        accelerator.print(f"{program.title} on the {weights} weights of {source} ({dataset.name})")
        for line in estimate_lines(
            None if moves else source,  # a shifted network's features lie nowhere yet
            network,
            dataset,
            input,
            accelerator,
            program.work(config, chooses),
            views=views,
            weights=weights,
        ):
            accelerator.print(line)
        accelerator.print("nothing was written (--dry-run)")
        return None
    folder: list[Path | None] = [None]
    if accelerator.is_main_process:
        named = resumed or (Path(asked.run) if asked.run else None)
        folder = [runs.use_run(named, bool(resumed)) if named else runs.new_run(f"{dataset.name}-{name}")]
    (run_folder,) = broadcast_object_list(folder)
    assert run_folder is not None
    if begun is not None:
        begun.append(run_folder)
    if accelerator.is_main_process:
        variant = asked.variant or about.get("variant")
        about = {"method": name, "dataset": dataset.name, "data": dataset.place, "from": str(source)}
        sections, usual = plain_sections(parser, settings), defaults(program, dataset, variant)
        changed = changed_settings(parser, sections, usual, program.in_title(config))
        about |= {"weights": weights, "variant": variant, "changed": changed}
        runs.write_config(run_folder, {"about": about, **sections})
        (run_folder / "metrics.jsonl").unlink(missing_ok=True)  # written once, at the end
    doing = "; resuming" if resumed else " ->"
    accelerator.print(
        f"{program.title} on the {weights} weights of {source} ({dataset.name}, {len(dataset.classes):,} classes)"
        f"{doing} {run_folder}"
    )

    started, patience = time.perf_counter(), config.loop.stall_minutes
    home, of = source, weights
    if program.shifts(config) if shifts is None else shifts:
        if batch_norms(network):
            network, home = shifted(
                network, run_folder / SHIFTED, dataset, input, accelerator, config.loop.seed, patience
            )
            of = "last"
        else:
            accelerator.print(f"the network of {source} has no batch norm, so that there is nothing to shift")

    def bank(split: str) -> tuple[Tensor, Tensor]:
        seen = views if split == "train" else 0
        if weights_digest(source, weights) != digest:  # features would be kept under weights that did not make them
            raise UserError(f"{source} was trained on while its features were taken; start again when it is finished")
        features_ND, labels_N = feature_bank(home, network, dataset, split, input, accelerator, seen, of, patience)
        let_go(dataset.splits[split], accelerator.device)  # only its features are looked at from now on
        if branch != "both":
            features_ND = features_ND.chunk(2, dim=1)[branch == "rebalancing"]
        return features_ND, labels_N

    features_ND, labels_N = bank("train")
    made_of = (home / BANK / "train" / "bank.json").read_text(encoding="utf-8")
    ids: dict[str, NDArray[np.int64]] = {}
    banks = {}
    for split in filter(None, (watched, test.name)):
        banks[split] = bank(split)
        ids[split] = bank_ids(home, dataset.splits[split])  # now: another stage may take them anew
    judge = Judge(banks.get(watched or ""), banks[test.name], dataset.train_counts)
    if not judge.chooses:
        each = math.floor(10 * judge.images_per_class) / 10  # 9.99 are not 10
        held = f"val has {each:.1f} images a class, and a choice needs {IMAGES_TO_CHOOSE}"
        if not watched:
            held = "results are reported on val, for lack of a test split" if held_out else "there is no val split"
        remedy = "--test-fraction" if held_out and not watched else "a larger --val-fraction"
        accelerator.print(
            f"{held}: nothing is chosen or selected, and each setting is the first of its grid; build the dataset with"
            f" {remedy} to have them chosen"
        )
    if branch != "both" and isinstance(network, BilateralNetwork):
        network = network.single(branch).to(accelerator.device)
    return Stage(
        name,
        config,
        source,
        first["title"],
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
        home,
        ids,
        made_of,
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
    q: Literal[0, 1] = 0,
    weights: str = "none",
    generates: bool = True,
) -> Families:
    """Fit the Gaussians, and return all that makes candidates; arguments as settings of the same names.

    λ is 1 where features are negative. Where nothing is generated, nothing is fitted: that takes minutes and gigabytes.
    """
    accelerator, seed = stage.accelerator, stage.config.loop.seed
    classes = len(stage.dataset.classes)
    # By images: several views of one make no class larger.
    images_C = torch.from_numpy(stage.dataset.train_counts).to(stage.labels_N.device)
    head_C = head_classes(images_C, head_above)
    if generates:
        lam = fitting_lambda(stage.features_ND, lam)
        gaussians = fit(stage.features_ND, stage.labels_N, classes, lam)
        support = find_support(gaussians, k, head_C)
    else:
        gaussians, support = held(stage.features_ND, stage.labels_N, classes), no_support(stage.labels_N, head_C)
    mixture = Mixture(
        stage.features_ND,
        stage.labels_N,
        gaussians,
        support,
        gaussians.counts_C.max() - gaussians.counts_C,
        gamma=gamma,
        chunk=chunk,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        views=max(1, stage.config.input.views),
    )
    salt = [lam, k, gamma, chunk, head_above, stage.config.input.branch, stage.made_of]
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
    return Families(
        stage.network.classifier, mixture, stage.judge, trainer, optim, reference, kind, rates or RATES, q, weights
    )
