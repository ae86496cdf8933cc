"""Settings that follow from the data and the machine, where neither the command line nor --config gives them.

    training  <  cpu  <  finetune  <  adapt  <  METHOD     parts of the dataset's preset, later ones over earlier ones
                  │          │           └─ where it is adapters that are trained (model.adapt)
                  │          └─ where the network starts from pretrained weights: the recipe of fine-tuning
                  └─ without a GPU: what a CPU can train
    fit: {steps_per_epoch, steps, most_epochs}          of a preset for any images; those of papers have none
        input.batch_size    halved until an epoch has so many steps
        optim.lr            in proportion to a batch that the preset itself made smaller
        optim.epochs        raised until the run has so many steps, up to most_epochs

What is chosen is a default like any other of the preset: it is printed, and saved with the run, which resumes with it.
"""

import os
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from shards.index import Dataset
from train.engine.config import parse, preset, split_config
from train.engine.model import with_own_view
from train.engine.optimisers import Optim

LEAST_BATCH = 8
# What is copied into `about` of a run's configuration.
Sections = dict[str, dict[str, Any]]


@dataclass
class Choice:
    """The settings of a run that begins.

    Attributes:
        settings: as parsed.
        parts: of the preset, in the order in which they were taken.
        fitted: what was chosen beside them, by section.
        notes: lines for the user.
        weights_by_preset: whether the preset names the pretrained weights, and not the user.
    """

    settings: Namespace
    parts: list[str]
    fitted: Sections = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weights_by_preset: bool = False

    def usual(self, dataset: Dataset, variant: str | None) -> Sections:
        """Return the defaults that the settings are compared with."""
        return usual_settings(dataset, self.parts, self.fitted, variant)


def usual_settings(dataset: Dataset, parts: list[str], fitted: Sections, variant: str | None) -> Sections:
    """Return the preset's parts, with what was fitted over them, as defaults of the parser."""
    merged: Sections = preset(dataset, *parts, variant=variant)
    merged.pop("fit", None)
    for section, values in fitted.items():
        merged[section] = merged.get(section, {}) | values
    return merged


def choose(
    parser: ArgumentParser,
    argv: list[str] | None,
    dataset: Dataset,
    method: str,
    variant: str | None,
    *,
    gpu: bool,
    missing: str | None = None,
) -> Choice:
    """Choose the settings of a run from the preset, the number of images and the machine.

    Args:
        parser: of the command line.
        argv: the command line, which wins over all that is chosen.
        dataset: gives the preset and the number of images.
        method: the method's name.
        variant: of the preset.
        gpu: whether there is one to train on.
        missing: why the preset's pretrained weights are out of reach; None as long as they are not asked for.

    Raises:
        UserError: what `parse` and `preset` raise.
    """
    given = given_settings(parser, argv)
    full = preset(dataset, "training", method, variant=variant)
    weights = given.get("model.weights", full.get("model", {}).get("weights"))
    tuned = ["finetune", *["adapt"] * (given.get("model.adapt") is not None)] if weights and not missing else []
    parts = ["training", *["cpu"] * (not gpu), *tuned, method]
    merged = preset(dataset, *parts, variant=variant)
    choice = Choice(Namespace(), parts, weights_by_preset=weights is not None and "model.weights" not in given)
    if missing:
        choice.fitted["model"] = {"weights": None}
    fit = merged.pop("fit", None)
    settings = parse(parser, _plain(argv), choice.usual(dataset, variant))
    # One of timm's models is shown pictures as it was in its pretraining.
    before = choice.usual(dataset, variant).get("input", {})
    view = with_own_view({"input": before}, settings.model.backbone)["input"]
    changed = {key: value for key, value in view.items() if value != before.get(key)}
    if changed:
        choice.fitted["input"] = changed
        choice.notes.append(
            f"{settings.model.backbone} was pretrained on pictures of {view['image_size']}×{view['image_size']} pixels,"
            f" shown as {view['eval_augment']}: so are yours, where the settings say nothing else"
        )
    settled = given | {f"input.{key}": value for key, value in changed.items()}
    if not gpu and (said := _changed_by("cpu", dataset, parts, variant, settled)):
        choice.notes.append(f"no GPU: {said}")
    if fit:
        recipe = preset(dataset, *(part for part in parts if part != "cpu"), variant=variant)
        _fit(choice, settings, fit, recipe["input"]["batch_size"], given, images=len(dataset.splits["train"]))
    choice.settings = parse(parser, argv, choice.usual(dataset, variant))
    if missing:
        backbone, images = choice.settings.model.backbone, len(dataset.splits["train"])
        choice.notes.append(
            f"warning: {backbone} starts from random weights, which take many times the steps and learn less from"
            f" {images:,} images, because its pretrained ones are out of reach: {missing}"
        )
    return choice


def resumed_choice(
    parser: ArgumentParser, argv: list[str] | None, saved: Sections, about: dict[str, Any], method: str
) -> Choice:
    """Return the settings of a run that is resumed: those it was begun with, under the command line's."""
    began = about.get("preset", {"parts": ["training", method], "fitted": {}})  # older runs do not say
    return Choice(parse(parser, argv, saved), began["parts"], began["fitted"])


def given_settings(parser: ArgumentParser, argv: list[str] | None) -> dict[str, Any]:
    """Return the settings that the command line or its --config names, {"section.key": value}, and no default."""
    return dict(parser.parse_args(_plain(argv), defaults=False).items())


def chosen_settings(parser: ArgumentParser, argv: list[str] | None) -> set[str]:
    """Return the names of the given settings that somebody chose.

    A file that names all of the optimiser's, as --print_config writes it, is a whole recipe, of which some are unused.
    """
    given = given_settings(parser, argv)
    if all(f"optim.{setting.name}" in given for setting in fields(Optim)):
        given = given_settings(parser, split_config(_plain(argv))[1])
    return set(given)


def _plain(argv: list[str] | None) -> list[str]:
    return [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--print_config")]


def _changed_by(part: str, dataset: Dataset, parts: list[str], variant: str | None, settled: dict[str, Any]) -> str:
    """Say what a part of the preset changes that nothing else settles."""
    without = preset(dataset, *(p for p in parts if p != part), variant=variant)
    changes = [
        f"{section}.{key} {value} instead of {without.get(section, {}).get(key)}"
        for section, values in preset(dataset, *parts, variant=variant).items()
        for key, value in values.items()
        if section != "fit" and value != without.get(section, {}).get(key) and f"{section}.{key}" not in settled
    ]
    return ", ".join(changes)


def _fit(
    choice: Choice, settings: Namespace, fit: dict[str, int], usual_batch: int, given: dict[str, Any], images: int
) -> None:
    """Choose batch, rate and epochs that fit the number of images; the rate is meant for batches of `usual_batch`."""
    batch, epochs = settings.input.batch_size, settings.optim.epochs
    if "input.batch_size" not in given:
        shares = 2 * int(os.environ.get("WORLD_SIZE", "1")) * settings.optim.accumulate
        while images // batch < fit["steps_per_epoch"] and batch // 2 >= LEAST_BATCH and batch // 2 % shares == 0:
            batch //= 2
        # In proportion for SGD (Goyal et al. 2017), by the root for adaptive methods (Malladi et al. 2022).
        scale = (batch / usual_batch) ** (0.5 if settings.optim.optimizer == "adamw" else 1)
        if batch != settings.input.batch_size:
            choice.fitted.setdefault("input", {})["batch_size"] = batch
        if scale != 1 and "optim.lr" not in given:
            choice.fitted.setdefault("optim", {})["lr"] = settings.optim.lr * scale
    steps = max(1, images // batch)
    if "optim.epochs" not in given:
        wanted = min(fit["most_epochs"], -(-fit["steps"] // steps))
        if wanted > epochs:
            epochs = choice.fitted.setdefault("optim", {})["epochs"] = wanted
    length = f"{epochs} epoch{'s' * (epochs > 1)} of {steps} step{'s' * (steps > 1)} of {batch} images"
    choice.notes.append(f"{images:,} images: {length}, {epochs * steps:,} steps in all")
    noise = "finetune" not in choice.parts
    if noise and "model" not in choice.fitted and epochs * steps < fit["steps"]:
        choice.notes.append(
            f"warning: {images:,} images are few to learn from random weights: {fit['steps']:,} steps are sensible;"
            " start from pretrained ones (--model.weights default, or a file)"
        )
