from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from pipeline.augment import RECIPES, check_fixed, find_recipe
from pipeline.distort import DISTORTIONS, Distortion
from pipeline.distortions import AutoAugment, Cutout, RandAugment, Strong
from pipeline.loader import open_loader
from pipeline.plan import Stream, TrainPlan
from shards.errors import UserError


def draw(name: str, height: int, width: int, size: int = 32, count: int = 4000):
    heights, widths = np.full(count, height), np.full(count, width)
    return find_recipe(name).draw(np.random.default_rng(1), heights, widths, size)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (32, 32), (37, 91)])
def test_windows_are_never_empty_and_leave_the_image_only_where_the_recipe_says(name, height, width):
    windows, flips = draw(name, height, width)
    assert windows.dtype == np.int32
    assert windows.shape == (4000, 4)
    assert flips.shape == (4000,)
    assert (windows[:, 2:] >= 1).all()
    if not RECIPES[name].pads:
        assert (windows[:, :2] >= 0).all()
        assert (windows[:, 0] + windows[:, 2] <= height).all()
        assert (windows[:, 1] + windows[:, 3] <= width).all()


def test_imagenet_windows_are_distributed_like_torchvisions():
    windows, flips = draw("imagenet", 200, 300)
    image = torch.empty(3, 200, 300)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    for ours, other in zip(windows.T.astype(float), theirs.T.astype(float), strict=True):
        error = np.sqrt(ours.var() / len(ours) + other.var() / len(other))
        assert abs(ours.mean() - other.mean()) < 5 * error
        assert abs(ours.std() / other.std() - 1) < 0.1
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)


def test_imagenet_falls_back_to_the_largest_centred_window():
    windows, _ = draw("imagenet", 10, 500)
    assert (windows[:, 2] == 10).all()
    fallback = windows[windows[:, 3] == 13]  # 10 · 4/3
    assert len(fallback) > 0
    assert (fallback[:, 1] == (500 - 13) // 2).any()


def test_cifar_shifts_by_up_to_four_of_32_pixels_in_each_direction():
    windows, flips = draw("cifar", 32, 32)
    assert (windows[:, 2:] == 32).all()
    for axis in (0, 1):
        assert set(windows[:, axis].tolist()) == set(range(-4, 5))
    assert abs(flips.mean() - 0.5) < 0.05


def test_shift_never_mirrors():
    windows, flips = draw("shift", 16, 16, size=16)
    assert set(windows[:, 0].tolist()) == set(range(-2, 3))
    assert not flips.any()


def test_shifts_scale_with_the_stored_image():
    windows, _ = draw("cifar", 64, 96, size=32)
    assert (windows[:, 2:] == 64).all()
    assert windows[:, 0].min() == -8
    assert windows[:, 1].max() == 16 + 8


@pytest.mark.parametrize(("name", "expected"), [("none", (0, 10, 80, 80)), ("eval", (5, 15, 70, 70))])
def test_evaluation_windows_are_centred_squares(name, expected):
    windows, flips = draw(name, 80, 100)
    assert (windows == expected).all()
    assert not flips.any()


@pytest.mark.parametrize("shorter", [1, 7, 100, 199, 256, 257, 500])
@pytest.mark.parametrize("tall", [False, True])
def test_evaluation_windows_are_torchvisions(shorter, tall):
    for longer in range(shorter, 2 * shorter + 20):
        height, width = (longer, shorter) if tall else (shorter, longer)
        top, left, rows, columns = draw("eval", height, width, size=224, count=1)[0][0].tolist()
        for start, length, stored in ((top, rows, height), (left, columns, width)):
            # Where the resized picture's edges lie in the stored one.
            resized = 256 * stored // shorter
            where = torch.arange(resized).expand(1, resized)
            shown = CenterCrop((1, 224))(where)[0]
            first, behind = shown[0].item() * stored / resized, (shown[-1].item() + 1) * stored / resized
            assert abs(start - first) <= 0.5
            assert abs(start + length - behind) <= 0.5 or length == 1


@pytest.mark.parametrize("longer", range(256, 300))
def test_evaluation_of_pictures_stored_at_256_is_torchvisions_bit_by_bit(longer):
    picture = torch.from_numpy(np.random.default_rng(longer).integers(0, 256, (3, 256, longer), dtype=np.uint8))
    top, left, height, width = draw("eval", 256, longer, size=224, count=1)[0][0].tolist()
    expected = Compose([Resize(256), CenterCrop(224)])(picture)
    assert torch.equal(picture[:, top : top + height, left : left + width], expected)


def test_a_recipe_is_a_crop_and_what_follows_it():
    recipe = find_recipe("imagenet + rand(2, 9)+cutout( 16)")
    assert recipe.name == "imagenet+rand(2,9)+cutout(16)"
    assert recipe.distortions == (RandAugment(2, 9), Cutout(16))
    assert recipe.draw is RECIPES["imagenet"].draw
    assert not recipe.pads
    assert find_recipe("cifar+trivial").pads
    assert find_recipe("strong+cutout(8)").distortions == (Strong(), Cutout(8))
    assert find_recipe("shift+autoaugment").distortions == (AutoAugment(),)
    for name, known in RECIPES.items():
        assert find_recipe(name) == known


def test_a_centre_of_any_share_and_a_cubic_filter():
    windows, flips = draw("centre(0.9)", 100, 201)
    assert (windows == [5, 55, 90, 90]).all()
    assert not flips.any()
    recipe = find_recipe("centre( 0.95 )+bicubic+cutout(16)")
    assert (recipe.name, recipe.centre_share, recipe.interpolation) == (
        "centre(0.95)+bicubic+cutout(16)",
        0.95,
        "bicubic",
    )
    assert recipe.distortions == (Cutout(16),)
    assert find_recipe("imagenet+rand(2,9)+bicubic").name == "imagenet+bicubic+rand(2,9)"
    assert find_recipe("eval+bicubic").centre_share == find_recipe("eval").centre_share
    assert find_recipe("centre(1)").centre_share == 1
    assert {find_recipe(name).interpolation for name in RECIPES} == {"bilinear"}


def test_each_distortion_has_parameters_of_its_own_after_the_same_crops():
    def drawn(recipe: str) -> tuple:
        generator, sides = np.random.default_rng(3), np.full(9, 40)
        windows, flips = find_recipe(recipe).draw(generator, sides, sides, 32)
        return windows, flips, find_recipe(recipe).draw_distortions(generator, 9, 32)

    windows, flips, rows = drawn("cifar+strong+rand(3,9)+cutout(16)")
    assert rows.dtype.names == ("strong", "rand(3,9)", "cutout(16)")
    assert rows["rand(3,9)"].shape == (9, 3)
    assert rows["cutout(16)"].shape == (9, 4)
    # What comes later changes nothing of what comes before.
    np.testing.assert_array_equal(windows, drawn("cifar")[0])
    np.testing.assert_array_equal(flips, drawn("cifar")[1])
    assert drawn("cifar")[2] is None
    np.testing.assert_array_equal(rows["strong"], drawn("strong-cifar")[2]["strong"])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "cifra",
            "no augmentation is called 'cifra'; choose one of: none, shift, cifar, imagenet, strong, strong-cifar,"
            " eval, centre(share), which any of these may follow: +bicubic, +autoaugment, +cutout(side), +rand(n,m),"
            " +strong, +trivial"
            " (nearest: cifar)",
        ),
        ("rand(2,9)", "no augmentation is called 'rand(2,9)'; choose one of: none"),
        ("", "no augmentation is called ''; choose one of: none"),
        ("centre(1.1)", "no augmentation is called 'centre(1.1)'; choose one of: none"),
        ("centre(0)", "no augmentation is called 'centre(0)'; choose one of: none"),
        ("bicubic", "no augmentation is called 'bicubic'; choose one of: none"),
        (
            "cifar+autoagment",
            "no distortion is called 'autoagment'; choose one of: autoaugment, cutout(side), rand(n,m), strong, trivial"
            " (nearest: autoaugment)",
        ),
        ("cifar+", "no distortion is called ''; choose one of: autoaugment"),
        ("cifar+imagenet", "no distortion is called 'imagenet'; choose one of:"),
        ("cifar+rand(2,9", "no distortion is called 'rand(2,9'; choose one of:"),
        ("cifar+../mine.darken(0.5)", "the distortion '../mine.darken(0.5)' cannot be imported ("),
        ("cifar+rand(2)", "the distortion 'rand(2)' has 1 argument and is written rand(n,m)"),
        ("cifar+rand", "the distortion 'rand' has 0 arguments and is written rand(n,m)"),
        ("cifar+trivial(3)", "the distortion 'trivial(3)' has 1 argument and is written trivial"),
        (
            "cifar+rand(2,9.5)",
            "the distortion 'rand(2,9.5)' is written rand(n,m), and m='9.5' is not a whole number",
        ),
        ("cifar+rand(0,9)", "rand(0,9) has n=0; it must be at least 1 operation"),
        ("cifar+rand(2,31)", "rand(2,31) has m=31; the level must be from 0 to 30"),
        ("cifar+cutout(1)", "cutout(1) hides nothing; its side must be at least 2 pixels"),
        ("cifar+trivial+trivial", "the augmentation 'cifar+trivial+trivial' has trivial twice; leave one out"),
        ("strong+strong", "the augmentation 'strong+strong' has strong twice; leave one out"),
    ],
)
def test_a_recipe_that_is_none_is_named_with_the_choices(recipe, message):
    with pytest.raises(UserError) as raised:
        find_recipe(recipe)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_distortion_of_ones_own_may_have_its_annotations_as_text(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "annotated.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from pipeline.distort import Distortion\n"
        "@dataclass(frozen=True)\n"
        "class Annotated(Distortion):\n"
        "    name = 'annotated'\n"
        "    least: float\n"
        "    draw = apply = None\n"
    )
    monkeypatch.setattr("pipeline.distort.DISTORTIONS", dict(DISTORTIONS))
    (distortion,) = find_recipe("cifar+annotated.annotated(0.5)").distortions
    assert distortion.least == 0.5
    with pytest.raises(UserError, match=r"least='much' is not a number"):
        find_recipe("cifar+annotated.annotated(much)")


@pytest.fixture
def darken():
    """A distortion from outside: one class, and nothing else knows of it."""

    @dataclass(frozen=True)
    class Darken(Distortion):
        name = "darken"
        least: float

        def draw(self, generator, count, image_size):
            return generator.uniform(self.least, 1, count).astype(np.float32)

        def apply(self, images_BHWC, rows_B):
            return (images_BHWC * torch.from_numpy(rows_B.copy()).view(-1, 1, 1, 1)).byte()

    yield
    del DISTORTIONS["darken"]


@pytest.mark.parametrize("kind", ["dali", "resident", "torch"])
def test_a_distortion_from_outside_is_one_class(digits, darken, kind):
    assert find_recipe("shift+darken(0.25)").name == "shift+darken(0.25)"
    streams = (Stream("s", augment="shift+darken(0.25)+cutout(4)"), Stream("t", augment="shift"))
    plan = TrainPlan(digits.splits["train"], streams, 8, 16, seed=1, epochs=1)
    dark, _ = plan.draws(0)
    with open_loader(plan, kind, threads=0 if kind == "torch" else 1) as loader:
        shown = next(loader)["s"].images_BHWC
    plain = replace(plan, specs=(Stream("s", augment="shift"),))
    with open_loader(plain, "torch", threads=0) as loader:
        images = next(loader)["s"].images_BHWC
    factors = torch.from_numpy(dark.distortions_B["darken(0.25)"].copy())
    expected = (images * factors.view(-1, 1, 1, 1)).byte()
    for image, box in zip(expected, dark.distortions_B["cutout(4)"], strict=True):
        image[box[0] : box[2], box[1] : box[3]] = 128
    assert torch.equal(shown, expected)


@pytest.mark.parametrize("recipe", ["cifar", "imagenet", "none+cutout(4)", "strong"])
def test_an_evaluation_shows_each_image_in_one_way(recipe):
    with pytest.raises(UserError, match=r"input\.eval_augment="):
        check_fixed(recipe)
    for fixed in ("none", "eval", "centre(0.95)+bicubic"):
        check_fixed(fixed)
