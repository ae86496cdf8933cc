"""Settings that follow from the number of images and from the machine."""

import numpy as np
import pytest
import yaml

from shards.index import SAMPLE, Dataset, Split
from train.bbn import BBN
from train.engine.config import Input, Loop, Model, Optim, make_parser, parse, preset
from train.engine.recipes import choose


def photographs(digits: Dataset, images: int, name: str = "photos") -> Dataset:
    """A dataset of so many training images whose preset has this name."""
    split = Split("train", np.zeros(images, SAMPLE), np.arange(images), np.array([images]), ())
    return Dataset(digits.root, {**digits.manifest, "preset": name}, {"train": split})


def chosen(dataset: Dataset, *argv: str, gpu: bool = False, missing: str | None = None):
    parser = make_parser("x", "", input=Input, model=Model, method=BBN.Settings, optim=Optim, loop=Loop)
    return choose(parser, list(argv), dataset, "bbn", None, gpu=gpu, missing=missing)


@pytest.mark.parametrize(
    ("images", "gpu", "backbone", "size", "batch", "epochs"),
    [
        (83, False, "resnet18", 128, 8, 60),  # 600 steps: as many as 60 epochs have
        (83, True, "resnet50", 224, 8, 60),
        (1_119, False, "resnet18", 128, 32, 59),  # 34 steps an epoch, 2,006 in all
        (30_000, True, "resnet50", 224, 32, 30),
    ],
)
def test_a_folder_is_fine_tuned_with_as_many_steps_as_are_sensible(digits, images, gpu, backbone, size, batch, epochs):
    choice = chosen(photographs(digits, images), gpu=gpu)
    settings = choice.settings
    assert (settings.model.backbone, settings.model.weights) == (backbone, "default")
    assert (settings.input.image_size, settings.input.batch_size) == (size, batch)
    assert (settings.optim.optimizer, settings.optim.epochs) == ("adamw", epochs)
    assert settings.optim.lr == pytest.approx(1e-4 * (batch / 32) ** 0.5)
    assert choice.weights_by_preset
    steps = images // batch
    assert f"{images:,} images: {epochs} epochs of {steps} steps of {batch} images" in choice.notes[-1]
    assert any("no GPU: " in note for note in choice.notes) != gpu
    assert not any("warning" in note for note in choice.notes)


def test_without_pretrained_weights_it_says_what_that_costs(digits):
    choice = chosen(photographs(digits, 83), missing="no network")
    assert choice.settings.model.weights is None
    assert (choice.settings.optim.optimizer, choice.settings.optim.epochs) == ("sgd", 400)
    assert choice.settings.optim.lr == pytest.approx(0.05 * 8 / 128)
    (warning,) = [note for note in choice.notes if note.startswith("warning: ")]
    assert "resnet18 starts from random weights" in warning
    assert "83 images" in warning
    assert warning.endswith("out of reach: no network")


@pytest.mark.parametrize(("images", "few", "epochs"), [(3_000, True, 400), (3_500, False, 371), (50_000, False, 90)])
def test_too_few_images_for_random_weights_are_named(digits, images, few, epochs):
    choice = chosen(photographs(digits, images), "--model.weights", "null", gpu=True)
    assert not choice.weights_by_preset
    assert choice.settings.optim.epochs == epochs
    assert any("are few to learn from random weights: 10,000 steps" in note for note in choice.notes) == few


def test_what_is_given_wins_and_the_rest_fits_it(digits, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"optim": {"epochs": 7}, "model": {"backbone": "resnet34"}}))
    dataset = photographs(digits, 83)
    settings = chosen(dataset, "--config", str(tmp_path / "mine.yaml"), "--optim.lr", "0.5").settings
    assert (settings.optim.epochs, settings.model.backbone, settings.optim.lr) == (7, "resnet34", 0.5)
    assert settings.input.batch_size == 8
    for config in (["--config", str(tmp_path / "mine.yaml")], [f"--config={tmp_path}/mine.yaml"]):
        assert chosen(dataset, "--optim.epochs", "5", *config).settings.optim.epochs == 5
    settings = chosen(dataset, "--input.batch_size", "64", "--input.image_size", "96").settings
    assert (settings.input.batch_size, settings.input.image_size, settings.optim.epochs) == (64, 96, 60)
    assert settings.optim.lr == 1e-4


def test_a_note_about_the_cpu_names_no_size_that_the_model_sets(digits):
    choice = chosen(photographs(digits, 1_119), "--model.backbone", "timm/vit_tiny_patch16_224")
    assert choice.settings.input.image_size == 224
    assert any("pictures of 224×224 pixels" in note for note in choice.notes)
    assert not any("image_size 128" in note for note in choice.notes)


def test_adapters_have_a_recipe_of_their_own(digits):
    dataset = photographs(digits, 30_000)
    optim = chosen(dataset, "--model.adapt", "lora", "--model.backbone", "timm/vit_small_patch16_224").settings.optim
    assert (optim.optimizer, optim.lr, optim.weight_decay, optim.schedule) == ("sgd", 0.0025, 5e-4, "cosine")
    assert (optim.layer_decay, optim.warmup_steps, optim.warmup_epochs, optim.epochs) == (None, None, 0, 10)
    assert chosen(dataset, "--model.adapt", "lora", missing="no network").settings.optim.weight_decay == 1e-4


def test_a_batch_stays_one_that_processes_can_share(digits, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert chosen(photographs(digits, 83)).settings.input.batch_size == 16  # a pair for each
    assert chosen(photographs(digits, 83), "--optim.accumulate", "2").settings.input.batch_size == 32


def test_small_pictures_fit_too(digits):
    choice = chosen(photographs(digits, 500, "small"), gpu=True)
    assert (choice.settings.input.batch_size, choice.settings.optim.epochs) == (32, 267)  # 15 steps, 4,005 in all
    choice = chosen(photographs(digits, 12_406, "small"))
    assert choice.fitted == {}


@pytest.mark.parametrize("name", ["cifar10", "digits", "inat2018", "imagenet-lt"])
def test_presets_of_papers_are_left_alone(digits, name):
    dataset = photographs(digits, 83, name)
    parser = make_parser("x", "", input=Input, model=Model, method=BBN.Settings, optim=Optim, loop=Loop)
    choice = chosen(dataset)
    assert choice.settings.as_dict() == parse(parser, [], preset(dataset, "training", "bbn")).as_dict()
    assert choice.notes == []


def test_print_config_shows_what_was_chosen(digits, capsys):
    with pytest.raises(SystemExit):
        chosen(photographs(digits, 83), "--print_config")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["optim"]["epochs"], shown["input"]["batch_size"]) == (60, 8)
