"""A trained model in use: the pictures of an evaluation, any input, every format, and what is said when it fails."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from untrained import CLASSES, make_run, odd_images

from pipeline.loader import open_loader
from pipeline.plan import EvalPlan
from shards.build import build
from shards.errors import UserError
from shards.index import open_dataset
from train.engine.calibration import Calibration, write_calibration
from train.engine.inference import find_images, open_model
from train.predict import main, printable

ROOT = Path(__file__).parents[2]
HOSTILE = ["<script>alert(1).jpg", "quo\"te',.jpg", "new\nline.jpg", "\u202egpj.exe.jpg", "--help.jpg", "שלום.jpg",
           "carriage\rreturn.jpg", "=1+1\t.jpg", "x" * 251 + ".jpg"]  # fmt: skip


def predict(capsys, *arguments) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def rows(capsys, *arguments) -> list[dict]:
    return [json.loads(line) for line in predict(capsys, "--format", "jsonl", *arguments).splitlines()]


def fails_with(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2, error
    assert error.startswith("python -m train.predict: error: ")
    return error


@pytest.mark.parametrize("shorter_side", [None, 64])
def test_it_shows_the_network_the_pictures_of_an_evaluation(tmp_path, capsys, photo_folder, shorter_side):
    images = odd_images(tmp_path / "source/odd")
    shutil.copytree(photo_folder / "both", tmp_path / "source/both")
    out = build("folder", source=tmp_path / "source", out=tmp_path / "data", test_fraction=0.0, val_fraction=0.0,
                shorter_side=shorter_side, workers=1)  # fmt: skip
    run = make_run(tmp_path / "run", classes=["both", "odd"], shorter_side=shorter_side)
    split, model = open_dataset(out).splits["train"], open_model(run)
    expected = {}
    with open_loader(EvalPlan(split, 5, 32, "eval"), "torch", torch.device("cpu"), threads=0) as loader:
        names = split.sample_names()
        for batch in loader:
            p_BC = model.network.predict(batch["eval"].images_BHWC).softmax(1).detach().numpy()
            expected |= {names[i]: p_C for i, p_C in zip(batch["eval"].ids_B.tolist(), p_BC, strict=True)}
    assert len(expected) == len(images) + 6
    assert np.std([p_C[0] for p_C in expected.values()]) > 0.01  # the network tells them apart
    capsys.readouterr()
    reported = rows(capsys, "--run", run, "--batch-size", 4, tmp_path / "source")
    for row in reported:
        p_C = expected[os.path.relpath(row["file"], tmp_path / "source")]
        assert row["label"] == ["both", "odd"][p_C.argmax()]
        assert [pair["score"] for pair in row["topk"]] == pytest.approx(sorted(p_C, reverse=True), abs=1e-5)
    # What the shards hold is predicted alike.
    from_shards = rows(capsys, "--run", run, out)
    assert len(from_shards) == len(reported)
    scores = [sorted(row["score"] for row in some) for some in (reported, from_shards)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_a_copied_run_needs_neither_the_dataset_nor_dali(tmp_path, photo_folder):
    run = make_run(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    program = f"""
import sys
for name in ("nvidia", "nvidia.dali", "accelerate", "pyarrow", "onnx"):
    sys.modules[name] = None
sys.argv = ["predict", "--run", {str(run)!r}, {str(photo_folder)!r}, "--format", "csv"]
import runpy
runpy.run_module("train.predict", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "elsewhere", capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list(csv.DictReader(io.StringIO(done.stdout)))) == 42


@pytest.mark.parametrize("launch", [["-m", "train.predict"], [str(ROOT / "train/predict.py")]])
def test_it_reads_a_list_and_can_be_launched_both_ways(tmp_path, photo_folder, launch):
    run = make_run(tmp_path / "run")
    images = sorted((photo_folder / "both").iterdir())[:2]
    listed = b"\0".join(os.fsencode(path) for path in images) + b"\0"
    done = subprocess.run([sys.executable, *launch, "--run", str(run), "-"], input=listed, capture_output=True,
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_hostile_names_are_data_in_every_format(tmp_path, capsys, photo_folder):
    classes = ["<b>\n", 'a"b,c', "\u202etxet"]
    run = make_run(tmp_path / "run", classes=classes)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in HOSTILE:
        shutil.copy(photo_folder / "both/00.jpg", folder / name)
    broken = os.fsencode(folder) + b"/\xff\xfe.jpg"  # no UTF-8
    shutil.copy(photo_folder / "both/00.jpg", broken)
    names = {str(folder / name) for name in HOSTILE} | {os.fsdecode(broken)}

    reported = rows(capsys, "--run", run, folder)
    assert {row["file"] for row in reported} == names
    assert {row["label"] for row in reported} <= set(classes)
    out = tmp_path / "out.csv"
    predict(capsys, "--run", run, folder, "--format", "csv", "--out", out)
    with out.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["file"] for row in table} == names
    assert {row["label_3"] for row in table} <= set(classes)
    lines = predict(capsys, "--run", run, folder).splitlines()
    assert len(lines) == len(names)
    assert not any("\u202e" in line or "\x1b" in line for line in lines)
    assert any("new\\nline.jpg" in line for line in lines)
    assert any("שלום" in line for line in lines)  # letters stay what they are
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    predict(capsys, "--run", run, folder, "--format", "parquet", "--out", tmp_path / "out.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert {row["file"] for row in table} == {n.encode("utf-8", "backslashreplace").decode() for n in names}
    assert table[0]["topk"][0]["label"] in classes


def test_a_file_that_is_named_like_an_option(tmp_path, capsys, photo_folder, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    shutil.copy(photo_folder / "both/00.jpg", "--help")
    (row,) = rows(capsys, "--run", run, "--", "--help")
    assert row["file"] == "--help"
    assert printable("a\\nb\n") == "a\\\\nb\\n"


def test_bad_images_are_named_and_skipped(tmp_path, capsys, photo_folder):
    run = make_run(tmp_path / "run")
    folder = tmp_path / "in"
    shutil.copytree(photo_folder / "both", folder)
    (folder / "00.jpg").write_bytes((folder / "00.jpg").read_bytes()[:500])
    (folder / "03\x1b[2J.jpg").write_bytes(b"")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        tar.add(folder / "01.jpg", "x/one.JPG")
        tar.add(folder / "01.jpg", "x/one.cls")
    (folder / "04.jxl").write_bytes(b"picture")
    (folder / "broken.tar").write_bytes(b"no tar at all" * 100)
    os.mkfifo(folder / "pipe.tar")
    main(["--run", str(run), str(folder), "--format", "jsonl", "--batch-size", "3"])
    said = capsys.readouterr()
    reported = [json.loads(line)["file"] for line in said.out.splitlines()]
    # In the order of the names, over the gaps.
    assert [Path(name).name for name in reported] == ["01.jpg", "02.jpg", "03.jpg", "04.jpg", "05.jpg", "one.JPG"]
    assert "skipped" in said.err
    assert "03\\x1b[2J.jpg: empty file" in said.err
    assert "broken.tar: a damaged tar" in said.err
    assert "pipe.tar: not a regular file" in said.err
    assert "images that this PIL does not read are left out: 1 .jxl; ImageMagick turns .jxl into JPEG" in said.err
    assert "4 of 10 images could not be read and were skipped" in said.err

    out = tmp_path / "out.csv"
    message = fails_with(capsys, "--run", run, folder, "--format", "csv", "--out", out, "--strict")
    assert "00.jpg: damaged or truncated; leave --strict out" in message
    assert list(tmp_path.glob("*out.csv*")) == []
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_bytes(b"text")
    assert "none of the 1 images could be read" in fails_with(capsys, "--run", run, tmp_path / "bad", "--out", out)
    assert list(tmp_path.glob("*out.csv*")) == []


def test_several_runs_are_averaged_and_must_agree_on_the_classes(tmp_path, capsys, photo_folder):
    runs = [make_run(tmp_path / f"run{seed}", seed=seed, size=size) for seed, size in ((0, 32), (1, 24))]
    both = [rows(capsys, "--run", run, photo_folder / "both", "--topk", 9) for run in runs]
    mean = rows(capsys, "--run", runs[0], "--run", runs[1], photo_folder / "both")
    for row, *parts in zip(mean, *both, strict=True):
        scores = [{pair["label"]: pair["score"] for pair in part["topk"]} for part in parts]
        assert row["topk"][0]["score"] == row["score"]
        for pair in row["topk"]:
            assert pair["score"] == pytest.approx(np.mean([of[pair["label"]] for of in scores]))
    other = make_run(tmp_path / "other", classes=["a", "b", "c"])
    assert "have other classes" in fails_with(capsys, "--run", runs[0], "--run", other, photo_folder)


def test_the_prior_follows_bayes_rule(tmp_path, capsys, photo_folder):
    run = make_run(tmp_path / "run")  # trained on 24, 12 and 6 images

    def scores(*options) -> dict[str, float]:
        (row,) = rows(capsys, "--run", run, photo_folder / "both/00.jpg", *options)
        return {pair["label"]: pair["score"] for pair in row["topk"]}

    plain, prior = scores(), {"flower": 0.7, "temple": 0.3, "both": 0.0}
    (tmp_path / "prior.json").write_text(json.dumps(prior))
    trained = dict(zip(CLASSES, (4 / 7, 2 / 7, 1 / 7), strict=True))
    assert scores("--prior", "train") == pytest.approx(plain)
    for asked, target in (("uniform", dict.fromkeys(CLASSES, 1 / 3)), (tmp_path / "prior.json", prior)):
        weighted = {name: plain[name] * target[name] / trained[name] for name in CLASSES}
        expected = {name: value / sum(weighted.values()) for name, value in weighted.items()}
        assert scores("--prior", asked) == pytest.approx(expected)
    # Calibrated for other shares, these are divided out.
    write_calibration(run, {"last": (Calibration(2.0, 1.5, [0.5, 0.25, 0.25]), {})})
    logits = {name: np.log(plain[name]) / 2 - 1.5 * np.log(trained[name]) for name in CLASSES}
    total = sum(np.exp(value) for value in logits.values())
    assert scores() == pytest.approx({name: np.exp(value) / total for name, value in logits.items()})
    moved = {name: np.exp(logits[name]) / share for name, share in zip(CLASSES, (0.5, 0.25, 0.25), strict=True)}
    assert scores("--prior", "uniform") == pytest.approx({n: v / sum(moved.values()) for n, v in moved.items()})


def test_what_is_below_the_threshold_has_no_label(tmp_path, capsys, photo_folder):
    run = make_run(tmp_path / "run")
    write_calibration(run, {"last": (Calibration(1.0, 0.0, [1 / 3] * 3, reject_below=1.1), {})})
    (row,) = rows(capsys, "--run", run, photo_folder / "both/00.jpg")
    assert row["label"] is None
    assert row["topk"][0]["score"] == row["score"]
    assert "(rejected)" in predict(capsys, "--run", run, photo_folder / "both/00.jpg")


def test_selected_weights_are_the_default_where_val_chose(tmp_path, capsys, photo_folder):
    run, image = make_run(tmp_path / "run", selected=True), photo_folder / "both/00.jpg"
    reported = {name: rows(capsys, "--run", run, image, *option)[0]["score"] for name, option in
            {"default": [], "last": ["--weights", "last"], "selected": ["--weights", "selected"]}.items()}  # fmt: skip
    assert reported["default"] == reported["selected"] != reported["last"]
    plain = make_run(tmp_path / "plain")
    assert "has no selected weights" in fails_with(capsys, "--run", plain, image, "--weights", "selected")


def test_mistakes_are_reported_in_one_line(tmp_path, capsys, photo_folder):
    run, image = make_run(tmp_path / "run"), photo_folder / "both/00.jpg"
    (tmp_path / "empty").mkdir()
    assert "no model is named" in fails_with(capsys, image)
    assert "holds no trained model" in fails_with(capsys, "--run", tmp_path / "empty", image)
    assert "holds no images" in fails_with(capsys, "--run", run, tmp_path / "empty")
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone/1.HEIC").write_bytes(b"picture")
    message = fails_with(capsys, "--run", run, tmp_path / "phone")
    assert "does not read are left out: 1 .heic; for .heic: pip install pi-heif); give images" in message
    assert "does not exist" in fails_with(capsys, "--run", run, tmp_path / "nowhere.jpg")
    assert "there are no images" in fails_with(capsys, "--run", run)
    (tmp_path / "taken").write_text("mine")
    assert "already exists" in fails_with(capsys, "--run", run, image, "--out", tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
    assert "the folder" in fails_with(capsys, "--run", run, image, "--out", tmp_path / "no/where")
    assert "needs a file" in fails_with(capsys, "--run", run, image, "--format", "parquet")
    for reported, message in (
        ('{"temple": 0.5, "flower": 0.5}', "differ in 1 classes ('both', …)"),
        ('{"temple": 0.5, "flower": 0.4, "both": 0.2}', "sum to 1"),
        ('{"temple": "a", "flower": 0.4, "both": 0.2}', "sum to 1"),
        ("[]", "differ in 3 classes"),
        ("{", "is not JSON"),
    ):
        (tmp_path / "prior.json").write_text(reported)
        assert message in fails_with(capsys, "--run", run, image, "--prior", tmp_path / "prior.json")
    assert "cannot be read" in fails_with(capsys, "--run", run, image, "--prior", "unifrom")
    content = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(content | {"format": 2}))
    assert "is of format 2, this version reads 1" in fails_with(capsys, "--run", run, image)
    (run / "model.json").write_text(json.dumps(content | {"crop_share": None, "eval_augment": "imagenet"}))
    assert "does not show a fixed window as it is" in fails_with(capsys, "--run", run, image)
    (run / "model.json").write_text(json.dumps(content | {"eval_augment": "eval+cutout(8)"}))
    assert "does not show a fixed window as it is" in fails_with(capsys, "--run", run, image)


def test_a_listed_file_that_is_missing_is_skipped(tmp_path):
    assert [item.path for item in find_images([], ["/nowhere/a.jpg"])] == ["/nowhere/a.jpg"]
    with pytest.raises(UserError, match="there are no images"):
        find_images([], [])


def test_links_are_followed_once_and_nobody_waits_for_a_pipe(tmp_path, capsys, photo_folder):
    run, folder = make_run(tmp_path / "run"), tmp_path / "in"
    for name in ("a", "b"):
        shutil.copytree(photo_folder / "both", folder / name)
    (folder / "a/above").symlink_to(folder)
    (folder / "a/beside").symlink_to(folder / "b")
    (folder / "b/beside").symlink_to(folder / "a")
    (folder / "linked.jpg").symlink_to(folder / "a/00.jpg")
    os.mkfifo(folder / "pipe.jpg")
    main(["--run", str(run), str(folder), "--format", "jsonl"])
    said = capsys.readouterr()
    reported = [os.path.realpath(json.loads(line)["file"]) for line in said.out.splitlines()]
    names = sorted(os.listdir(photo_folder / "both"))
    assert sorted(reported) == sorted([str(folder / "a/00.jpg"), *(str(folder / k / n) for k in "ab" for n in names)])
    assert "pipe.jpg: not a regular file" in said.err


def test_a_hostile_place_of_the_run_is_one_line_too(tmp_path, capsys, photo_folder):
    run = make_run(tmp_path / "new\nline\u202e")
    main(["--run", str(run), str(photo_folder / "both/00.jpg")])
    said = capsys.readouterr().err
    assert "/new\\nline\\u202e: CE, last weights" in said
    message = fails_with(capsys, "--run", run, photo_folder, "--weights", "selected")
    assert "new\\nline\\u202e has no selected weights" in message


def test_a_prior_without_calibration_says_what_it_takes_for_granted(tmp_path, capsys, photo_folder):
    run, image = make_run(tmp_path / "run"), str(photo_folder / "both/00.jpg")
    main(["--run", str(run), image, "--prior", "uniform"])
    assert "note: --prior takes" in capsys.readouterr().err
    write_calibration(run, {"last": (Calibration(2.0, 1.5, [0.5, 0.25, 0.25]), {})})
    main(["--run", str(run), image, "--prior", "uniform"])
    assert "note:" not in capsys.readouterr().err


@pytest.mark.parametrize("formatted", [False, True])
def test_runs_of_before_models_described_themselves(tmp_path, capsys, photo_folder, formatted):
    """As the first versions left them: model.json was the network's spec, or that and the format."""
    run, image = make_run(tmp_path / "run"), photo_folder / "both/00.jpg"
    expected = rows(capsys, "--run", run, image)
    spec = json.loads((run / "model.json").read_text())["network"]
    (run / "model.json").write_text(json.dumps({"format": 1, "network": spec} if formatted else spec))
    config = {"about": {"method": "erm"}, "input": {"image_size": 32, "augment": "shift", "eval_augment": "eval"}}
    (run / "config.yaml").write_text(json.dumps(config))
    assert "is not finished (no summary.json)" in fails_with(capsys, "--run", run, image)
    summary = {"dataset": "photos", "title": "CE", "epochs": 2, "last": {"top1": 0.5}, "evaluated_on": "test"}
    (run / "summary.json").write_text(json.dumps(summary | {"environment": {}}))
    assert "train the run again" in fails_with(capsys, "--run", run, image)
    (run / "per_class.json").write_text(json.dumps({"classes": CLASSES, "train_counts": [24, 12, 6]}))
    assert rows(capsys, "--run", run, image) == expected
    assert "no selected weights" in fails_with(capsys, "--run", run, image, "--weights", "selected")
    # A second stage keeps in its configuration where stage one is, which knows the pictures.
    second = shutil.copytree(run, tmp_path / "second")
    (second / "config.yaml").write_text(json.dumps({"about": {"from": str(run)}, "input": {"batch_size": 9}}))
    assert rows(capsys, "--run", second, image) == expected
    shutil.rmtree(run)
    assert "run is not a run" in fails_with(capsys, "--run", second, image)


def test_a_folder_that_may_not_be_read_is_named_and_skipped(tmp_path, capsys, photo_folder, permissions):
    shutil.copytree(photo_folder / "both", tmp_path / "images/mine")
    (tmp_path / "images/others").mkdir(mode=0)
    main(["--run", str(make_run(tmp_path / "run")), str(tmp_path / "images"), "--topk", "1"])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 6
    assert f"skipped '{tmp_path}/images/others': Permission denied" in said.err


def test_a_run_that_may_not_be_read_is_no_missing_one(tmp_path, capsys, photo_folder, permissions):
    run = make_run(tmp_path / "run")
    (run / "model.json").chmod(0)
    message = fails_with(capsys, "--run", run, photo_folder)
    assert f"{run}/model.json: Permission denied; change its permissions" in message


@pytest.mark.parametrize(
    ("name", "options", "begins"),
    [
        ("p.csv", [], '"file"'),
        ("p.JSONL", [], '{"file"'),
        ("p.txt", [], str(Path("both/00.jpg"))),
        ("p.csv", ["--format", "jsonl"], '{"file"'),
    ],
)
def test_the_end_of_a_files_name_says_its_format(tmp_path, capsys, photo_folder, monkeypatch, name, options, begins):
    run = make_run(tmp_path / "run")
    monkeypatch.chdir(photo_folder)
    main(["--run", str(run), "both/00.jpg", "--out", str(tmp_path / name), *options])
    assert (tmp_path / name).read_text().startswith(begins)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_on_a_full_gpu_the_cpu_computes(tmp_path, capsys, photo_folder, monkeypatch, error):
    to = torch.nn.Module.to

    def full(module, device):
        if device == "cuda":
            raise error("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'")
        return to(module, device)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.nn.Module.to", full)
    main(["--run", str(make_run(tmp_path / "run")), str(photo_folder / "both/00.jpg")])
    said = capsys.readouterr()
    assert "note: the GPU cannot take the network (CUDA error: out of memory); the CPU computes\n" in said.err
    assert len(said.out.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes"),
    ],
)
def test_a_batch_that_does_not_fit_the_memory_is_one_line(tmp_path, capsys, photo_folder, monkeypatch, error):
    def full(*_):
        raise error

    run, out = make_run(tmp_path / "run"), tmp_path / "out.csv"
    monkeypatch.setattr("train.networks.networks.Network.predict", full)
    message = fails_with(capsys, "--run", run, photo_folder, "--out", out, "--batch-size", 4)
    assert "out of memory with 4 images (" in message
    assert message.endswith("; lower --batch-size")
    assert list(tmp_path.glob("*out.csv*")) == []


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path, capsys, photo_folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    run, out = make_run(tmp_path / "run"), tmp_path / "out.csv"
    monkeypatch.setattr("train.networks.networks.Network.predict", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["--run", str(run), str(photo_folder), "--out", str(out)])
    assert capsys.readouterr().err.splitlines()[-1] == "python -m train.predict: interrupted"
    assert list(tmp_path.glob("*out.csv*")) == []


def test_it_computes_on_the_cores_that_it_may_use(tmp_path, monkeypatch):
    run, before = make_run(tmp_path / "run"), torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("train.engine.inference.cores", lambda: 1)
    try:
        torch.set_num_threads(2)
        open_model(run)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
