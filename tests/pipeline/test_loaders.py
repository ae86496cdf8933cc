import multiprocessing
import os
import shutil
import signal
import struct
from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn
from PIL import Image

from pipeline import torch_loader
from pipeline.augment import find_recipe
from pipeline.dali_loader import build_pipeline
from pipeline.loader import REMOTE_WINDOW, open_loader, windowed
from pipeline.plan import EvalPlan, Stream, TrainPlan
from shards.build import build
from shards.errors import UserError
from shards.index import Dataset, open_dataset
from shards.remote import RemoteShards
from shards.verify import verify

KINDS = ("dali", "resident", "torch")


def both_streams(dataset: Dataset, augment: str, image_size: int, batch_size: int = 8, **options) -> TrainPlan:
    streams = (Stream("uniform", 1.0, augment), Stream("reversed", -1.0, augment))
    return TrainPlan(dataset.splits["train"], streams, batch_size, image_size, seed=5, epochs=3, **options)


def load(plan, kind: str, steps: int | None = None, start_step: int = 0):
    with open_loader(plan, kind, threads=0 if kind == "torch" else 2, start_step=start_step) as loader:
        return [
            {name: (b.images_BHWC.clone(), b.labels_B.clone(), b.ids_B.copy()) for name, b in step.items()}
            for step in islice(loader, steps)
        ]


@pytest.mark.parametrize("kind", ["dali", "resident"])
@pytest.mark.parametrize(
    ("source", "augment", "image_size"),
    [
        ("photos", "imagenet", 64),
        ("photos", "cifar", 32),
        ("photos", "none", 48),
        ("photos", "centre(0.8)+bicubic", 64),
        ("photos", "strong", 64),
        ("photos", "imagenet+rand(2,9)", 64),
        ("photos", "cifar+autoaugment+cutout(16)", 32),
        ("photos", "imagenet+strong+trivial", 48),
        ("digits", "shift", 16),
    ],
)
def test_loaders_show_the_same_pictures(source, augment, image_size, kind, request):
    dataset = request.getfixturevalue(source)
    plan = both_streams(dataset, augment, image_size)
    steps = plan.steps_per_epoch + 1  # across an epoch's end
    shown, reference = load(plan, kind, steps), load(plan, "torch", steps)
    assert len(shown) == len(reference) == steps
    differences = []
    for ours, theirs in zip(shown, reference, strict=True):
        assert list(ours) == list(theirs) == ["uniform", "reversed"]
        for name in ours:
            images, labels, ids = ours[name]
            np.testing.assert_array_equal(ids, theirs[name][2])
            assert torch.equal(labels, theirs[name][1])
            np.testing.assert_array_equal(labels, dataset.splits["train"].samples["label"][ids])
            assert images.dtype == torch.uint8
            assert images.shape == theirs[name][0].shape == (8, image_size, image_size, 3)
            # Windows and flips are the same exactly where the pictures are, up to resampling.
            differences.append((images.float() - theirs[name][0].float()).abs().mean(dim=(1, 2, 3)))
    mean, most = (1.0, 3.0) if kind == "dali" else (0.3, 1.0)  # the resident loader decodes as the reference does
    assert torch.cat(differences).mean() < mean
    assert torch.cat(differences).max() < most


def test_loaders_pad_with_black_alike(photos):
    plan = both_streams(photos, "cifar", 32)
    windows = plan.draws(0)[0].windows_B4
    # Two or more rows of padding: the resampling of the first row reaches no pixel of the image.
    padded = torch.from_numpy(-windows[:, 0] / windows[:, 2] * 32 >= 1.9)
    assert padded.any()
    for kind in KINDS:
        images = load(plan, kind, 1)[0]["uniform"][0]
        assert (images[padded, 0] == 0).all()
        assert (images[~padded, 0] > 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_opened_in_the_middle_goes_on_as_the_whole_one(digits, kind):
    plan = both_streams(digits, "shift", 16, batch_size=64)
    start = plan.steps_per_epoch - 2
    whole, rest = load(plan, kind, start + 5), load(plan, kind, 5, start_step=start)
    for ours, theirs in zip(rest, whole[start:], strict=True):
        for name in ours:
            assert torch.equal(ours[name][0], theirs[name][0])
            np.testing.assert_array_equal(ours[name][2], theirs[name][2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000])
def test_evaluation_ends_after_every_sample_was_seen_once(photos, kind, batch_size):
    split = photos.splits["test"]
    steps = load(EvalPlan(split, batch_size, 32, "eval"), kind)
    np.testing.assert_array_equal(np.concatenate([s["eval"][2] for s in steps]), np.arange(len(split)))
    np.testing.assert_array_equal(torch.cat([s["eval"][1] for s in steps]), split.samples["label"])
    assert sum(len(s["eval"][0]) for s in steps) == len(split)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_samples_gets_an_empty_evaluation(photos, kind):
    split = photos.splits["test"]
    plan = EvalPlan(split, 4, 32, rank=0, world_size=len(split) + 1)
    assert plan.steps == 0
    assert load(plan, kind) == []


def turned(image: Image.Image, count: int) -> bytes:
    """A JPEG whose EXIF block says so and says it wrongly: PIL leaves the picture alone, and DALI would turn it."""
    buffer = BytesIO()
    image.save(buffer, "JPEG")
    block = b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHIHHI", 0x112, 3, count, 6, 0, 0)
    return b"\xff\xd8\xff\xe1" + struct.pack(">H", len(block) + 2) + block + buffer.getvalue()[2:]


@pytest.mark.parametrize("augment", ["imagenet", "cifar"])
def test_no_loader_turns_what_is_stored(tmp_path, augment):
    generator = np.random.default_rng(0)
    for i in range(8):
        noise = Image.fromarray(generator.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize((90, 60))
        path = tmp_path / "source" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(turned(noise, count=0))
    out = build("folder", source=tmp_path / "source", out=tmp_path / "out", test_fraction=0, val_fraction=0, workers=1)
    plan = both_streams(open_dataset(out), augment, 32, batch_size=4)
    for dali, torchs in zip(load(plan, "dali", 4), load(plan, "torch", 4), strict=True):
        for name, (images, *_) in torchs.items():
            assert (images.int() - dali[name][0].int()).abs().float().mean() < 1


def test_batches_that_only_dali_refuses_are_pils_and_named_when_there_are_too_many(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("shards.encode.markers_follow", lambda data: True)  # as an older build, which let these in
    for i in range(8):
        buffer = BytesIO()
        Image.new("RGB", (40, 30), (20 * i, 90, 30)).save(buffer, "JPEG")
        path = tmp_path / "source" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue().replace(b"\xff\xdb", b"\0\xff\xdb", 1))
    out = build("folder", source=tmp_path / "source", out=tmp_path / "out", test_fraction=0, val_fraction=0, workers=1)
    plan = both_streams(open_dataset(out), "imagenet", 32, batch_size=4)
    with open_loader(plan, "dali", fault_limit=2) as loader:
        for step, shown in zip(islice(loader, 2), load(plan, "torch", 2), strict=True):
            assert torch.equal(step["reversed"].images_BHWC, shown["reversed"][0])
        with pytest.raises(UserError, match=r"run: tailstream verify .*, or use --input.loader torch") as raised:
            next(loader)
    assert "\n" not in str(raised.value)
    assert "DALI failed on a batch that PIL decodes, and PIL's was taken" in capfd.readouterr().err
    monkeypatch.undo()
    assert len(verify(out, workers=1)) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_batches_stay_valid_after_the_loader_went_on(digits, kind):
    plan = both_streams(digits, "none", 16)
    with open_loader(plan, kind, threads=0 if kind == "torch" else 1) as loader:
        kept = [next(loader)["uniform"].images_BHWC for _ in range(12)]
    for images, again in zip(kept, load(plan, kind, 12), strict=True):
        assert torch.equal(images, again["uniform"][0])


@pytest.mark.parametrize("augment", ["shift", "cifar+autoaugment+cutout(4)"])
def test_worker_processes_change_nothing(digits, augment):
    plan = both_streams(digits, augment, 16)
    with open_loader(plan, "torch", threads=2) as loader:
        with_workers = [step["reversed"].images_BHWC for step in islice(loader, 6)]
    for images, alone in zip(with_workers, load(plan, "torch", 6), strict=True):
        assert torch.equal(images, alone["reversed"][0])


def test_batches_go_through_pipes_where_shared_memory_is_small(digits, monkeypatch, capsys):
    plan, sent, as_tensor = both_streams(digits, "shift", 16), [], torch.as_tensor

    def keep_type(images):
        sent.append(type(images))
        return as_tensor(images)

    monkeypatch.setattr(torch_loader.torch, "as_tensor", keep_type)
    enough = (2 + 2) * 2 * 8 * 16 * 16 * 3  # bytes: two steps ahead and two under way, of two streams of eight images
    for free, kind, said in ((enough, torch.Tensor, ""), (enough - 1, np.ndarray, "note: /dev/shm has ")):
        monkeypatch.setattr(torch_loader, "_shared_memory", lambda free=free: free)
        with open_loader(plan, "torch", threads=1) as loader:
            shown = [step["reversed"].images_BHWC for step in islice(loader, 2)]
        assert sent == [kind] * 4
        assert capsys.readouterr().err.startswith(said)
        for images, alone in zip(shown, load(plan, "torch", 2), strict=True):
            assert torch.equal(images, alone["reversed"][0])
        sent.clear()


def test_a_worker_process_that_hangs_ends_with_its_loader(digits):
    others = set(multiprocessing.active_children())
    loader = open_loader(both_streams(digits, "shift", 16), "torch", threads=1)
    (worker,) = set(multiprocessing.active_children()) - others
    next(loader)
    os.kill(worker.pid, signal.SIGSTOP)
    loader.close()
    worker.join(5)
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("kind", KINDS)
def test_opening_a_loader_takes_no_random_number_of_a_method(digits, kind):
    before = torch.get_rng_state()
    load(both_streams(digits, "cifar+rand(1,5)", 16), kind, 2)
    assert torch.equal(torch.get_rng_state(), before)


def damaged(dataset: Dataset, tmp_path: Path, how: str) -> Dataset:
    root = tmp_path / "copy"
    shutil.copytree(dataset.root, root)
    shard = root / "train-000000.tar"
    match how:
        case "missing":
            shard.unlink()
        case "shortened":
            shard.write_bytes(shard.read_bytes()[:2000])
    return open_dataset(root)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "train-000000.tar cannot be read"),
        ("shortened", "train-000000.tar is 2000 bytes long but the index points to byte"),
    ],
)
def test_damaged_shards_are_named(photos, tmp_path, kind, how, message):
    plan = both_streams(damaged(photos, tmp_path, how), "imagenet", 32)
    with pytest.raises(UserError, match=message) as raised:
        load(plan, kind, 3 * plan.steps_per_epoch)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_out_of_range_are_named(photos, kind):
    with pytest.raises(UserError, match="threads=-1"):
        open_loader(EvalPlan(photos.splits["test"], 4, 32), kind, threads=-1)


@pytest.mark.parametrize("augment", ["imagenet", "none", "cifar"])
def test_whole_images_and_windows_of_them_are_decoded_alike(photos, augment):
    plan = both_streams(photos, augment, 64)
    shown = []
    for decode in ("window", "whole"):
        with open_loader(plan, "dali", decode=decode) as loader:
            shown.append([{name: batch.images_BHWC.clone() for name, batch in s.items()} for s in islice(loader, 4)])
    for window, whole in zip(*shown, strict=True):
        for name in plan.streams:
            difference = (window[name].float() - whole[name].float()).abs()
            assert difference.mean() < 0.2  # chroma at a window's border is interpolated with less around it


def test_files_of_any_size_are_decoded_whole():
    """Above 16 MiB not every size is a float32."""
    buffer = BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "PNG")
    file = np.frombuffer(buffer.getvalue().ljust(2**24 + 1, b"\0"), dtype=np.uint8)
    feed = [file], *np.zeros((3, 1, 2), dtype=np.int32)
    pipeline = build_pipeline(lambda: feed, find_recipe("cifar"), 1, 32, 1, None)
    (images,) = pipeline.run()
    assert images.shape() == [(20, 30, 3)]


@pytest.mark.parametrize("gpu", [None, 0])
@pytest.mark.parametrize("recipe", ["imagenet", "cifar"])
def test_whole_decoding_has_no_region_decoder(gpu, recipe, monkeypatch):
    used = []
    for name in ("image", "image_slice"):
        operator = getattr(fn.decoders, name)
        monkeypatch.setattr(fn.decoders, name, lambda *a, _n=name, _o=operator, **k: used.append(_n) or _o(*a, **k))
    monkeypatch.setattr(Pipeline, "build", lambda self: None)  # a GPU's pipeline is defined without one
    build_pipeline(lambda: None, find_recipe(recipe), 4, 32, 1, gpu, decode="whole")
    assert used == ["image"]
    build_pipeline(lambda: None, find_recipe("imagenet"), 4, 32, 1, gpu, decode="window")
    assert used == ["image", "image_slice"]


def test_whole_images_are_decoded_on_gpus_unless_windows_are_asked_for(photos, monkeypatch):
    asked = []
    monkeypatch.setattr("pipeline.dali_loader.DaliLoader", lambda *arguments: asked.append(arguments[-1]))
    monkeypatch.setattr(torch, "empty", lambda *size, device: SimpleNamespace(device=torch.device(device)))
    plan = EvalPlan(photos.splits["test"], 4, 32)
    for device, decode in (("cpu", "auto"), ("cuda:0", "auto"), ("cuda:0", "window"), ("cpu", "whole")):
        open_loader(plan, "dali", device, decode=decode)
    assert asked == ["window", "whole", "window", "whole"]


def test_epochs_of_the_data_as_it_is_keep_to_a_window_of_shards(photos):
    here = photos.splits["train"]
    behind_a_url = replace(here, remote=RemoteShards("memory://x", ()))
    uniform, reversed_, own = Stream("uniform"), Stream("reversed", q=-1.0), Stream("own", shard_window=3)
    again = Stream("again", repeats="uniform")

    def windows(split, asked, *streams):
        shown = windowed(streams, split, asked)
        assert [stream.name for stream in shown] == [stream.name for stream in streams]
        TrainPlan(split, shown, 4, 16, seed=0, epochs=1).draws(0)
        return [stream.shard_window for stream in shown]

    assert windows(here, None, uniform, reversed_, own, again) == [None, None, 3, None]
    assert windows(here, 2, uniform, reversed_, own, again) == [2, None, 3, None]
    assert windows(behind_a_url, None, uniform, own, again) == [REMOTE_WINDOW, 3, None]
    assert windows(behind_a_url, 0, uniform) == [None]
    # The reversed stream wants all shards anyway.
    assert windows(behind_a_url, None, uniform, reversed_) == [None, None]
    assert windows(behind_a_url, 2, uniform, reversed_) == [2, None]
