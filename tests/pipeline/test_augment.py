import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from pipeline.augment import RECIPES, find_recipe
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


def test_an_unknown_recipe_is_named_with_the_choices():
    with pytest.raises(
        UserError, match="'cifra'; choose one of: none, shift, cifar, imagenet, strong, strong-cifar, eval"
    ):
        find_recipe("cifra")
