"""The feature bank: what is in it, when it is remade, and resuming after a kill."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pipeline.loader import open_loader
from pipeline.plan import EvalPlan
from shards.errors import UserError
from shards.index import open_dataset
from train.engine.config import Input
from train.features import bank as module
from train.features.bank import ViewPlan, feature_bank
from train.networks.model_files import save_model
from train.networks.networks import build_network


@pytest.fixture
def stage_one(tmp_path):
    """A run's network, untrained: what it makes of images is as good as any other."""
    torch.manual_seed(0)
    network = build_network("plain", "resnet32", 10).eval()
    save_model(network, tmp_path / "run")
    return tmp_path / "run", network


@pytest.fixture
def extracted(monkeypatch):
    """The ids whose pictures were really taken, in order."""
    ids: list[int] = []
    take = module._features

    def counted(*arguments):
        for ids_B, features_BD in take(*arguments):
            ids.extend(ids_B.tolist())
            yield ids_B, features_BD

    monkeypatch.setattr(module, "_features", counted)
    return ids


INPUT = Input(image_size=16, batch_size=64, augment="shift", loader="torch", threads=0)


def bank(stage_one, dataset, split="val", views=0, input=INPUT):
    return feature_bank(*stage_one, dataset, split, input, Accelerator(cpu=True), views)


def test_it_holds_every_images_features_sorted_by_class(stage_one, digits):
    features_RD, labels_R = bank(stage_one, digits, "train")
    split = digits.splits["train"]
    assert (features_RD.dtype, labels_R.dtype) == (torch.float16, torch.int64)
    assert torch.equal(torch.bincount(labels_R), torch.from_numpy(split.class_counts))
    assert (labels_R.diff() >= 0).all()
    with open_loader(EvalPlan(split, len(split), 16), "torch", threads=0) as loader, torch.no_grad():
        (batch,) = [step["eval"] for step in loader]
        expected = stage_one[1].features(batch.images_BHWC).half()
    # Other batches give other rounding errors.
    torch.testing.assert_close(features_RD, expected[torch.tensor(split.by_class)], rtol=2e-3, atol=1e-3)
    reported = json.loads((stage_one[0] / "features/train/bank.json").read_text())
    assert reported["class_counts"] == split.class_counts.tolist()
    assert (reported["recipe"], reported["complete"], reported["views"], reported["network"]) == (
        "none",
        True,
        0,
        "run",
    )


def test_it_is_read_by_memory_mapping(stage_one, digits):
    features_RD, _ = bank(stage_one, digits)
    maps = Path("/proc/self/maps").read_text()
    assert "features/val/features.npy" in maps
    assert len(features_RD) == len(digits.splits["val"])


def test_it_is_reused_while_it_fits(stage_one, digits, extracted):
    first, _ = bank(stage_one, digits)
    assert sorted(extracted) == list(range(len(digits.splits["val"])))
    extracted.clear()
    again, _ = bank(stage_one, digits)
    assert torch.equal(first, again)
    assert not extracted


def test_a_bank_of_another_network_dataset_or_recipe_is_made_anew_and_said(
    stage_one, digits, extracted, capsys, tmp_path
):
    run, network = stage_one
    number = len(digits.splits["val"])
    bank(stage_one, digits)
    other = Input(image_size=16, batch_size=64, eval_augment="eval", loader="torch", threads=0)
    bank(stage_one, digits, input=other)
    assert "differ in: recipe; extracting them again" in capsys.readouterr().out
    with torch.no_grad():
        network.trunk.conv1.weight *= 2
    save_model(network, run)
    bank(stage_one, digits, input=other)
    assert "differ in: weights; extracting them again" in capsys.readouterr().out
    copy = tmp_path / "copy"
    shutil.copytree(digits.root, copy)
    manifest = copy / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"name": "digits"', '"name": "others"'))
    bank(stage_one, open_dataset(copy), input=other)
    assert "differ in: dataset; extracting them again" in capsys.readouterr().out
    assert len(extracted) == 4 * number


@pytest.mark.parametrize("name", ["features.npy", "labels.npy", "seen.npy", "bank.json"])
def test_a_damaged_bank_is_made_anew(stage_one, digits, extracted, name):
    first = bank(stage_one, digits)[0].clone()  # a mapped file must not become shorter
    path = stage_one[0] / "features/val" / name
    path.write_bytes(path.read_bytes()[:100])
    extracted.clear()
    again, _ = bank(stage_one, digits)
    assert torch.equal(first, again)
    assert len(extracted) == len(again)


def test_views_show_each_image_several_times_differently(stage_one, digits):
    _, labels = bank(stage_one, digits, "train")
    thrice, labels_thrice = bank(stage_one, digits, "train", views=3)
    assert torch.equal(labels_thrice, labels.repeat_interleave(3))
    views_N3D = thrice.float().unflatten(0, (-1, 3))
    assert (views_N3D[:, 0] != views_N3D[:, 1]).any(1).float().mean() > 0.9
    split = digits.splits["train"]
    ids = np.array(split.by_class[:50])
    with open_loader(ViewPlan(split, ids, 50, 16, "shift", view=2), "torch", threads=0) as loader, torch.no_grad():
        expected = stage_one[1].features(next(loader)["eval"].images_BHWC)
    torch.testing.assert_close(views_N3D[:50, 2], expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("parts", [1, 3])
def test_what_an_image_looks_like_depends_on_no_other(digits, parts):
    split = digits.splits["train"]
    whole = ViewPlan(split, np.arange(len(split)), 7, 16, "shift", view=1)
    for ids in np.array_split(np.arange(len(split))[::-1], parts):
        part = ViewPlan(split, ids, 5, 16, "shift", view=1)
        draws = [part.draws(step)[0] for step in range(part.steps)]
        assert np.concatenate([draw.ids_B for draw in draws]).tolist() == ids.tolist()
        for draw in draws:
            np.testing.assert_array_equal(draw.windows_B4, whole.shown[0][draw.ids_B])
    other = ViewPlan(split, np.arange(len(split)), 7, 16, "shift", view=2)
    assert (other.shown[0] != whole.shown[0]).any()


KILLED = """
import os, sys
from pathlib import Path
from accelerate import Accelerator
from shards.index import open_dataset
from train.features import bank as features, rows
from train.engine.config import Input
from train.networks.model_files import load_model

rows.BATCHES_PER_SYNC = 2
take, left = features._features, [5]
def until_killed(*arguments):
    for batch in take(*arguments):
        if not left[0]:
            os.kill(os.getpid(), 9)
        left[0] -= 1
        yield batch
features._features = until_killed
input = Input(image_size=16, batch_size=16, loader="torch", threads=0)
run = Path(sys.argv[1])
features.feature_bank(run, load_model(run), open_dataset(sys.argv[2]), "val", input, Accelerator(cpu=True))
"""


def test_after_a_kill_only_what_is_missing_is_taken(stage_one, digits, extracted, capsys):
    run, _ = stage_one
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(run), str(digits.root)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == -9, killed.stderr
    input = Input(image_size=16, batch_size=16, loader="torch", threads=0)
    of = (*stage_one, digits, "val", input, Accelerator(cpu=True))
    to_take = module.rows_to_take(*of)
    features, _ = bank(stage_one, digits, input=input)
    assert (to_take, module.rows_to_take(*of)) == (len(features) - 4 * 16, 0)
    assert len(extracted) == len(features) - 4 * 16  # of five batches four were safe
    assert "resuming the features of val" in capsys.readouterr().out
    extracted.clear()
    shutil.rmtree(run / "features")
    whole, _ = bank(stage_one, digits, input=input)
    torch.testing.assert_close(features, whole, rtol=2e-3, atol=1e-3)


def test_images_that_are_left_out_leave_no_row(stage_one, digits, monkeypatch, capsys):
    take = module._features

    def without_the_first(*arguments):
        for ids_B, features_BD in take(*arguments):
            yield ids_B[1:], features_BD[1:]

    whole, labels = bank(stage_one, digits)
    shutil.rmtree(stage_one[0] / "features")
    monkeypatch.setattr(module, "_features", without_the_first)
    features, fewer = bank(stage_one, digits)
    batches = -(-len(labels) // INPUT.batch_size)
    assert len(features) == len(fewer) == len(labels) - batches
    place = np.empty(len(labels), int)
    place[digits.splits["val"].by_class] = np.arange(len(labels))
    kept = np.delete(np.arange(len(labels)), place[:: INPUT.batch_size])
    assert torch.equal(features, whole[kept])
    assert torch.equal(fewer, labels[kept])
    missing = f"{batches} of {len(labels)} features of val are missing, because their images did not decode; once they"
    assert missing in capsys.readouterr().out
    bank(stage_one, digits)  # which finds them, and says it again
    assert missing in capsys.readouterr().out


def test_somebody_elses_run_is_to_be_copied(stage_one, digits, permissions):
    stage_one[0].chmod(0o500)
    with pytest.raises(UserError, match=r"Permission denied\): .*; copy .*/run to where you may write, and name the"):
        bank(stage_one, digits)
    stage_one[0].chmod(0o700)


def test_a_full_disk_is_reported_and_leaves_nothing_half_written(stage_one, digits, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"No space left on device\): the features of val take 0\.00 GB; make room"):
        bank(stage_one, digits)
    assert not (stage_one[0] / "features/val/bank.json").exists()
    assert not (stage_one[0] / "features/val/features.npy").exists()


def test_features_beyond_half_precision_are_refused(stage_one, digits, monkeypatch):
    run, network = stage_one
    real = network.features
    monkeypatch.setattr(network, "features", lambda images: 1e6 * real(images))
    with pytest.raises(UserError, match=r"features of val reach from .* holds 65504 at most; .* has diverged"):
        bank(stage_one, digits)
    assert not json.loads((run / "features/val/bank.json").read_text())["complete"]


def test_two_stages_do_not_take_the_same_features_at_once(stage_one, digits):
    """Each would start the bank over, and the first to end would call the other's half complete."""
    run, _ = stage_one
    holding = "import sys, time; from pathlib import Path; from train.engine.runs import lock; lock(Path(sys.argv[1]))"
    (run / "features").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", f"{holding}; print('held', flush=True); time.sleep(60)", str(run / "features")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"features is in use by process \d+ on .*; wait until that ends"):
            bank(stage_one, digits)
    finally:
        other.kill()
        other.wait()
    features, _ = bank(stage_one, digits)
    assert len(features)
