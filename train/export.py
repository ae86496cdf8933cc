"""Take a trained model elsewhere: one ONNX or PyTorch (pt2) file that takes plain images and gives probabilities.

    tailstream export --run runs/birds-bbn-1 --format onnx [--out birds.onnx] [--input network] [--output logits]

    images, uint8, (B, H, W, 3), RGB ─ centre square ─ resize to S×S ─ normalise ─ network ─ calibration ─ softmax

`--input any` (the default) takes batches of any height and width; `--input network` those of the network's own S×S. The
resize inside is the evaluation's (PIL's triangle or cubic filter with its integer weights and a rounding after each of
its two passes) as two matrix products, so that every runtime computes the same pixels as PIL. What the file does not
do is what happens before: turning by EXIF, and shrinking to --shorter-side where the dataset was built so. It carries
the class names and the model's description in its metadata, with the calibration's thresholds. Calibration is inside:
logits, too, are those whose softmax is the calibrated probabilities.

The file is run on the spot and compared with the network. Needs: pip install 'tailstream[export]' (onnx only).
"""

import json
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax
from torch import Tensor, nn

from pipeline.augment import find_recipe
from shards.atomic import partial_file
from shards.cli import Parser, program_name
from shards.errors import UserError, user_errors_exit_2
from train.engine.calibration import Calibration
from train.engine.inference import Model, open_model
from train.predict import check_new, printable

OPSET = 18
# Bits of PIL's resize; see `_as_stored`.
PRECISION, IS_SIMD = 22, ".post" in PIL.__version__
# What must not be exceeded between the file and the network on the same images, in probability.
MOST_DIFFERENCE = 1e-3


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


def export(model: Model, out: Path, form: Literal["onnx", "pt2"], any_size: bool, probabilities: bool) -> list[str]:
    """Write a file and run it.

    Args:
        model: opened by `open_model`.
        out: the file, which appears whole or not at all, and only where it agrees with the network.
        form: of the file.
        any_size: whether images may have any height and width.
        probabilities: or logits.

    Returns:
        Lines that say how far the file and the network differ.

    Raises:
        UserError: a package is missing, the file cannot be written, or it differs from the network.
    """
    module = ExportedModel(model, any_size, probabilities).eval()
    size = model.view.image_size
    height, width = (size + 40, size + 16) if any_size else (size, size)
    example_BHWC = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    dim = torch.export.Dim
    dynamic: dict[int, Any] = {0: dim("batch", min=1)}
    if any_size:
        dynamic |= {1: dim("height", min=2), 2: dim("width", min=2)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own, about its own parts
        program = torch.export.export(module, (example_BHWC,), dynamic_shapes=({**dynamic},), strict=False)
    facts = _metadata(model, any_size, probabilities)
    try:
        with partial_file(out) as temporary:
            run = (
                _write_onnx(program, temporary, facts, dynamic)
                if form == "onnx"
                else _write_pt2(program, temporary, facts)
            )
            return _compare(model, module, run, any_size, probabilities)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); name another file") from None


def _metadata(model: Model, any_size: bool, probabilities: bool) -> dict[str, str]:
    """Return what the file says of itself: texts by name."""
    facts: dict[str, Any] = {
        "classes": model.description.classes,
        "input": "RGB images, uint8, (batch, height, width, 3)" + ("" if any_size else ", of image_size"),
        "output": "probabilities" if probabilities else "logits",
        "weights": model.weights,
        "calibrated": model.calibration is not None,
        "reject_below": model.calibrated.thresholds().tolist(),
        "description": asdict(model.description),
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def _write_onnx(program: Any, path: Path, facts: dict[str, str], dynamic: dict[int, Any]) -> Run:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}; pip install 'tailstream[export]', or use pt2") from None
    with warnings.catch_warnings(), redirect_stdout(StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        written = torch.onnx.export(
            program, input_names=["images"], output_names=["output"], opset_version=OPSET, dynamo=True, verbose=False
        )
    assert written is not None
    proto = written.model_proto
    for name, value in facts.items():
        proto.metadata_props.add(key=name, value=value)
    onnx.save_model(proto, str(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images_BHWC: session.run(None, {"images": images_BHWC})[0]


def _write_pt2(program: Any, path: Path, facts: dict[str, str]) -> Run:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files=facts)
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda images_BHWC: module(torch.from_numpy(images_BHWC)).detach().numpy()


@torch.no_grad()
def _compare(model: Model, module: ExportedModel, run: Run, any_size: bool, probabilities: bool) -> list[str]:
    """Run the file on smooth noise, beside the network and, where it resizes, beside PIL's pictures."""
    size, generator = model.view.image_size, np.random.default_rng(0)
    sizes = [(size, size), (2 * size + 3, 3 * size), (size // 2 + 1, size)] if any_size else [(size, size)]
    same, off, shown = 0.0, 0.0, 0.0  # by NumPy's maximum, which keeps nan
    for count, (height, width) in enumerate(sizes, start=1):
        noise_BHWC = generator.integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
        images = [Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC) for noise in noise_BHWC]
        images_BHWC = np.stack([np.array(image) for image in images])
        told_BC, own_BC = run(images_BHWC), module(torch.from_numpy(images_BHWC)).numpy()
        same = float(np.maximum(same, np.abs(told_BC - own_BC).max()))
        p_BC, own_p_BC = (of if probabilities else softmax(of.astype(np.float64), axis=1) for of in (told_BC, own_BC))
        off = float(np.maximum(off, np.abs(p_BC - own_p_BC).max()))
        if any_size:
            pictures_BHWC = np.stack([_shown(model, image) for image in images])
            shown = float(np.maximum(shown, np.abs(p_BC - model.probabilities(pictures_BHWC)).max()))
    what = "probability" if probabilities else "logit"
    lines = [f"largest difference from the network on the same images: {same:.1e} in {what}"]
    if any_size:
        lines.append(f"largest difference from tailstream predict, which resizes by PIL: {shown:.1e} in probability")
    if not (off <= MOST_DIFFERENCE and shown <= MOST_DIFFERENCE):
        raise UserError(f"the file differs from the network ({'; '.join(lines)}); nothing is kept: report this")
    return lines


def _shown(model: Model, image: Image.Image) -> NDArray[np.uint8]:
    from io import BytesIO

    buffer = BytesIO()
    image.save(buffer, "PNG")
    return model.view._replace(shorter_side=None).picture(buffer.getvalue())


def main(argv: list[str] | None = None) -> None:
    """Export as the command line says; a user's mistake exits with status 2."""
    program = program_name("python -m train.export", "export")
    parser = Parser(prog=program, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="a run's folder")
    parser.add_argument("--format", type=Literal["onnx", "pt2"], default="onnx", help="of the file")
    parser.add_argument("--out", type=Path | None, metavar="FILE", help="default: model.onnx or model.pt2 in the run")
    parser.add_argument(
        "--input", type=Literal["any", "network"], default="any", help="images of any size, or of the network's"
    )
    parser.add_argument("--output", type=Literal["probabilities", "logits"], default="probabilities", help="per class")
    parser.add_argument(
        "--weights", type=Literal["last", "selected"] | None, help="default: those that val chose, where it chose"
    )
    asked = parser.parse_args(argv)
    with user_errors_exit_2(program):
        model = open_model(asked.run, asked.weights, "cpu")
        out = asked.out or asked.run / f"model.{asked.format}"
        check_new(out)
        calibrated = "calibrated" if isinstance(model.calibration, Calibration) else "not calibrated"
        print(f"{printable(asked.run)}: {model.description.method}, {model.weights} weights, {calibrated}")
        lines = export(model, out, asked.format, asked.input == "any", asked.output == "probabilities")
        print("\n".join([*lines, f"wrote {printable(out)}"]))


if __name__ == "__main__":
    main()
