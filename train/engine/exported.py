"""All that an exported model does, as one module: what PIL's resize computes, the network, and its calibration.

images, uint8, (B, H, W, 3), RGB ─ centre square ─ resize to S×S ─ normalise ─ network ─ calibration ─ softmax
"""

import PIL
import torch
from torch import Tensor, nn

from pipeline.augment import find_recipe
from train.engine.inference import Model

# Bits of PIL's resize; see `_as_stored`.
PRECISION, IS_SIMD = 22, ".post" in PIL.__version__


class ExportedModel(nn.Module):
    """All that a file does, as one module.

    Maps images_BHWC, uint8, RGB to probabilities or logits, (B, C), float32.
    """

    offsets_C: Tensor

    def __init__(self, model: Model, any_size: bool, probabilities: bool) -> None:
        super().__init__()
        self.network = model.network.cpu()
        self._size, self._recipe = model.view.image_size, model.view.eval_augment
        self._any_size, self._probabilities = any_size, probabilities
        self._inverse_temperature = 1 / model.calibrated.temperature
        offsets_C = model.calibrated.offsets(model.description.train_counts)
        self.register_buffer("offsets_C", torch.tensor(offsets_C, dtype=torch.float32))

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """See the class."""
        if self._any_size:
            images_BHWC = centre_resize(images_BHWC, self._size, self._recipe)
        logits_BC = self.network.predict(images_BHWC) * self._inverse_temperature + self.offsets_C
        return logits_BC.softmax(1) if self._probabilities else logits_BC


def centre_resize(images_BHWC: Tensor, size: int, recipe: str) -> Tensor:
    """Show the centre of images as an evaluation does: uint8 (B, H, W, 3) to float32 (B, size, size, 3).

    PIL's resize of a window is, in each direction, a sum of pixels with weights k(|distance| / scale) that sum to 1,
    rounded to grey levels: here a matrix with a row for each pixel of the result, 0 outside the window. k is a
    triangle, or Keys' cubic with a = −1/2.
    """
    weights_SH, weights_SW = _weights(images_BHWC, size, recipe)
    rows_BHSC = _grey_levels(torch.einsum("bhwc,sw->bhsc", images_BHWC.float(), weights_SW))
    return _grey_levels(torch.einsum("bhtc,sh->bstc", rows_BHSC, weights_SH))


def _weights(images_BHWC: Tensor, size: int, recipe: str) -> tuple[Tensor, Tensor]:
    # Sizes as tensors and not as numbers: they stay open in the exported graph.
    _, height, width, _ = images_BHWC.shape
    pixels_H, pixels_W = (torch.arange(length, dtype=torch.float32) for length in (height, width))
    lengths = [pixels.amax(0) + 1 for pixels in (pixels_H, pixels_W)]
    kernel = {"bilinear": _triangle, "bicubic": _cubic}[find_recipe(recipe).interpolation]
    found = []
    for pixels_N, length in zip((pixels_H, pixels_W), lengths, strict=True):
        start, side = _window(length, torch.minimum(*lengths), recipe)
        scale = side / size
        centres_S = (torch.arange(size, dtype=torch.float32) + 0.5) * scale
        within_N = pixels_N - start
        distances_SN = (within_N + 0.5 - centres_S[:, None]).abs() / scale.clamp(min=1)
        inside_N = (within_N >= 0) & (within_N < side)
        weights_SN = kernel(distances_SN) * inside_N
        found.append(_as_stored(weights_SN / weights_SN.sum(1, keepdim=True)))
    return found[0], found[1]


def _triangle(distances: Tensor) -> Tensor:
    return (1 - distances).clamp(min=0)


def _cubic(distances: Tensor) -> Tensor:
    """Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981, with a = −1/2."""
    near = (1.5 * distances - 2.5) * distances**2 + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    return torch.where(distances < 1, near, torch.where(distances < 2, far, 0.0))


def _window(length: Tensor, shortest: Tensor, recipe: str) -> tuple[Tensor, Tensor]:
    """Return where the window of a recipe of `pipeline.augment` begins in one direction, and its length, in pixels."""
    if not recipe.startswith("eval"):  # none, centre(share)
        share = find_recipe(recipe).centre_share
        assert share is not None, recipe
        side = (shortest.double() * share).round().clamp(min=1).float()
        return ((length - side) / 2).floor(), side
    # As `pipeline.augment` has it: torchvision's Resize(256) and CenterCrop(224) in the stored image's pixels.
    length, shortest = length.double(), shortest.double()
    resized = (256 * length / shortest).floor()
    first = ((resized - 224) / 2).round()
    start, end = (first * length / resized).round(), ((first + 224) * length / resized).round()
    return start.float(), (end - start).clamp(min=1).float()


def _as_stored(weights_SN: Tensor) -> Tensor:
    """Round a resize's weights to the integers, over a power of two, that PIL has.

    Pillow's power is 2^22; pillow-simd's the largest up to it at which the largest weight is below 2^15. Left out, this
    would move one pixel in a hundred by a grey level.
    """
    one = torch.tensor(2.0**PRECISION)
    if IS_SIMD:
        one = torch.minimum(one, 2.0 ** torch.floor(torch.log2((2.0**15 - 0.5) / weights_SN.max())))
    return weights_SN.sign() * (weights_SN.abs() * one + 0.5).floor() / one


def _grey_levels(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255)
