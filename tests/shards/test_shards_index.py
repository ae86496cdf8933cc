"""Opening a dataset, and what is said about a folder that is none."""

import json
import shutil

import numpy as np
import pytest

from shards.errors import UserError
from shards.index import open_dataset


@pytest.fixture
def root(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "copy")


def test_opening_maps_the_arrays(digits):
    split = open_dataset(str(digits)).splits["train"]
    assert isinstance(split.samples, np.memmap)
    assert isinstance(split.by_class, np.memmap)
    assert split.class_starts[-1] == len(split) == split.class_counts.sum()


def test_no_folder_and_no_dataset(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist, so it is not a dataset; build one with:"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no dataset\.json"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "says format None"),
        ('{"format": "tailstream-shards/0"}', "says format 'tailstream-shards/0', this version reads"),
        ('{"format": "tailstream-shards/1"}', "lacks the key 'name'"),
    ],
)
def test_manifests_that_will_not_do(root, text, message):
    (root / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_dataset(root)
    assert "\n" not in str(error.value)


def test_an_array_that_does_not_fit_the_manifest(root):
    np.save(root / "val.by_class.npy", np.arange(3))
    with pytest.raises(UserError, match=r"val\.by_class\.npy holds 3 entries of the manifest's \d+"):
        open_dataset(root)


@pytest.mark.parametrize("data", [b"", b"no array"])
def test_an_array_that_is_none(root, data):
    (root / "val.samples.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"val\.samples\.npy cannot be read"):
        open_dataset(root)


def test_a_split_entry_without_its_parts(root):
    manifest = json.loads((root / "dataset.json").read_text())
    del manifest["splits"]["val"]["class_counts"]
    (root / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="lacks the key 'class_counts'"):
        open_dataset(root)
