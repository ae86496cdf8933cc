"""Each operation and each policy beside torchvision's own, a picture at a time."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as theirs

from pipeline.distortions import AutoAugment, Cutout, RandAugment, TrivialAugment
from pipeline.distortions.operations import NAMES, OPERATION, SIGNED, chosen, operate

# torchvision's classes hold these tables in attributes that it does not promise to keep.
NARROW, WIDE = v2.RandAugment._AUGMENTATION_SPACE, v2.TrivialAugmentWide._AUGMENTATION_SPACE
POLICY = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)._policies


def pictures(count: int, size: int = 32) -> torch.Tensor:
    """Noise, one grey level, black, white, and cuts of a photograph: (count, size, size, 3), uint8."""
    generator, photograph = np.random.default_rng(count), load_sample_images().images[1]
    cuts = [generator.integers(0, 256, (size, size, 3)), *(np.full((size, size, 3), level) for level in (77, 0, 255))]
    while len(cuts) < count:
        top, left = generator.integers(0, 200, 2)
        cuts.append(photograph[top : top + 3 * size : 3, left : left + 3 * size : 3])
    return torch.from_numpy(np.stack(cuts[:count]).astype(np.uint8))


def torchvisions(images_BHWC: torch.Tensor, rows_BN: np.ndarray, fill: int) -> torch.Tensor:
    """The same by the method that torchvision's policies apply an operation with."""
    policy, shown = v2.TrivialAugmentWide(), []
    for image_HWC, rows_N in zip(images_BHWC, rows_BN, strict=True):
        image = image_HWC.permute(2, 0, 1).contiguous()
        for number, magnitude in rows_N.tolist():
            name = NAMES[number]
            magnitude = magnitude / 255 if name == "Solarize" else magnitude
            image = policy._apply_image_or_video_transform(
                image, name, magnitude, v2.InterpolationMode.NEAREST, {torch.Tensor: [float(fill)] * 3}
            )
        shown.append(image.permute(1, 2, 0))
    return torch.stack(shown)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_torchvisions_at_every_level(name, wide):
    levels = np.repeat(np.arange(0, 31, 6) / 30, 2)
    rows = chosen(np.full(12, NAMES.index(name)), levels, np.arange(12) % 2 == 0, 32, wide)[:, None]
    images = pictures(12)
    given = images.clone()
    ours = operate(images, rows, 128)
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    assert torch.equal(ours, torchvisions(images, rows, 128))
    assert torch.equal(images, given)


@pytest.mark.parametrize(("space", "wide"), [(NARROW, False), (WIDE, True)])
@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("bins", [10, 31])
def test_magnitudes_are_those_of_the_published_tables(space, wide, size, bins):
    for number, name in enumerate(NAMES[:-1]):
        magnitudes, signed = space[name]
        assert (name in SIGNED) == signed
        expected = magnitudes(bins, size, size)
        ours = chosen(np.full(bins, number), np.arange(bins) / (bins - 1), np.zeros(bins, bool), size, wide)[
            "magnitude"
        ]
        if expected is None:
            assert (ours == 0).all()
            continue
        expected = expected.numpy() * (255 if name == "Solarize" else 1)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
        if name == "Posterize":
            np.testing.assert_array_equal(ours, expected)
    assert set(space) == set(NAMES[:-1])


@pytest.mark.parametrize("policy", [AutoAugment(), RandAugment(2, 9), RandAugment(1, 30), TrivialAugment()])
@pytest.mark.parametrize("size", [32, 15])
def test_a_policys_pictures_are_torchvisions(policy, size):
    images, rows = pictures(60, size), policy.draw(np.random.default_rng(1), 60, size)
    fill = 0 if policy.name == "trivial" else 128
    assert torch.equal(policy.apply(images, rows), torchvisions(images, rows, fill))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("policy", [AutoAugment(), RandAugment(2, 9), TrivialAugment(), Cutout(2)])
def test_the_smallest_pictures(policy, size):
    images = pictures(50, 32)[:, :size, :size]
    assert policy.apply(images, policy.draw(np.random.default_rng(0), 50, size)).shape == images.shape
    assert policy.apply(images[:0], policy.draw(np.random.default_rng(0), 0, size)).shape == (0, size, size, 3)


@pytest.mark.parametrize("policy", [AutoAugment(), RandAugment(2, 9), TrivialAugment(), Cutout(16)])
def test_what_becomes_of_a_picture_does_not_depend_on_the_others(policy):
    images, rows = pictures(150), policy.draw(np.random.default_rng(5), 150, 32)
    together = policy.apply(images, rows)
    alone = torch.cat([policy.apply(images[i : i + 1], rows[i : i + 1]) for i in range(150)])
    assert torch.equal(together, alone)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(policy.apply(planar, rows), together)


def test_autoaugment_draws_the_published_policy():
    count = 100_000
    rows = AutoAugment().draw(np.random.default_rng(0), count, 32)
    assert rows.shape == (count, 2)
    assert rows.dtype == OPERATION
    for place in (0, 1):
        # How often each operation comes with each magnitude, at this place of its pair.
        expected = Counter()
        for pair in POLICY:
            name, probability, level = pair[place]
            row = chosen(np.array([NAMES.index(name)]), np.array([(level or 0) / 9]), np.array([False]), 32)[0]
            for sign in (1, -1) if name in SIGNED else (1,):
                expected[name, sign * float(row["magnitude"])] += probability / 25 / (2 if name in SIGNED else 1)
            expected["Identity", 0.0] += (1 - probability) / 25
        drawn = Counter((NAMES[number], magnitude) for number, magnitude in rows[:, place].tolist())
        assert {name for name, share in expected.items() if share > 1e-9} == set(drawn)
        for key, times in drawn.items():
            assert abs(times / count - expected[key]) < 5 * np.sqrt(expected[key] / count), key
    # The two of a pair come together.
    inverted = rows[:, 0]["operation"] == NAMES.index("Invert")
    seconds = {NAMES[number] for number in rows[inverted, 1]["operation"]}
    assert seconds == {"Contrast", "Identity"}


def test_randaugment_and_trivialaugment_draw_evenly():
    rows = RandAugment(2, 15).draw(np.random.default_rng(0), 70_000, 32)
    for place in (0, 1):
        times = np.bincount(rows["operation"][:, place], minlength=15)
        assert (np.abs(times[:14] - 5000) < 5 * np.sqrt(5000)).all()
        assert times[14] == 0  # no Invert
    shears = rows["magnitude"][rows["operation"] == NAMES.index("ShearX")]
    np.testing.assert_allclose(np.abs(shears), 0.15, rtol=1e-6)
    assert abs((shears < 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(len(shears))
    wide = TrivialAugment().draw(np.random.default_rng(0), 70_000, 32)
    assert wide.shape == (70_000, 1)
    times = np.bincount(wide["operation"][:, 0], minlength=15)
    assert (np.abs(times[:14] - 5000) < 5 * np.sqrt(5000)).all()
    turns = np.abs(wide["magnitude"][wide["operation"] == NAMES.index("Rotate")])
    levels, times = np.unique(np.rint(turns / 4.5), return_counts=True)
    assert levels.tolist() == list(range(31))
    assert (np.abs(times - len(turns) / 31) < 5 * np.sqrt(len(turns) / 31)).all()


def test_cutout_hides_a_square_around_any_pixel():
    boxes = Cutout(16).draw(np.random.default_rng(0), 50_000, 32)
    middles = boxes[(boxes[:, :2] > 0).all(axis=1) & (boxes[:, 2:] < 32).all(axis=1)]
    assert (middles[:, 2:] - middles[:, :2] == 16).all()
    # The side that is left of 16 around a centre c of 32: the centres reach every pixel alike.
    sides = [min(32, c + 8) - max(0, c - 8) for c in range(32)]
    for axis in (0, 1):
        drawn = boxes[:, axis + 2] - boxes[:, axis]
        assert abs(drawn.mean() - np.mean(sides)) < 5 * np.std(sides) / np.sqrt(50_000)
    images = pictures(20)
    expected = images.clone()
    for image, (top, left, bottom, right) in zip(expected, boxes.tolist(), strict=False):
        erased = theirs.erase(
            image.permute(2, 0, 1), top, left, bottom - top, right - left, torch.full((3, 1, 1), 128, dtype=torch.uint8)
        )
        image[:] = erased.permute(1, 2, 0)
    assert torch.equal(Cutout(16).apply(images, boxes[:20]), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [AutoAugment(), RandAugment(2, 9), TrivialAugment(), Cutout(16)])
def test_a_gpu_distorts_alike(policy):
    images, rows = pictures(100), policy.draw(np.random.default_rng(4), 100, 32)
    shown = policy.apply(images.cuda(), rows)
    assert shown.is_cuda
    # Single pixels may come from a neighbour, where a rotation falls between two.
    assert ((shown.cpu().int() - policy.apply(images, rows).int()).abs() > 1).float().mean() < 0.01
