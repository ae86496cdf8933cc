import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torchvision.transforms import functional as theirs

from pipeline.distortions.strong import DISTORTION, Strong

distort = Strong().apply
COLOURS = ("brightness", "contrast", "saturation", "hue")


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    """Cuts of a photograph, and one picture of noise, which has every colour."""
    photograph = load_sample_images().images[1]
    generator = np.random.default_rng(count)
    cuts = [generator.integers(0, 256, (height, width, 3), dtype=np.uint8)]
    for _ in range(count - 1):
        top, left = generator.integers(0, photograph.shape[0] - height), generator.integers(0, 640 - width)
        cuts.append(photograph[top : top + height, left : left + width])
    return torch.from_numpy(np.stack(cuts))


def draw(generator: np.random.Generator, count: int) -> np.ndarray:
    return Strong().draw(generator, count, 32)


def rows(count: int, **fields) -> np.ndarray:
    distortions = np.zeros(count, dtype=DISTORTION)
    distortions["order"] = np.arange(4)
    distortions["brightness"] = distortions["contrast"] = distortions["saturation"] = 1
    for name, value in fields.items():
        distortions[name] = value
    return distortions


def torchvisions(images_BHWC: torch.Tensor, distortions_B: np.ndarray) -> torch.Tensor:
    """The same with torchvision, an image after the other, in float, which it does not round in between."""
    shown = []
    for image_HWC, row in zip(images_BHWC, distortions_B, strict=True):
        image = image_HWC.permute(2, 0, 1).float() / 255
        for name in np.array(COLOURS)[row["order"]]:
            image = getattr(theirs, f"adjust_{name}")(image, float(row[name]))
        if row["grey"]:
            image = theirs.rgb_to_grayscale(image, 3)
        if row["sigma"]:
            reach = min(int(np.ceil(3 * row["sigma"])), min(image.shape[1:]) - 1)
            image = theirs.gaussian_blur(image, [2 * reach + 1] * 2, [float(row["sigma"])] * 2)
        shown.append((255 * image).permute(1, 2, 0))
    return torch.stack(shown)


def test_a_row_that_asks_for_nothing_changes_no_bit():
    images = torch.arange(256, dtype=torch.uint8).repeat(3)[: 16 * 16 * 3].view(1, 16, 16, 3).repeat(8, 1, 1, 1)
    distortions = rows(8)
    distortions[3] = draw(np.random.default_rng(0), 1)[0]
    distortions["sigma"][3] = 1
    shown = distort(images, distortions)
    assert shown.dtype == torch.uint8
    unchanged = [bool(torch.equal(ours, given)) for ours, given in zip(shown, images, strict=True)]
    assert unchanged == [True] * 3 + [False] + [True] * 4
    assert torch.equal(images[3], images[0])  # the pictures that were given stay as they are


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, value) for name in COLOURS[:3] for value in (0.0, 0.6, 1.4, 3.0)],
        *[("hue", value) for value in (-0.5, -0.1, 0.05, 0.1, 0.5)],
        ("grey", True),
        *[("sigma", value) for value in (0.1, 0.4, 1.0, 2.0)],
    ],
)
def test_each_step_is_torchvisions_within_a_grey_level(field, value):
    images, distortions = pictures(3, 40, 56), rows(3, **{field: value})
    ours, expected = distort(images, distortions).float(), torchvisions(images, distortions)
    assert (ours - expected).abs().max() <= 0.51  # half a level of rounding


@pytest.mark.parametrize(("height", "width"), [(224, 224), (32, 32), (30, 47)])
def test_drawn_distortions_are_torchvisions_within_a_grey_level(height, width):
    count = 12 if height == 224 else 120
    images, distortions = pictures(count, height, width), draw(np.random.default_rng(2), count)
    ours, expected = distort(images, distortions).float(), torchvisions(images, distortions)
    assert (ours - expected).abs().max() <= 1
    assert (ours - expected).abs().mean() <= 0.26  # rounding alone costs a quarter


def test_a_blur_of_three_sigmas_is_the_usual_kernel_of_a_tenth_of_the_picture():
    images, distortions = pictures(2, 224, 224), rows(2, sigma=[0.5, 2.0])
    ours = distort(images, distortions).float()
    for image, given, sigma in zip(ours, images, (0.5, 2.0), strict=True):
        wide = theirs.gaussian_blur(given.permute(2, 0, 1).float(), [23, 23], [sigma, sigma])
        assert (image - wide.permute(1, 2, 0)).abs().max() <= 2


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_pictures_smaller_than_the_blur_reaches(size):
    images, distortions = pictures(4, size, size), draw(np.random.default_rng(1), 4)
    distortions["sigma"] = 2
    ours, expected = distort(images, distortions).float(), torchvisions(images, distortions)
    assert ours.shape == (4, size, size, 3)
    assert (ours - expected).abs().max() <= 1


def test_what_becomes_of_an_image_does_not_depend_on_the_others():
    images, distortions = pictures(150, 24, 24), draw(np.random.default_rng(5), 150)
    together = distort(images, distortions)
    alone = torch.cat([distort(images[i : i + 1], distortions[i : i + 1]) for i in range(150)])
    assert torch.equal(together, alone)


def test_one_image_and_none():
    images = pictures(1, 8, 8)
    assert distort(images[:0], rows(0)).shape == (0, 8, 8, 3)
    bright = distort(images, rows(1, brightness=2))
    assert torch.equal(bright, (images.int() * 2).clamp(max=255).byte())


def test_any_memory_layout_is_taken():
    images, distortions = pictures(4, 20, 20), draw(np.random.default_rng(3), 4)
    mirrored = images.flip(2)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(distort(planar, distortions), distort(images, distortions))
    assert torch.equal(distort(mirrored, distortions).flip(2), distort(images, distortions))


def test_grey_pictures_stay_grey_when_the_hue_turns():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(distort(grey, rows(1, hue=0.3, saturation=1.4)), grey)


def test_frequencies_and_strengths_are_those_of_the_papers():
    drawn = draw(np.random.default_rng(0), 20_000)
    coloured = drawn["hue"] != 0
    for share, expected in ((coloured, 0.8), (drawn["grey"], 0.2), (drawn["sigma"] > 0, 0.5)):
        assert abs(share.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / 20_000)
    for name in COLOURS[:3]:
        assert (drawn[name][~coloured] == 1).all()
        assert drawn[name].min() >= 0.6
        assert drawn[name].max() <= 1.4
        assert abs(drawn[name][coloured].mean() - 1) < 0.01
    assert np.abs(drawn["hue"]).max() <= 0.1
    assert 0.1 <= drawn["sigma"][drawn["sigma"] > 0].min() < 0.11
    assert 1.99 < drawn["sigma"].max() <= 2
    orders, times = np.unique(drawn["order"], axis=0, return_counts=True)
    assert len(orders) == 24
    assert (np.abs(times / 20_000 - 1 / 24) < 5 * np.sqrt(1 / 24 / 20_000)).all()


@pytest.mark.gpu
def test_a_gpu_distorts_alike():
    images, distortions = pictures(40, 64, 64), draw(np.random.default_rng(4), 40)
    shown = distort(images.cuda(), distortions)
    assert shown.is_cuda
    assert (shown.cpu().float() - distort(images, distortions).float()).abs().max() <= 1
