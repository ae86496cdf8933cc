import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from pipeline.pictures import FILTERS
from pipeline.windows import Buffers, cut_window, cut_windows, mirror, resize_windows

SIZES = [(1, 1), (1, 300), (7, 5), (224, 224), (150, 180), (500, 40), (900, 1200)]


def noise(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [1, 32, 224])
def test_windows_are_resized_as_torchvision_and_pil_do(size, interpolation):
    windows = [noise(*shape) for shape in SIZES]
    images = torch.full((len(SIZES), size, size, 3), 77, dtype=torch.uint8)
    resize_windows(windows, images, interpolation=interpolation)
    for window, image in zip(windows, images, strict=True):
        mode = transforms.InterpolationMode(interpolation)
        theirs = transforms.resize(window.permute(2, 0, 1), [size, size], mode, antialias=True)
        assert torch.equal(image, theirs.permute(1, 2, 0))
        pil = np.asarray(Image.fromarray(window.numpy()).resize((size, size), FILTERS[interpolation]))
        assert np.abs(image.numpy().astype(int) - pil).max() <= 1


def test_rows_of_a_larger_image_are_windows_too():
    image = noise(60, 80)
    out = torch.zeros(1, 20, 20, 3, dtype=torch.uint8)
    resize_windows([image[10:40, 20:70]], out)
    again = torch.zeros_like(out)
    resize_windows([image[10:40, 20:70].contiguous()], again)
    assert torch.equal(out, again)


def test_memory_is_used_again_once_nobody_holds_it():
    buffers = Buffers(2, 4, 4, 3)
    first = buffers.take()
    address = first.data_ptr()
    view = first[1:].permute(0, 3, 1, 2)
    del first
    assert buffers.take().data_ptr() != address
    del view
    assert buffers.take().data_ptr() == address


def test_batches_that_are_held_have_memory_of_their_own_and_little_of_it_is_kept():
    buffers = Buffers(1, 2, 2, 3, most=2)
    held = [buffers.take() for _ in range(5)]
    addresses = {batch.data_ptr() for batch in held}
    assert len(addresses) == 5
    del held[:]
    again = [buffers.take() for _ in range(2)]
    assert {batch.data_ptr() for batch in again} <= addresses
    assert not buffers._unused


WINDOWS = [(0, 0, 6, 8), (-2, -3, 6, 8), (3, 4, 6, 8), (-6, 0, 6, 8), (0, 10, 6, 8), (2, 1, 6, 8)]


def test_windows_are_cut_with_black_beyond_the_border():
    images = torch.stack([noise(6, 10) for _ in WINDOWS]) | 1  # nothing in them is black
    padded = torch.nn.functional.pad(images, (0, 0, 20, 20, 20, 20))
    wanted = [
        image[20 + top : 20 + top + height, 20 + left : 20 + left + width]
        for image, (top, left, height, width) in zip(padded, WINDOWS, strict=True)
    ]
    assert torch.equal(cut_windows(images, np.array(WINDOWS, dtype=np.int32)), torch.stack(wanted))
    for image, window, expected in zip(images, WINDOWS, wanted, strict=True):
        assert torch.equal(cut_window(image, *window), expected)


def test_a_window_inside_is_no_copy():
    image = noise(9, 9)
    assert cut_window(image, 2, 3, 4, 5).data_ptr() == image[2, 3].data_ptr()


@pytest.mark.parametrize("flips", [[], [False], [True], [True, False, True]])
def test_only_the_asked_for_are_mirrored(flips):
    images = torch.stack([noise(3, 4) for _ in flips]) if flips else torch.zeros((0, 3, 4, 3), dtype=torch.uint8)
    wanted = [image.flip(1) if flip else image.clone() for image, flip in zip(images, flips, strict=True)]
    shown = mirror(images, np.array(flips, dtype=bool))
    assert shown.data_ptr() == images.data_ptr()
    assert all(torch.equal(image, expected) for image, expected in zip(shown, wanted, strict=True))


def test_windows_are_mirrored_before_they_are_resized():
    window, out = noise(40, 60), torch.zeros(2, 20, 20, 3, dtype=torch.uint8)
    resize_windows([window, window], out, np.array([True, False]))
    again = torch.zeros_like(out)
    resize_windows([window.flip(1), window], again)
    assert torch.equal(out, again)
