"""Exported models: what is in the file, and that it says what the network and train.predict say."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from untrained import CLASSES, make_run, odd_images

from pipeline.augment import find_recipe
from pipeline.pictures import FILTERS
from shards.encode import decode
from train.engine.calibration import Calibration, write_calibration
from train.engine.exported import centre_resize
from train.engine.inference import find_images, open_model
from train.export import main
from train.predict import predict as predict_rows


def fails_with(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2, error
    assert error.startswith("python -m train.export: error: ")
    assert "\n" not in error
    return error


def load(path):
    """Return what runs an exported file, and its metadata."""
    if path.suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        facts = session.get_modelmeta().custom_metadata_map
        return lambda images_BHWC: session.run(None, {"images": images_BHWC})[0], facts
    facts = dict.fromkeys(["classes", "description", "reject_below"], "")
    module = torch.export.load(path, extra_files=facts).module()
    return lambda images_BHWC: module(torch.from_numpy(images_BHWC)).detach().numpy(), facts


@pytest.mark.parametrize(
    "recipe", ["none", "eval", "centre(0.83)", "none+bicubic", "eval+bicubic", "centre(0.9)+bicubic"]
)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (31, 57), (200, 90), (20, 300), (1, 7), (9, 9)])
def test_the_resize_inside_is_pils(height, width, recipe):
    noise_HWC = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    windows, _ = find_recipe(recipe).draw(np.random.default_rng(0), np.array([height]), np.array([width]), 32)
    ((top, left, rows, columns),) = windows.tolist()
    window = Image.fromarray(noise_HWC).crop((left, top, left + columns, top + rows))
    expected = np.asarray(window.resize((32, 32), FILTERS[find_recipe(recipe).interpolation]), np.float32)
    shown = centre_resize(torch.from_numpy(noise_HWC)[None], 32, recipe)[0].numpy()
    np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize(
    ("form", "kind", "unit"), [("onnx", "bilateral", False), ("onnx", "bilateral", True), ("pt2", "plain", False)]
)
def test_a_file_says_what_predict_says_of_odd_images_of_any_size(tmp_path, capsys, form, kind, unit):
    if form == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
    run, out = make_run(tmp_path / "run", kind=kind, unit=unit), tmp_path / f"model.{form}"
    write_calibration(run, {"last": (Calibration(1.7, 0.5, [0.2, 0.3, 0.5], 0.4), {})})
    main(["--run", str(run), "--format", form, "--out", str(out)])
    said = capsys.readouterr().out
    assert "largest difference from the network on the same images: " in said
    assert "calibrated" in said
    call, facts = load(out)
    assert json.loads(facts["classes"]) == CLASSES
    assert json.loads(facts["description"])["image_size"] == 32
    assert json.loads(facts["reject_below"]) == [0.4] * 3
    images = odd_images(tmp_path / "odd")
    reported = list(predict_rows([open_model(run)], find_images([str(path) for path in images]), 3, 8))
    for path, row in zip(images, reported, strict=True):
        picture_HWC = np.array(decode(path.read_bytes()))
        scores_C = dict(zip(CLASSES, call(picture_HWC[None])[0].tolist(), strict=True))
        assert max(scores_C, key=scores_C.get) == row.topk[0][0]
        assert scores_C == pytest.approx(dict(row.topk), abs=1e-4)
    assert call(np.zeros((3, 40, 50, 3), np.uint8)).shape == (3, 3)


def test_of_the_networks_size_it_gives_logits(tmp_path, capsys):
    run, out = make_run(tmp_path / "run", selected=True), tmp_path / "model.pt2"
    main(["--run", str(run), "--format", "pt2", "--out", str(out), "--input", "network", "--output", "logits"])
    call, _ = load(out)
    images_BHWC = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected_BC = open_model(run, "selected").logits(images_BHWC)
    offsets_C = expected_BC - call(images_BHWC)
    np.testing.assert_allclose(offsets_C, 0, atol=1e-4)


@pytest.mark.parametrize(("name", "option"), [("model.pt2", []), ("model.PT2", []), ("model.bin", ["--format", "pt2"])])
def test_the_end_of_a_files_name_says_its_format(tmp_path, capsys, name, option):
    run, out = make_run(tmp_path / "run"), tmp_path / name
    main(["--run", str(run), "--out", str(out), "--input", "network", *option])
    with out.open("rb") as file:
        assert torch.export.load(file).module()(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 3)


def test_a_network_that_no_onnx_file_holds_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.export.MOST_ONNX_BYTES", 1_000_000)
    run = make_run(tmp_path / "run")
    assert "an ONNX file holds 2 GB, and the network has 0.0 GB; use --format pt2" in fails_with(capsys, "--run", run)
    main(["--run", str(run), "--format", "pt2", "--input", "network"])
    assert (run / "model.pt2").exists()


def test_mistakes_leave_nothing(tmp_path, capsys, monkeypatch):
    run, out = make_run(tmp_path / "run"), tmp_path / "model.pt2"
    out.write_text("mine")
    assert "already exists" in fails_with(capsys, "--run", run, "--format", "pt2", "--out", out)
    assert out.read_text() == "mine"
    out.unlink()
    monkeypatch.setattr("train.export.MOST_DIFFERENCE", -1.0)
    asked = ["--run", run, "--format", "pt2", "--out", out, "--input", "network"]
    assert "the file differs from the network" in fails_with(capsys, *asked)
    assert not list(tmp_path.glob("*model.pt2*"))
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert "pip install 'tailstream[export]'" in fails_with(capsys, "--run", run, "--format", "onnx")
    assert sorted(path.name for path in run.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("output", ["probabilities", "logits"])
@pytest.mark.parametrize("wrong", [np.nan, 7.0])
def test_a_file_that_says_something_else_is_not_kept(tmp_path, capsys, monkeypatch, output, wrong):
    run, out = make_run(tmp_path / "run"), tmp_path / "model.pt2"

    def written(program, path, facts):
        path.write_bytes(b"")
        return lambda images_BHWC: np.tile(np.float32([wrong, 0, 0]), (len(images_BHWC), 1))

    monkeypatch.setattr("train.export._write_pt2", written)
    asked = ["--run", run, "--format", "pt2", "--out", out, "--input", "network", "--output", output]
    assert "the file differs from the network" in fails_with(capsys, *asked)
    assert not out.exists()
