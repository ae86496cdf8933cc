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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.atomic import partial_file
from shards.cli import Parser, program_name
from shards.errors import UserError, user_errors_exit_2
from train.predict import check_new, printable

if TYPE_CHECKING:  # a command line is read without torch: see train/engine/launch.py
    from train.engine.exported import ExportedModel
    from train.engine.inference import Model

Format = Literal["onnx", "pt2"]
OPSET = 18
# Bytes of weights that fit an ONNX file beside its graph: protobuf's limit is 2 GB.
MOST_ONNX_BYTES = (1 << 31) - (1 << 24)
# What must not be exceeded between the file and the network on the same images, in probability.
MOST_DIFFERENCE = 1e-3


def export(model: "Model", out: Path, form: Format, any_size: bool, probabilities: bool) -> list[str]:
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
    import torch

    from train.engine.exported import ExportedModel

    module = ExportedModel(model, any_size, probabilities).eval()
    size_bytes = sum(tensor.nbytes for tensor in module.state_dict().values())
    if form == "onnx" and size_bytes > MOST_ONNX_BYTES:
        raise UserError(f"an ONNX file holds 2 GB, and the network has {size_bytes / 1e9:.1f} GB; use --format pt2")
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
        with partial_file(out) as temporary, torch.no_grad():
            run = (
                _write_onnx(program, temporary, facts, dynamic)
                if form == "onnx"
                else _write_pt2(program, temporary, facts)
            )
            return _compare(model, module, run, any_size, probabilities)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); name another file") from None


def _metadata(model: "Model", any_size: bool, probabilities: bool) -> dict[str, str]:
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
    import torch

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
    import torch

    with path.open("wb") as file:
        torch.export.save(program, file, extra_files=facts)
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda images_BHWC: module(torch.from_numpy(images_BHWC)).detach().numpy()


def _compare(model: "Model", module: "ExportedModel", run: Run, any_size: bool, probabilities: bool) -> list[str]:
    """Run the file on smooth noise, beside the network and, where it resizes, beside PIL's pictures."""
    import torch
    from scipy.special import softmax

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


def _shown(model: "Model", image: Image.Image) -> NDArray[np.uint8]:
    from io import BytesIO

    buffer = BytesIO()
    image.save(buffer, "PNG")
    return model.view._replace(shorter_side=None).picture(buffer.getvalue())


def main(argv: list[str] | None = None) -> None:
    """Export as the command line says; a user's mistake exits with status 2."""
    program = program_name("python -m train.export", "export")
    parser = Parser(prog=program, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="a run's folder")
    parser.add_argument("--format", type=Format | None, help="of the file; default: by the end of --out, else onnx")
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
        from train.engine.inference import open_model

        model = open_model(asked.run, asked.weights, "cpu")
        form: Format = asked.format or ("pt2" if asked.out and asked.out.suffix.lower() == ".pt2" else "onnx")
        out = asked.out or asked.run / f"model.{form}"
        check_new(out)
        calibrated = "calibrated" if model.calibration else "not calibrated"
        print(f"{printable(asked.run)}: {model.description.method}, {model.weights} weights, {calibrated}")
        lines = export(model, out, form, asked.input == "any", asked.output == "probabilities")
        print("\n".join([*lines, f"wrote {printable(out)}"]))


if __name__ == "__main__":
    main()
