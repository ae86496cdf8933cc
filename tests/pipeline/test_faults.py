import gc
import io
import shutil
import weakref
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from pipeline.faults import Faults, faults_of
from pipeline.loader import open_loader
from pipeline.mix import Mixup, Remix
from pipeline.pictures import UndecodableError, decode, show_windows
from pipeline.plan import Draw, EvalPlan, Stream, TrainPlan
from pipeline.reader import ShardReader
from shards.build import build
from shards.errors import UserError
from shards.index import Split, open_dataset


@pytest.fixture
def dataset(photos, tmp_path):
    """A copy that may be damaged."""
    return open_dataset(shutil.copytree(photos.root, tmp_path / "copy"))


def spoil(split: Split, *samples: int) -> None:
    """Overwrite the stored images with zeros."""
    for sample in samples:
        row = split.samples[sample]
        with split.shard_paths[row["shard"]].open("r+b") as shard:
            shard.seek(row["offset"])
            shard.write(bytes(int(row["size"])))


def train_plan(split: Split, q: float = 1.0, batch_size: int = 7, augment: str = "imagenet", **options) -> TrainPlan:
    return TrainPlan(split, (Stream("only", q, augment),), batch_size, 32, seed=3, epochs=1, **options)


def class_ring(split: Split, sample: int) -> list[int]:
    """The ids of the sample's class, from the sample on."""
    ids = np.flatnonzero(split.samples["label"] == split.samples["label"][sample]).tolist()
    at = ids.index(sample)
    return ids[at:] + ids[:at]


def marked(split: Split, *samples: int) -> Faults:
    faults = Faults(limit=100)
    for sample in samples:
        faults.add(split, UndecodableError(sample, "zeroed"))
    return faults


def test_a_sound_draw_is_left_alone(photos):
    plan = train_plan(photos.splits["train"])
    (draw,) = plan.draws(0)
    assert marked(plan.split).replace(plan, draw) is draw
    other = next(sample for sample in range(len(plan.split)) if sample not in draw.ids_B)
    assert marked(plan.split, other).replace(plan, draw) is draw


def test_training_shows_the_next_image_of_the_class(photos):
    plan = train_plan(photos.splits["train"])
    (draw,) = plan.draws(0)
    bad = int(draw.ids_B[2])
    faults = marked(plan.split, bad)
    replaced = faults.replace(plan, draw)
    assert replaced.ids_B[2] == class_ring(plan.split, bad)[1]
    others = np.arange(7) != 2
    np.testing.assert_array_equal(replaced.ids_B[others], draw.ids_B[others])
    np.testing.assert_array_equal(replaced.windows_B4[others], draw.windows_B4[others])
    np.testing.assert_array_equal(replaced.flips_B, draw.flips_B)


def test_the_class_is_a_ring(photos):
    split = photos.splits["train"]
    plan = train_plan(split)
    ring = class_ring(split, int(np.flatnonzero(split.samples["label"] == 0)[-1]))
    faults = marked(split, *ring[:3])
    draw = Draw(np.array(ring[:1]), np.array([[0, 0, 9, 9]], dtype=np.int32), np.array([False]))
    assert faults.replace(plan, draw).ids_B.tolist() == ring[3:4]


def test_the_replacement_shows_the_same_part_of_itself(photos):
    split = photos.splits["train"]
    plan = train_plan(split)
    for sample in range(len(split)):
        bad, good = split.samples[sample], split.samples[class_ring(split, sample)[1]]
        height, width = int(bad["height"]), int(bad["width"])
        windows = [[0, 0, height, width], [height // 2, width // 2, height - height // 2, 1], [-4, -9, 20, 30]]
        draw = Draw(np.full(3, sample), np.array(windows, dtype=np.int32), np.zeros(3, dtype=bool))
        whole, corner, padded = marked(split, sample).replace(plan, draw).windows_B4.tolist()
        assert whole == [0, 0, good["height"], good["width"]]
        assert corner[0] + corner[2] == good["height"]
        assert 0 <= corner[1] < corner[1] + corner[3] <= good["width"]
        assert padded[0] == pytest.approx(-4 * good["height"] / height, abs=1)
        assert padded[3] == pytest.approx(30 * good["width"] / width, abs=1)
        assert min(padded[:2]) < 0


def test_a_class_without_a_good_image_gives_its_place_to_the_next_of_the_batch(photos):
    split = photos.splits["train"]
    plan = train_plan(split)
    lost = np.flatnonzero(split.samples["label"] == 0)
    others = np.flatnonzero(split.samples["label"] != 0)[:2]
    ids_B = np.array([lost[0], others[0], lost[1], lost[0], others[1], lost[0]])
    draw = Draw(ids_B, np.tile(np.array([0, 0, 5, 5], dtype=np.int32), (6, 1)), np.arange(6) % 2 == 0)
    replaced = marked(split, *lost.tolist()).replace(plan, draw)
    np.testing.assert_array_equal(replaced.ids_B, others[[0, 0, 1, 1, 1, 0]])
    np.testing.assert_array_equal(replaced.flips_B, draw.flips_B[[1, 1, 4, 4, 4, 1]])
    with pytest.raises(
        UserError, match=r"^no image of a batch of train decodes: the image at byte .* run: tailstream verify"
    ):
        marked(split, *range(len(split))).replace(plan, draw)


def test_evaluation_leaves_bad_images_out(photos):
    split = photos.splits["test"]
    plan = EvalPlan(split, 5, 32)
    (draw,) = plan.draws(1)
    faults = marked(split, 6, 0)
    assert faults.replace(plan, draw).ids_B.tolist() == [5, 7, 8, 9]
    faults.count(draw)
    assert faults.times == {6: 1}
    images_BHWC, shown = marked(split, *range(11)).rescue(plan, ShardReader(split), draw)
    assert images_BHWC.shape == (0, 32, 32, 3)
    assert not len(shown.ids_B)


def test_rescue_finds_the_bad_images_by_itself(dataset):
    split = dataset.splits["train"]
    plan = train_plan(split, q=-1.0, batch_size=16)
    (draw,) = plan.draws(0)
    bad = np.unique(draw.ids_B)[[0, 2]].tolist()
    spoil(split, *bad)
    faults = Faults(limit=2)
    images_BHWC, shown = faults.rescue(plan, ShardReader(split), draw)
    np.testing.assert_array_equal(split.samples["label"][shown.ids_B], split.samples["label"][draw.ids_B])
    assert not set(bad) & set(shown.ids_B.tolist())
    assert images_BHWC.equal(show_windows(split, ShardReader(split), shown, 32))
    faults.count(draw)
    assert faults.times == {sample: (draw.ids_B == sample).sum() for sample in bad}
    # What was known before makes no difference.
    known = marked(split, *bad)
    np.testing.assert_array_equal(known.replace(plan, draw).ids_B, shown.ids_B)
    np.testing.assert_array_equal(known.replace(plan, draw).windows_B4, shown.windows_B4)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\xff\xd8\xff\xe0\x00\x10JFIF"])
def test_whatever_pil_says_is_one_line(dataset, content):
    split = dataset.splits["train"]
    spoil(split, 0)
    with split.shard_paths[0].open("r+b") as shard:
        shard.seek(split.samples["offset"][0])
        shard.write(content)
    with pytest.raises(UndecodableError) as raised:
        decode(split, ShardReader(split), 0)
    assert raised.value.sample == 0
    assert raised.value.reason
    assert "\n" not in raised.value.reason
    assert "0x" not in raised.value.reason


def test_a_picture_of_another_size_than_the_index_says_is_bad(dataset):
    samples = np.array(dataset.splits["train"].samples)
    samples["height"][0] += 1
    split = replace(dataset.splits["train"], samples=samples)
    with pytest.raises(UndecodableError, match=rf"sample 0: \d+x{samples['height'][0] - 1} pixels, not \d+x"):
        decode(split, ShardReader(split), 0)


def test_bad_images_are_reported_once_and_up_to_a_limit(photos, capsys):
    split = photos.splits["train"]
    faults = marked(split, 4, 1)
    faults.limit = 2
    faults.check()
    faults.check()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"warning: the image at byte {split.samples['offset'][1]} of {split.shard_paths[0]}")
    assert lines[0].endswith("(sample 1) does not decode (zeroed)")
    with pytest.raises(UserError, match=r"^3 images do not decode and input.fault_limit is 2: .*sample 1.* verify /"):
        faults.add(split, UndecodableError(2, "zeroed"))
    assert [row["sample"] for row in faults.rows()] == [1, 2, 4]
    assert faults.rows()[0]["shard"] == "train-000000.tar"


def test_a_copy_in_pinned_memory_counts_what_was_counted(photos):
    # What the DataLoader's thread does with a worker's step before a GPU; without tensors it needs none.
    plan = train_plan(photos.splits["train"])
    (draw,) = plan.draws(0)
    worker, record = (marked(plan.split, int(draw.ids_B[0])) for _ in range(2))
    worker.count(draw)
    record.merge(*pin_memory(worker.take()))
    assert record.times == {int(draw.ids_B[0]): 1}


def test_what_decodes_again_or_is_of_another_build_is_bad_no_more(dataset, capsys):
    split = dataset.splits["train"]
    spoil(split, 1)
    rows = [row | {"times": 3} for row in marked(split, 1, 2, 4).rows()]
    rows[2]["byte"] += 512
    faults = Faults(limit=1)
    faults.recall(split, [*rows, rows[0] | {"sample": len(split)}], counted=True)
    faults.check()
    assert list(faults.bad) == [1]
    assert faults.rows() == rows[:2]  # a run in which it was bad says so
    assert capsys.readouterr().err.count("does not decode") == 1


def test_rescue_stops_at_the_limit(dataset):
    split = dataset.splits["train"]
    spoil(split, *range(len(split)))
    plan = train_plan(split)
    with pytest.raises(UserError, match=r"^6 images do not decode and input.fault_limit is 5: .*, 3 more; run"):
        Faults(limit=5).rescue(plan, ShardReader(split), plan.draws(0)[0])


def test_loaders_of_a_split_share_one_record_that_goes_with_the_split(dataset, digits):
    split = dataset.splits["train"]
    assert faults_of(split) is faults_of(split)
    assert faults_of(split) is not faults_of(dataset.splits["test"])
    assert faults_of(split).limit == 10
    record = weakref.ref(faults_of(replace(split)))
    gc.collect()
    assert record() is None


LOADERS = {
    "dali": {"kind": "dali"},
    "resident": {"kind": "resident"},
    "torch": {"kind": "torch", "threads": 0},
    "workers": {"kind": "torch", "threads": 2},
}


@pytest.fixture(params=LOADERS)
def loading(request) -> dict:
    """How to open each loader."""
    return LOADERS[request.param]


def test_a_stream_keeps_its_classes_over_bad_images(dataset, loading, capfd):
    split = dataset.splits["train"]
    bad = [0, int(np.flatnonzero(split.samples["label"] != split.samples["label"][0])[0])]
    spoil(split, *bad)
    plan = train_plan(split, q=0.0, batch_size=8)
    with open_loader(plan, **loading) as loader:
        steps = [step["only"] for step in islice(loader, 12)]
        rows = loader.faults.rows()
    drawn = np.concatenate([plan.draws(step)[0].ids_B for step in range(12)])
    shown = np.concatenate([batch.ids_B for batch in steps])
    np.testing.assert_array_equal(split.samples["label"][shown], split.samples["label"][drawn])
    np.testing.assert_array_equal(torch.cat([batch.labels_B for batch in steps]), split.samples["label"][drawn])
    np.testing.assert_array_equal(shown != drawn, np.isin(drawn, bad))
    assert [row["sample"] for row in rows] == bad
    assert [row["times"] for row in rows] == [(drawn == sample).sum() for sample in bad]
    lines = [line for line in capfd.readouterr().err.splitlines() if "does not decode" in line]
    assert len(lines) == len(bad)


def test_mixed_labels_are_those_of_the_images_that_are_shown(dataset, loading):
    """Also where a whole class does not decode, and its places go to images of other classes."""
    split = dataset.splits["train"]
    lost = [*np.flatnonzero(split.samples["label"] == 0).tolist(), int(split.by_class[-1])]
    spoil(split, *lost)
    streams = (
        Stream("mixed", 0.0, mix=Remix(per_image=True)),
        Stream("of two", 0.0, mix=Mixup(partner="mixed")),
    )
    plan = TrainPlan(split, streams, 8, 32, seed=3, epochs=1)
    with open_loader(plan, fault_limit=100, **loading) as loader:
        steps = list(islice(loader, 4))
    labels_N = split.samples["label"].astype(np.int64)
    for number, step in enumerate(steps):
        mixed, of_two = step["mixed"], step["of two"]
        assert not set(lost) & {*mixed.ids_B.tolist(), *of_two.ids_B.tolist()}
        partners_B = labels_N[mixed.ids_B[np.arange(8) ^ 1]]
        np.testing.assert_array_equal(mixed.labels_B, labels_N[mixed.ids_B])
        np.testing.assert_array_equal(mixed.partners_B, partners_B)
        np.testing.assert_array_equal(of_two.partners_B, labels_N[mixed.ids_B])
        draw = faults_of(split).replace(plan, plan.draws(number)[0])
        np.testing.assert_array_equal(draw.ids_B, mixed.ids_B)
        np.testing.assert_array_equal(
            mixed.shares_B, Remix().label_shares(draw.mixing_B, labels_N[draw.ids_B], partners_B, split.class_counts)
        )


def test_evaluation_goes_on_without_bad_images(dataset, loading):
    split = dataset.splits["test"]
    bad = [2, 4, 5]  # the batch of 4 and 5 is empty then
    spoil(split, *bad)
    with open_loader(EvalPlan(split, 2, 32), **loading) as loader:
        batches = [step["eval"] for step in loader]
    assert [batch.ids_B.tolist() for batch in batches] == [[0, 1], [3], [6, 7], [8, 9], [10]]
    assert all(len(batch.images_BHWC) == len(batch.labels_B) == len(batch.ids_B) for batch in batches)
    assert loader.faults.times == dict.fromkeys(bad, 1)


def test_a_resumed_stream_replaces_alike(dataset, loading):
    split = dataset.splits["train"]
    spoil(split, *range(6))
    plan = train_plan(split, q=-1.0, batch_size=16, augment="none")
    with open_loader(plan, **loading) as whole:
        expected = list(islice(whole, 6))[4:]
    with open_loader(replace(plan, split=replace(split)), start_step=4, **loading) as resumed:
        for ours, theirs in zip(islice(resumed, 2), expected, strict=True):
            np.testing.assert_array_equal(ours["only"].ids_B, theirs["only"].ids_B)
            assert ours["only"].images_BHWC.equal(theirs["only"].images_BHWC)


def test_pictures_do_not_depend_on_which_bad_images_were_known_when_they_were_read(dataset, loading):
    """A loader reads ahead, so a resumed run knows of fewer than the one that it continues."""
    split = dataset.splits["train"]
    spoil(split, *range(6))
    shown = []
    for known in [], [0, 1, 2, 3, 4], range(6):
        plan = train_plan(replace(split), q=-1.0, batch_size=16)
        for sample in known:
            faults_of(plan.split).add(split, UndecodableError(sample, "zeroed"))
        with open_loader(plan, **loading) as loader:
            shown.append([step["only"] for step in islice(loader, 8)])
    for unaware, half_aware, aware in zip(*shown, strict=True):
        np.testing.assert_array_equal(unaware.ids_B, aware.ids_B)
        np.testing.assert_array_equal(half_aware.ids_B, aware.ids_B)
        assert unaware.images_BHWC.equal(aware.images_BHWC)
        assert half_aware.images_BHWC.equal(aware.images_BHWC)


def test_too_many_bad_images_end_the_run(dataset, loading):
    split = dataset.splits["train"]
    spoil(split, *range(20))
    plan = train_plan(split)
    with open_loader(plan, **loading) as loader, pytest.raises(UserError, match=r"^11 images do not decode") as raised:
        list(islice(loader, 20))
    assert "\n" not in str(raised.value)


def test_what_was_taken_does_not_change_while_a_thread_sends_it(photos):
    faults = marked(photos.splits["train"], 1)
    bad, _ = faults.take()
    faults.add(photos.splits["train"], UndecodableError(2, "zeroed"))
    assert list(bad) == [1]


def test_too_little_memory_says_nothing_about_an_image(photos, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("pipeline.pictures.Image.open", fail)
    with pytest.raises(MemoryError):
        decode(photos.splits["train"], ShardReader(photos.splits["train"]), 0)


def test_a_png_without_its_tail_is_replaced(tmp_path, loading):
    generator = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "source" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels_HWC = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels_HWC).save(path)
    options = {"test_fraction": 0, "val_fraction": 0, "workers": 1}
    split = open_dataset(build("folder", source=tmp_path / "source", out=tmp_path / "out", **options)).splits["train"]
    row = split.samples[0]
    half = int(row["size"]) // 2
    with split.shard_paths[0].open("r+b") as shard:
        shard.seek(row["offset"] + half)
        shard.write(bytes(int(row["size"]) - half))
    plan = TrainPlan(split, (Stream("only", augment="none"),), 8, 32, seed=3, epochs=1)
    with open_loader(plan, **loading) as loader:
        assert 0 not in next(loader)["only"].ids_B
        assert [bad["sample"] for bad in loader.faults.rows()] == [0]


def test_a_stored_image_of_another_format_is_bad(photos, tmp_path):
    split = open_dataset(shutil.copytree(photos.root, tmp_path / "copy")).splits["train"]
    row, buffer = split.samples[0], io.BytesIO()
    Image.new("L", (int(row["width"]), int(row["height"]))).save(buffer, "GIF")
    assert len(buffer.getvalue()) <= row["size"]
    with split.shard_paths[row["shard"]].open("r+b") as shard:
        shard.seek(row["offset"])
        shard.write(buffer.getvalue().ljust(int(row["size"]), b"\0"))
    with pytest.raises(UndecodableError):
        decode(split, ShardReader(split), 0)
