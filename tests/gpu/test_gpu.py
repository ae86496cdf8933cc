"""What only a GPU can tell. Run: python -m pytest tests/gpu"""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from pipeline.kinds import LoaderKind
from pipeline.loader import open_loader
from pipeline.plan import EvalPlan, Stream, TrainPlan
from pipeline.resident_loader import decoded_of, let_go
from shards.errors import UserError
from shards.index import open_dataset
from train.afg import run as run_stage_two
from train.bbn import BBN
from train.engine.launch import run

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def own_accelerator_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_shows_what_the_reference_shows(kind: LoaderKind, plan: TrainPlan, within: float, **options) -> None:
    """Hold six steps on the GPU against the portable loader's: mean difference of a batch in grey levels."""
    with open_loader(plan, kind, "cuda", **options) as on_gpu, open_loader(plan, "torch", threads=0) as reference:
        for ours, theirs in islice(zip(on_gpu, reference, strict=False), 6):
            for name, batch in ours.items():
                assert batch.images_BHWC.is_cuda
                assert batch.labels_B.is_cuda
                np.testing.assert_array_equal(batch.ids_B, theirs[name].ids_B)
                difference = batch.images_BHWC.cpu().float() - theirs[name].images_BHWC.float()
                assert difference.abs().mean() < within


@pytest.mark.parametrize("decode", ["whole", "window"])
@pytest.mark.parametrize("augment", ["imagenet", "cifar"])
def test_gpu_decoding_shows_the_same_pictures(photos, augment, decode):
    streams = (Stream("uniform", 1.0, augment), Stream("reversed", -1.0, augment))
    plan = TrainPlan(photos.splits["train"], streams, 8, 64, seed=5, epochs=3)
    assert_shows_what_the_reference_shows("dali", plan, within=2, decode=decode)  # another JPEG decoder


def test_a_fault_on_a_gpu_is_counted_once(photos, tmp_path):
    split = open_dataset(shutil.copytree(photos.root, tmp_path / "copy")).splits["test"]
    row = split.samples[2]
    with split.shard_paths[row["shard"]].open("r+b") as shard:
        shard.seek(row["offset"])
        shard.write(bytes(int(row["size"])))
    for kind in ("dali", "resident", "torch"):
        mine = replace(split)  # nothing is kept of it
        with open_loader(EvalPlan(mine, 4, 32), kind, "cuda", threads=1) as loader:
            assert sum(len(step["eval"].ids_B) for step in loader) == len(split) - 1
            assert loader.faults.times == {2: 1}


def test_gpu_evaluation_sees_every_sample_once(photos):
    split = photos.splits["test"]
    with open_loader(EvalPlan(split, 4, 32, "eval"), "dali", "cuda") as loader:
        ids = np.concatenate([step["eval"].ids_B for step in loader])
    np.testing.assert_array_equal(ids, np.arange(len(split)))


@pytest.mark.parametrize(("name", "augment", "image_size"), [("photos", "imagenet", 64), ("digits", "cifar", 16)])
def test_the_resident_loader_keeps_and_cuts_images_on_the_gpu(photos, digits, name, augment, image_size):
    split = replace((photos if name == "photos" else digits).splits["train"])
    streams = (Stream("uniform", 1.0, augment), Stream("reversed", -1.0, augment))
    plan = TrainPlan(split, streams, 8, image_size, seed=5, epochs=3)
    assert_shows_what_the_reference_shows("resident", plan, within=0.3 if name == "photos" else 1e-6)
    images = weakref.ref(decoded_of(split, torch.empty(0, device="cuda").device, None))
    assert images().device.type == "cuda"
    let_go(split, torch.device("cuda"))
    gc.collect()
    assert images() is None


def test_images_that_do_not_fit_the_gpu_are_refused(digits):
    split = replace(digits.splits["train"])
    with pytest.raises(UserError, match="may use 1e-05 GB on cuda:0"):
        open_loader(EvalPlan(split, 4, 16), "resident", "cuda:0", resident_gb=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("loader", ["dali", "resident", "torch"])
def test_both_stages_run_on_a_gpu(digits, tmp_path, monkeypatch, precision, loader):
    monkeypatch.chdir(tmp_path)
    short = ["--data", str(digits.root), "--run", "bbn", "--loop.precision", precision, "--input.loader", loader]
    run(BBN, [*short, "--optim.epochs", "3", "--input.batch_size", "32"])
    AcceleratorState._reset_state(reset_partial_state=True)
    run_stage_two(["--from", "bbn", "--run", "afg", "--optim.epochs", "3", "--input.loader", loader])
    for name in ("bbn", "afg"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["environment"]["device"] == torch.cuda.get_device_name()
        assert 0 <= summary["last"]["top1"] <= 1
