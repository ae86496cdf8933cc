"""Presets: each fits every method, names things that exist, and gives the schedule of its paper."""

import numpy as np
import pytest
import torch
import torchvision

from pipeline.augment import find_recipe
from pipeline.plan import Stream, TrainPlan
from shards.errors import UserError
from shards.index import SAMPLE, Dataset, Split
from train import afg
from train.bbn import BBN
from train.engine.config import PRESETS, Config, Input, Loop, Model, Optim, make_parser, parse, preset
from train.engine.method import Progress
from train.engine.objectives import make_objective
from train.engine.optimisers import check_settings, lr_factor, warnings_about
from train.engine.recipes import usual_settings
from train.erm import ERM
from train.features.commands import stage_parser
from train.sdn import SDN

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


def chosen_by(manifest_preset: str, digits: Dataset) -> Dataset:
    """Return a dataset whose manifest names this preset."""
    return Dataset(digits.root, {**digits.manifest, "preset": manifest_preset}, digits.splits)


def settings_of(
    name: str, digits: Dataset, method: type = BBN, variant: str | None = None, parts: tuple[str, ...] = ()
) -> Config:
    parser = make_parser("x", "", input=Input, model=Model, method=method.Settings, optim=Optim, loop=Loop)
    defaults = usual_settings(chosen_by(name, digits), ["training", *parts, method.name], {}, variant)
    chosen = parser.instantiate(parse(parser, [], defaults))
    return Config(chosen.input, chosen.model, chosen.method, chosen.optim, chosen.loop)


def test_every_dataset_that_can_be_built_has_its_preset():
    papers = {"cifar10", "cifar100", "imagenet-lt", "places-lt", "inat2017", "inat2018"}
    assert set(NAMES) == papers | {"digits", "fashion-mnist", "small", "photos"}


def test_the_manifest_chooses(digits, photos):
    assert (digits.manifest["preset"], photos.manifest["preset"]) == ("digits", "photos")
    with pytest.raises(UserError, match=r"names the preset 'birds'; there are: cifar10, cifar100, digits"):
        preset(chosen_by("birds", digits), "training")


@pytest.mark.parametrize("method", [BBN, ERM, SDN])
@pytest.mark.parametrize(
    ("name", "parts"), [*((name, ()) for name in NAMES), ("photos", ("cpu", "finetune")), ("small", ("finetune",))]
)
def test_what_a_preset_names_exists(name, parts, method, digits):
    settings = settings_of(name, digits, method, parts=parts)
    assert find_recipe(settings.input.augment)
    assert find_recipe(settings.input.eval_augment)
    if settings.model.weights is not None:
        members = torchvision.models.get_model_weights(settings.model.backbone).__members__
        assert settings.model.weights.upper() in members
        settings.model.weights = None  # not to be fetched here
    with torch.device("meta"):
        method(settings, np.array([9, 5, 2]))


@pytest.mark.parametrize("name", NAMES)
def test_the_second_stage_takes_it(name, digits):
    parser = stage_parser("afg", "", afg.Settings)
    settings = parse(parser, [], preset(chosen_by(name, digits), "afg"))
    # Zhang and Xiang 2022, section 5.1: 40 generation epochs; s = 1, and 0.5 on iNaturalist.
    if name in ("cifar100", "imagenet-lt", "inat2017", "inat2018"):
        assert (settings.optim.epochs, settings.optim.weight_decay) == (40, 5e-4)
        assert settings.method.distill == (0.5 if name.startswith("inat") else 1.0)


# BBN's CIFAR recipe, as its code runs it: from a third of the rate, and the lower rate already in epochs 120 and 160.
CIFAR = {1: 0.14 / 3, 2: 0.06, 3: 0.22 / 3, 4: 0.26 / 3, 5: 0.1, 6: 0.1}
CIFAR |= {119: 0.1, 120: 1e-3, 159: 1e-3, 160: 1e-5, 200: 1e-5}
# LDAM's, as its code runs it: from a fifth of the rate, the lower ones from epochs 161 and 181 on; and MiSLAS's.
LDAM = {1: 0.02, 2: 0.04, 5: 0.1, 160: 0.1, 161: 1e-3, 180: 1e-3, 181: 1e-5, 200: 1e-5}
MISLAS = LDAM | {161: 1e-2, 180: 1e-2, 181: 1e-3, 200: 1e-3}
INAT = {1: 0.05, 59: 0.05, 60: 5e-3, 79: 5e-3, 80: 5e-4, 90: 5e-4}
INAT_TWICE = {1: 0.05, 119: 0.05, 120: 5e-3, 159: 5e-3, 160: 5e-4, 180: 5e-4}


# Images: totals of LDAM's recipe at factor 100, and the published lists'. Rates by epoch, counted from 1.
@pytest.mark.parametrize(
    ("name", "method", "variant", "images", "steps", "rates"),
    [
        ("cifar10", BBN, None, 12_406, 200 * 96, CIFAR),
        ("cifar100", BBN, None, 10_847, 200 * 84, CIFAR),
        ("cifar100", ERM, None, 10_847, 200 * 84, CIFAR),
        ("cifar10", ERM, "ldam", 12_406, 200 * 96, LDAM),
        ("cifar100", ERM, "ldam", 10_847, 200 * 84, LDAM),
        ("cifar100", ERM, "mislas", 10_847, 200 * 84, MISLAS),
        ("cifar100", SDN, None, 10_847, 200 * 84, LDAM),
        ("inat2018", BBN, None, 437_513, 90 * 3_418, INAT),
        ("inat2018", BBN, "2x", 437_513, 180 * 3_418, INAT_TWICE),
        ("inat2017", BBN, None, 579_184, 90 * 4_524, INAT),
        ("inat2017", BBN, "2x", 579_184, 180 * 4_524, INAT_TWICE),
        ("imagenet-lt", ERM, None, 115_846, 200 * 226, {1: 0.2, 101: 0.1, 200: 0.2 * (1 + np.cos(np.pi * 0.995)) / 2}),
        ("imagenet-lt", BBN, None, 115_846, 200 * 226, {1: 0.28 / 3, 5: 0.2, 6: 0.2}),
        ("places-lt", ERM, None, 62_500, 30 * 488, {1: 0.01, 9: 0.01, 10: 1e-3, 19: 1e-3, 20: 1e-4, 30: 1e-4}),
    ],
)
def test_the_schedule_is_the_papers(name, method, variant, images, steps, rates, digits):
    settings = settings_of(name, digits, method, variant)
    samples = np.zeros(images, SAMPLE)
    split = Split("train", samples, np.arange(images), np.array([images]), ())
    streams = (Stream("uniform", augment=settings.input.augment),)
    plan = TrainPlan(split, streams, settings.input.batch_size, settings.input.image_size, 0, settings.optim.epochs)
    assert plan.steps_per_epoch * settings.optim.epochs == steps
    for epoch, rate in rates.items():
        assert settings.optim.lr * lr_factor(settings.optim, epoch) == pytest.approx(rate), epoch


@pytest.mark.parametrize(
    ("name", "backbone", "image_size", "batch_size", "weight_decay"),
    [
        ("cifar10", "resnet32", 32, 128, 2e-4),
        ("cifar100", "resnet32", 32, 128, 2e-4),
        ("inat2017", "resnet50", 224, 128, 1e-4),
        ("inat2018", "resnet50", 224, 128, 1e-4),
        ("imagenet-lt", "resnet50", 224, 512, 5e-4),
        ("places-lt", "resnet152", 224, 128, 5e-4),
    ],
)
def test_the_other_settings_are_the_papers(name, backbone, image_size, batch_size, weight_decay, digits):
    settings = settings_of(name, digits)
    assert (settings.model.backbone, settings.input.image_size) == (backbone, image_size)
    assert (settings.input.batch_size, settings.optim.weight_decay) == (batch_size, weight_decay)
    assert settings.optim.momentum == 0.9


@pytest.mark.parametrize(
    ("name", "variant", "title"),
    [
        ("cifar10", "ldam", "CE"),
        ("cifar100", "ldam", "CE"),
        ("fashion-mnist", "ldam", "CE"),
        ("cifar100", "mislas", "mixup"),
    ],
)
def test_variants_are_recipes_of_their_papers(name, variant, title, digits):
    settings = settings_of(name, digits, ERM, variant)
    assert (settings.optim.lr, settings.optim.weight_decay, settings.optim.nesterov) == (0.1, 2e-4, False)
    assert ERM(settings, np.array([9, 5, 2])).title == title


@pytest.mark.parametrize(
    ("name", "scale"), [("cifar100", 1.0), ("imagenet-lt", 1.0), ("inat2017", 0.5), ("inat2018", 0.5)]
)
def test_glag_is_the_papers_own_recipe(name, scale, digits):
    settings = settings_of(name, digits, ERM, "glag")
    assert (settings.optim.weight_decay, settings.optim.schedule) == (5e-4, "cosine")
    assert settings.optim.epochs == (90 if name.startswith("inat") else 200)
    recipe = "cifar+autoaugment+cutout(16)" if name == "cifar100" else "imagenet"
    assert settings.input.augment == recipe
    assert find_recipe(recipe)
    objective = make_objective(settings.method.objective, np.array([9, 5, 2]))
    last = settings.optim.epochs
    assert objective.strength(Progress(last, last, 0, 0)) == scale

    parser = stage_parser("afg", "", afg.Settings)
    second = parse(parser, [], preset(chosen_by(name, digits), "afg", variant="glag"))
    assert (second.method.classifier, second.method.beta, second.method.distill) == ("lws", "adaptive", scale)
    assert (second.optim.epochs, second.optim.weight_decay) == (40, 5e-4)


@pytest.mark.parametrize("name", ["cifar100", "imagenet-lt", "inat2018"])
def test_glag_changes_nothing_for_others(name, digits):
    weight_decay = {"cifar100": 2e-4, "imagenet-lt": 5e-4, "inat2018": 1e-4}
    assert settings_of(name, digits, BBN, None).optim.weight_decay == weight_decay[name]
    second = parse(stage_parser("afg", "", afg.Settings), [], preset(chosen_by(name, digits), "afg"))
    assert (second.method.classifier, second.method.beta) == ("scaled", "select")


@pytest.mark.parametrize("method", [BBN, ERM, SDN])
@pytest.mark.parametrize("name", ["photos", "small"])
def test_pretrained_weights_are_fine_tuned(name, method, digits):
    before, settings = settings_of(name, digits, method), settings_of(name, digits, method, parts=("finetune",))
    optim = settings.optim
    assert (optim.optimizer, optim.schedule, optim.weight_decay) == ("adamw", "cosine", 0.05)
    assert 0.65 <= optim.layer_decay <= 0.9
    assert optim.epochs <= before.optim.epochs / 3
    check_settings(optim, settings.model, False, set())
    assert warnings_about(optim, steps_per_epoch=10) == []
    rates = [lr_factor(optim, epoch, step, 10) for epoch in range(1, optim.epochs + 1) for step in range(10)]
    assert max(rates) == rates[optim.warmup_steps] == 1
    assert rates[0] == pytest.approx(1 / optim.warmup_steps)
    assert settings.model.weights == before.model.weights  # what to start from is not this recipe's


def test_a_variant_does_not_come_over_the_recipe_of_fine_tuning(digits):
    optim = settings_of("small", digits, ERM, "ldam", parts=("finetune",)).optim
    assert (optim.optimizer, optim.lr, optim.weight_decay) == ("adamw", 1e-3, 0.05)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"photos", "small"}))
def test_a_papers_recipe_stays_what_it_is_with_pretrained_weights(name, digits):
    assert settings_of(name, digits, parts=("finetune",)) == settings_of(name, digits)
