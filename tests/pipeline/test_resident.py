import gc
import threading
import weakref
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import resident_loader
from pipeline.budget import free_memory, group_rooms
from pipeline.dali_loader import DaliLoader
from pipeline.kept import is_kept_with
from pipeline.loader import choose_loader, keep_resident, open_loader
from pipeline.pictures import decode
from pipeline.plan import EvalPlan, Stream, TrainPlan
from pipeline.reader import ShardReader
from pipeline.resident_loader import (
    Decoded,
    ResidentLoader,
    TooLargeError,
    bytes_to_come,
    decoded_of,
    let_go,
    resize_on_gpu,
    room_for,
)
from pipeline.windows import resize_windows
from shards.errors import UserError
from shards.index import Split, open_dataset

CPU = torch.device("cpu")


def two_streams(split: Split, augment: str, image_size: int, batch_size: int = 8) -> TrainPlan:
    streams = (Stream("uniform", 1.0, augment), Stream("reversed", -1.0, augment))
    return TrainPlan(split, streams, batch_size, image_size, seed=5, epochs=3)


@pytest.fixture
def fresh(photos, digits) -> dict[str, Split]:
    """Training splits of which nothing is kept: "photos" of several sizes, "digits" of one."""
    return {name: replace(dataset.splits["train"]) for name, dataset in (("photos", photos), ("digits", digits))}


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The samples that the resident loader decodes, as it does."""
    samples = []

    def note(split: Split, reader: ShardReader, sample: int) -> Image.Image:
        samples.append(sample)
        return decode(split, reader, sample)

    monkeypatch.setattr(resident_loader, "decode", note)
    return samples


@pytest.mark.parametrize("augment", ["cifar", "shift", "none", "cifar+trivial+cutout(4)"])
def test_pictures_that_need_no_resize_are_the_references_bit_by_bit(fresh, augment):
    plan = two_streams(fresh["digits"], augment, image_size=16)
    with open_loader(plan, "resident") as resident, open_loader(plan, "torch", threads=0) as reference:
        for ours, theirs in islice(zip(resident, reference, strict=False), plan.steps_per_epoch + 1):
            for name in plan.streams:
                assert torch.equal(ours[name].images_BHWC, theirs[name].images_BHWC)
                assert torch.equal(ours[name].labels_B, theirs[name].labels_B)
                np.testing.assert_array_equal(ours[name].ids_B, theirs[name].ids_B)


@pytest.mark.parametrize("name", ["photos", "digits"])
@pytest.mark.parametrize("one_size", [True, False])
def test_any_window_is_cut_as_pil_does(fresh, name, one_size):
    split, generator = fresh[name], np.random.default_rng(1)
    reader, images = ShardReader(split), decoded_of(split, CPU, None)
    pictures = [decode(split, reader, sample) for sample in range(20)]
    for sample, picture in enumerate(pictures):
        images.put(sample, np.array(picture))
    for _ in range(30):
        ids_B = generator.integers(20, size=6)
        reach = int(generator.integers(1, 15))
        windows_B4 = np.concatenate(
            [generator.integers(-reach, reach + 1, (6, 2)), generator.integers(1, 2 * reach, (6, 2))], axis=1
        ).astype(np.int32)
        if one_size:
            windows_B4[:, 2:] = windows_B4[0, 2:]
        for window, sample, (top, left, height, width) in zip(
            images.windows(ids_B, windows_B4), ids_B, windows_B4.tolist(), strict=True
        ):
            expected = pictures[sample].crop((left, top, left + width, top + height))
            np.testing.assert_array_equal(window, np.asarray(expected))


def test_every_image_is_decoded_once_for_all_loaders_of_a_split(fresh, decoded):
    split = fresh["photos"]
    for _ in range(2):
        with open_loader(EvalPlan(split, 5, 32), "resident", threads=1) as loader:
            list(loader)
        with open_loader(two_streams(split, "imagenet", 32), "resident") as loader:
            list(islice(loader, 20))
    assert sorted(decoded) == list(range(len(split)))


def test_the_first_batch_waits_for_its_own_images_only(fresh, decoded):
    with open_loader(two_streams(fresh["digits"], "none", 8), "resident") as loader:
        next(loader)
        assert len(decoded) <= 16 * (1 + resident_loader.STEPS_AHEAD) < len(fresh["digits"])


def test_evaluation_in_inference_mode_and_training_share_images(fresh):
    split = fresh["photos"]
    with torch.inference_mode(), open_loader(EvalPlan(split, 5, 32), "resident") as loader:
        next(loader)
    with open_loader(two_streams(split, "cifar", 32), "resident") as loader:
        images_BHWC = next(loader)["uniform"].images_BHWC
    assert not images_BHWC.is_inference()


def test_images_go_with_the_split(fresh):
    split = replace(fresh["photos"])
    images = weakref.ref(decoded_of(split, CPU, None))
    assert images() is decoded_of(split, CPU, None)
    with open_loader(EvalPlan(split, 5, 32), "resident") as loader:
        list(loader)
    assert images().to_come == 0
    del split, loader
    gc.collect()
    assert images() is None


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])  # accelerate's of one process, and of several
def test_images_are_let_go_whatever_their_device_is_called(fresh, monkeypatch, name):
    monkeypatch.setattr(resident_loader, "_alive", weakref.WeakSet())
    split, device = fresh["digits"], torch.device(name)
    keep_resident([split], device)
    size = decoded_of(split, CPU, None).size
    assert bytes_to_come(device) == size
    let_go(split, device)
    gc.collect()
    assert bytes_to_come(device) == 0
    assert not is_kept_with(split, (Decoded, CPU))


def test_threads_end_with_the_loader(fresh):
    before = threading.active_count()
    plan = two_streams(fresh["photos"], "imagenet", 32)
    for close in (True, False):
        loader = open_loader(plan, "resident")
        next(loader)
        assert threading.active_count() > before
        if close:
            loader.close()
            assert threading.active_count() == before
            with pytest.raises(StopIteration):
                next(loader)
        workers = [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]
        del loader
        gc.collect()
        for thread in workers:
            thread.join(timeout=5)
        assert threading.active_count() == before


def test_what_does_not_fit_is_refused_with_both_sizes(fresh, monkeypatch):
    monkeypatch.setattr(resident_loader, "_alive", weakref.WeakSet())
    # 16 x 16 pixels with a margin of 2
    size = 3 * 16 * 18 * len(fresh["digits"]) + 3 * 20
    plan = EvalPlan(fresh["digits"], 4, 8)
    message = rf"train take {size / 1e9:.3g} GB decoded .* may use 1e-05 GB on cpu; .*--input.resident_gb"
    with pytest.raises(TooLargeError, match=message) as raised:
        open_loader(plan, "resident", resident_gb=1e-5)
    assert isinstance(raised.value, UserError)
    assert "\n" not in str(raised.value)
    with open_loader(plan, "auto", resident_gb=1e-5) as loader:
        assert isinstance(loader, DaliLoader)
    with open_loader(plan, "resident", resident_gb=size / 1e9) as loader:
        assert decoded_of(fresh["digits"], CPU, None).size == size
    # What is kept needs no room any more, and counts against what else there is.
    with open_loader(plan, "auto", resident_gb=1e-5) as loader:
        assert isinstance(loader, ResidentLoader)
    with pytest.raises(TooLargeError, match="may use 0 GB on cpu"):
        open_loader(EvalPlan(replace(fresh["digits"]), 4, 8), "resident", resident_gb=size / 1e9)


def test_the_default_is_a_quarter_of_what_is_free_for_all_processes(fresh, monkeypatch):
    monkeypatch.setattr(resident_loader, "_alive", weakref.WeakSet())
    size = decoded_of(replace(fresh["digits"]), CPU, None).size  # alive no more: nobody holds it
    gc.collect()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(resident_loader, "free_memory", lambda device: 12 * size - 1)
    with pytest.raises(TooLargeError):
        decoded_of(fresh["digits"], CPU, None)
    monkeypatch.setattr(resident_loader, "free_memory", lambda device: 12 * size)
    images = decoded_of(fresh["digits"], CPU, None)
    # A quarter of what was free: what the first split was promised is still free, but not for others.
    another = replace(fresh["digits"])
    with pytest.raises(TooLargeError):
        decoded_of(another, CPU, None)
    images.there_N[:] = True
    monkeypatch.setattr(resident_loader, "free_memory", lambda device: (12 - 3) * size)
    with pytest.raises(TooLargeError):
        decoded_of(another, CPU, None)
    monkeypatch.setattr(resident_loader, "free_memory", lambda device: (24 - 3) * size)
    decoded_of(another, CPU, None)


def test_no_more_is_promised_than_is_free(fresh, monkeypatch):
    monkeypatch.setattr(resident_loader, "_alive", weakref.WeakSet())
    monkeypatch.setattr(resident_loader, "free_memory", lambda device: 1000)
    with pytest.raises(TooLargeError, match="may use 1e-06 GB on cpu"):
        decoded_of(fresh["digits"], CPU, 500.0)


def test_auto_is_one_loader_for_all_splits_of_a_run(digits, monkeypatch):
    monkeypatch.setattr(resident_loader, "_alive", weakref.WeakSet())
    splits = [replace(split) for split in digits.splits.values()]
    size, _ = room_for(splits, CPU, None)
    chosen, why = choose_loader(splits, "cpu", (size - 1) / 1e9)
    assert chosen == "dali"
    assert why == f"{size / 1e9:.3g} GB of decoded images, room for {size / 1e9:.3g} GB on cpu"
    assert not resident_loader._alive  # nothing is set aside for what is not taken
    assert choose_loader(splits, "cpu", size / 1e9, agree=lambda mine: "dali")[0] == "dali"
    assert not resident_loader._alive
    assert choose_loader(splits, "cpu", size / 1e9)[0] == "resident"
    # All of it is promised: no later opening decides otherwise, whatever has become of the memory.
    monkeypatch.setattr(resident_loader, "free_memory", lambda device: 0)
    for split in splits:
        with open_loader(EvalPlan(split, 4, 16), "resident") as loader:
            next(loader)


def test_auto_is_torch_where_dali_is_not_installed(digits, monkeypatch):
    monkeypatch.setattr("pipeline.loader.find_spec", lambda name: None)
    assert choose_loader([replace(digits.splits["val"])], "cpu", 1e-9)[0] == "torch"


def test_an_empty_evaluation_needs_nothing(photos):
    split = photos.splits["test"]
    empty = replace(split, samples=split.samples[:0], by_class=split.by_class[:0], class_counts=0 * split.class_counts)
    with open_loader(EvalPlan(empty, 4, 32), "resident") as loader:
        assert list(loader) == []
    assert decoded_of(empty, CPU, None).to_come == 0


def test_resizing_for_a_gpu_gives_the_same_pictures(fresh):
    generator = np.random.default_rng(0)
    windows = [
        torch.from_numpy(generator.integers(0, 256, (*generator.integers(5, 90, 2), 3), dtype=np.uint8))
        for _ in range(20)
    ]
    expected_BHWC = torch.empty((20, 32, 32, 3), dtype=torch.uint8)
    resize_windows(windows, expected_BHWC)
    images_BHWC = resize_on_gpu(windows, 32)
    assert images_BHWC.dtype == torch.uint8
    assert images_BHWC.is_contiguous()
    assert (images_BHWC.float() - expected_BHWC.float()).abs().mean() < 0.3
    batch_BHWC = torch.stack([windows[0], windows[0].flip(0)])
    torch.testing.assert_close(resize_on_gpu(batch_BHWC, 32)[0], images_BHWC[0], rtol=0, atol=1)


def test_a_decoded_image_holds_what_the_buffer_says(fresh):
    images = decoded_of(fresh["photos"], CPU, None)
    assert isinstance(images, Decoded)
    assert images.lacking(np.array([3, 1, 3])) == [1, 3]
    images.put(1, np.array(decode(fresh["photos"], ShardReader(fresh["photos"]), 1)))
    assert images.lacking(np.array([3, 1, 3])) == [3]


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_limits_of_control_groups_are_minded(tmp_path):
    stat = "anon 5\ninactive_file 30\nactive_file 7\n"
    write(tmp_path / "job", memory__max="1000\n", memory__current="130\n", memory__stat=stat)
    write(tmp_path / "job" / "step", memory__max="max\n", memory__current="90\n", memory__stat=stat)
    assert group_rooms("0::/job/step\n", tmp_path) == [900]
    assert group_rooms("0::/\n", tmp_path) == []
    old = {"memory__limit_in_bytes": "500", "memory__usage_in_bytes": "600", "memory__stat": "total_inactive_file 40"}
    write(tmp_path / "memory", **old)
    assert group_rooms("5:devices:/x\n4:cpu,memory:/no/such/folder\n", tmp_path) == [0]


def test_some_memory_is_free_here():
    assert 1e6 < free_memory(CPU) < 1e15


def test_memory_is_known_where_there_are_no_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.budget.GROUPS", tmp_path / "none")
    assert 1e6 < free_memory(CPU) < 1e15


def test_a_resident_loader_that_is_asked_for_is_settled_for_all_splits_before_the_run(digits, monkeypatch):
    monkeypatch.setattr(resident_loader, "_alive", weakref.WeakSet())
    dataset = open_dataset(digits.root)
    size, _ = room_for(list(dataset.splits.values()), CPU, None)
    monkeypatch.setattr(resident_loader, "free_memory", lambda device: 5 * size)
    keep_resident(dataset.splits.values(), CPU)
    monkeypatch.setattr(resident_loader, "free_memory", lambda device: 0)  # what training leaves
    for split in dataset.splits.values():
        with open_loader(EvalPlan(split, 4, 16), "resident") as loader:
            next(loader)
