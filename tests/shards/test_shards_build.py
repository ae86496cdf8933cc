"""Building: what is written, that it is repeatable, and that nothing half-written stays."""

import json
import os
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shards_pictures import encoded, picture

from shards.build import build
from shards.errors import UserError
from shards.index import SAMPLE, open_dataset
from shards.verify import verify


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def pets(tmp_path_factory, image_folder):
    """12 cats, 8 dogs and 5 eels; two of the cats are no images."""
    root = image_folder(tmp_path_factory.mktemp("pets"), {"cat": 10, "dog": 8, "eel": 5})
    (root / "cat" / "text.jpg").write_text("no image")
    (root / "cat" / "zero.png").write_bytes(b"")
    return root


def test_digits_are_long_tailed_by_themselves(digits):
    dataset = open_dataset(digits)
    assert dataset.name == "digits"
    assert dataset.manifest["preset"] == "digits"
    assert dataset.manifest["image"] == {"min_height": 16, "max_height": 16, "min_width": 16, "max_width": 16}
    assert list(dataset.splits) == ["train", "val", "test"]
    assert dataset.train_counts.tolist() == [120, 88, 63, 45, 32, 23, 16, 11, 8, 6]
    assert dataset.manifest["imbalance_factor"] == 20
    assert len(dataset.splits["test"]) == 451
    assert dataset.splits["test"].class_counts.min() >= 44


def test_shards_are_of_nearly_equal_length(digits):
    shards = open_dataset(digits).manifest["splits"]["test"]["shards"]
    assert [shard["samples"] for shard in shards] == [113, 113, 113, 112]
    assert [shard["file"] for shard in shards] == [f"test-{i:06d}.tar" for i in range(4)]


def test_the_index_finds_every_image(digits):
    dataset = open_dataset(digits)
    for split in dataset.splits.values():
        assert split.samples.dtype == SAMPLE
        names = split.sample_names()
        assert len(set(names)) == len(split)
        for j in range(10):
            ids = split.by_class[split.class_starts[j] : split.class_starts[j + 1]]
            assert (split.samples["label"][ids] == j).all()
        for i in (0, len(split) - 1):
            sample = split.samples[i]
            data = split.shard_paths[sample["shard"]].read_bytes()
            with Image.open(BytesIO(data[sample["offset"] :][: sample["size"]])) as image:
                assert image.size == (sample["width"], sample["height"])


def test_a_digit_shows_the_digit(digits):
    from sklearn.datasets import load_digits

    split = open_dataset(digits).splits["train"]
    sample = split.samples[0]
    original_HW = load_digits().images[int(split.sample_names()[0].removeprefix("digit-"))]
    data = split.shard_paths[0].read_bytes()[sample["offset"] :]
    stored_HW = np.asarray(Image.open(BytesIO(data))).astype(float)
    blocks_HW = stored_HW.reshape(8, 2, 8, 2).mean((1, 3))
    assert np.corrcoef(blocks_HW.ravel(), original_HW.ravel())[0, 1] > 0.95
    assert stored_HW.max() > 200


def test_same_source_and_options_give_the_same_bytes_for_any_number_of_workers(tmp_path, pets):
    for name, workers in (("one", 1), ("again", 1), ("two", 2)):
        build("folder", source=pets, out=tmp_path / name / "pets", shard_samples=4, workers=workers)
    one = contents(tmp_path / "one" / "pets")
    assert len(one) > 15
    assert contents(tmp_path / "again" / "pets") == one
    assert contents(tmp_path / "two" / "pets") == one


def test_images_that_do_not_decode_are_left_out_and_named(tmp_path, pets, capsys):
    root = build("folder", source=pets, out=tmp_path / "pets", val_fraction=0, test_fraction=0, workers=1)
    dataset = open_dataset(root)
    assert dataset.train_counts.tolist() == [10, 8, 5]
    rejected = [json.loads(line) for line in (root / "rejected.jsonl").read_text().splitlines()]
    assert sorted(rejected, key=lambda image: image["source"]) == [
        {"split": "train", "label": 0, "class": "cat", "source": "cat/text.jpg", "reason": "not an image"},
        {"split": "train", "label": 0, "class": "cat", "source": "cat/zero.png", "reason": "empty file"},
    ]
    assert dataset.manifest["rejected"] == {"total": 2, "reasons": {"empty file": 1, "not an image": 1}}
    assert "note: images left out: 2 of 25 (" in capsys.readouterr().err
    assert verify(root, workers=1) == []


def test_a_shard_of_nothing_but_bad_images_is_left_out(tmp_path, pets):
    root = build("folder", source=pets, out=tmp_path / "pets", test_fraction=0, shard_samples=1, workers=1)
    split = open_dataset(root).splits["train"]
    assert np.array_equal(split.samples["shard"], np.arange(len(split)))
    assert len(list(root.glob("*.tar"))) == 23
    assert len(list(root.glob("*.idx"))) == 23
    assert verify(root, workers=1) == []


def test_one_class_with_good_images_is_a_mistake_and_leaves_nothing(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 2, "b": 0})
    (source / "b" / "x.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"image that can be read: 1; .* at least two \(class 'b': b/x\.jpg: not an im"):
        build("folder", source=source, out=tmp_path / "new" / "out", workers=1)
    assert os.listdir(tmp_path) == ["source"]


def test_a_split_without_one_good_image_is_a_mistake(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"train/a": 2, "train/b": 2, "test/a": 0})
    (source / "test" / "a" / "x.jpg").write_text("no image")
    with pytest.raises(UserError, match="no image of the test split can be read"):
        build("folder", source=source, out=tmp_path / "out", workers=1)
    assert os.listdir(tmp_path) == ["source"]


def test_dangling_links_are_rejected(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 2, "b": 2})
    (source / "a" / "gone.png").symlink_to("nowhere.png")
    root = build("folder", source=source, out=tmp_path / "out", test_fraction=0, workers=1)
    assert open_dataset(root).manifest["rejected"]["reasons"] == {"cannot be read": 1}


def test_preset_and_name_of_a_folder(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 2, "b": 2})
    assert open_dataset(build("folder", source=source, out=tmp_path / "pets", workers=1)).manifest["preset"] == "small"
    (source / "b" / "large.png").write_bytes(encoded(picture(size=(65, 10)), "PNG"))
    dataset = open_dataset(build("folder", source=source, out=tmp_path / "more", test_fraction=0, workers=1))
    assert (dataset.name, dataset.manifest["preset"]) == ("more", "photos")
    assert dataset.manifest["image"] == {"min_height": 10, "max_height": 20, "min_width": 24, "max_width": 65}


def test_shorter_side_reaches_the_images(tmp_path, pets):
    root = build("folder", source=pets, out=tmp_path / "out", shorter_side=10, workers=1)
    samples = open_dataset(root).splits["train"].samples
    assert Counter(zip(samples["height"].tolist(), samples["width"].tolist(), strict=True)).keys() == {(10, 12)}


def test_no_path_of_this_machine_is_stored(tmp_path, pets):
    root = build("folder", source=pets, out=tmp_path / "out", workers=1)
    assert all(str(pets).encode() not in data for data in contents(root).values())


def test_an_equal_dataset_is_left_alone(tmp_path, pets, capsys):
    root = build("folder", source=pets, out=tmp_path / "out", workers=1)
    before = (root / "dataset.json").stat().st_mtime_ns
    capsys.readouterr()
    assert build("folder", source=pets, out=root, workers=2) == root
    assert capsys.readouterr() == (
        "",
        f"already built: {root} (the same images and options; --overwrite builds it again)\n",
    )
    assert (root / "dataset.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "built with seed 0, not 1; give --overwrite or another --out"),
        ({"profile": "exp", "imbalance_factor": 4}, "built with profile 'natural', not 'exp'"),
        ({"shorter_side": 8}, "built with shorter-side None, not 8"),
    ],
)
def test_another_dataset_in_the_way_is_kept_without_overwrite(tmp_path, pets, options, message):
    root = build("folder", source=pets, out=tmp_path / "out", workers=1)
    with pytest.raises(UserError, match=message):
        build("folder", source=pets, out=root, workers=1, **options)
    build("folder", source=pets, out=root, workers=1, overwrite=True, **options)
    for option, value in options.items():
        assert open_dataset(root).manifest["options"][option] == value
    assert os.listdir(tmp_path) == ["out"]


def test_other_images_are_another_dataset(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"a": 2, "b": 2})
    root = build("folder", source=source, out=tmp_path / "out", workers=1)
    (source / "a" / "more.png").write_bytes(encoded(picture(), "PNG"))
    with pytest.raises(UserError, match="built from other images"):
        build("folder", source=source, out=root, workers=1)


def test_overwrite_deletes_nothing_but_a_dataset(tmp_path, pets):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists and is not a dataset; give another --out"):
            build("folder", source=pets, out=foreign, workers=1, overwrite=overwrite)
    root = build("folder", source=pets, out=tmp_path / "out", workers=1)
    (root / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"also holds 'notes\.md', which no build put there; move it away"):
        build("folder", source=pets, out=root, workers=1, overwrite=True)
    assert (foreign / "chapter1.tex").exists()
    assert (root / "notes.md").exists()


def test_an_empty_folder_is_taken(tmp_path, pets):
    (tmp_path / "out").mkdir()
    assert verify(build("folder", source=pets, out=tmp_path / "out", workers=1), workers=1) == []


def test_an_out_below_a_file_cannot_be_written(tmp_path, pets):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        build("folder", source=pets, out=tmp_path / "file" / "out", workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imbalance_factor": 0.5}, "--imbalance-factor is 0.5; give a number of at least 1"),
        ({"imbalance_factor": float("nan")}, "--imbalance-factor is nan"),
        ({"imbalance_factor": float("inf")}, "--imbalance-factor is inf"),
        ({"seed": -1}, "--seed is -1; give a whole number from 0 to 9223372036854775807"),
        ({"seed": 10**20}, "--seed is 100000000000000000000; give a whole number from 0 to 9223372036854775807"),
        ({"test_fraction": 1.0}, "--test-fraction is 1; give a share of at least 0 and below 1"),
        ({"val_fraction": -0.1}, "--val-fraction is -0.1"),
        ({"shorter_side": 0}, "--shorter-side is 0; give a whole number of at least 1"),
        ({"quality": 101}, "--quality is 101; give a JPEG quality from 1 to 100"),
        ({"quality": 50}, "--quality 50 has no effect without --shorter-side"),
        ({"shard_samples": 0}, "--shard-samples is 0"),
        ({"workers": 0}, "--workers is 0"),
        ({"profile": "zipf"}, "unknown --profile 'zipf'; choose one of: natural, exp, step, pareto"),
        ({"profile": "natural", "imbalance_factor": 3}, "--imbalance-factor 3 has no effect"),
    ],
)
def test_options_that_will_not_do(tmp_path, options, message):
    with pytest.raises(UserError) as error:
        build("digits", out=tmp_path / "out", **options)
    assert message in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_fraction_for_a_split_that_the_source_has_is_a_mistake(tmp_path, image_folder):
    source = image_folder(tmp_path / "source", {"train/a": 1, "train/b": 1, "test/a": 1})
    with pytest.raises(UserError, match=r"has its own test split; leave out --test-fraction 0\.5"):
        build("folder", source=source, out=tmp_path / "out", test_fraction=0.5)
