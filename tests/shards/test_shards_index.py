"""Opening a dataset, and what is said about a folder that is none."""

import json
import shutil
import time
import tracemalloc

import numpy as np
import pytest

from shards.errors import UserError
from shards.index import FORMAT, SAMPLE, open_dataset


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


def test_the_manifest_given_for_its_folder(digits):
    with pytest.raises(UserError, match=f"dataset.json is a file; give the folder of a dataset, such as {digits}$"):
        open_dataset(digits / "dataset.json")


@pytest.mark.parametrize("name", ["../x.npy", "/tmp/x.npy", "..", ""])
@pytest.mark.parametrize("kind", ["files", "shards"])
def test_a_manifest_that_leads_out_of_its_folder(root, name, kind):
    manifest = json.loads((root / "dataset.json").read_text())
    if kind == "files":
        manifest["splits"]["train"]["files"][name] = "0" * 64
    else:
        manifest["splits"]["train"]["shards"][0]["file"] = name
    (root / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="which is no file of its folder"):
        open_dataset(root)


def made_array(path, dtype, n):
    """An array file with a hole instead of values."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (n,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + n * np.dtype(dtype).itemsize)


def test_ten_million_samples_open_in_no_time_and_no_memory(tmp_path):
    n, n_classes, n_shards = 10_000_000, 10_000, 5_000
    made_array(tmp_path / "train.samples.npy", SAMPLE, n)
    made_array(tmp_path / "train.by_class.npy", "<i8", n)
    digests = {"sha256": "0" * 64, "index_sha256": "0" * 64}
    shards = [{"file": f"train-{i:06d}.tar", "samples": 2000, "bytes": 10**8, **digests} for i in range(n_shards)]
    manifest = {
        **dict.fromkeys(("preset", "options", "imbalance_factor", "image", "rejected")),
        "format": FORMAT,
        "name": "large",
        "classes": [f"a class, the {j}th" for j in range(n_classes)],
        "splits": {
            "train": {"samples": n, "class_counts": [n // n_classes] * n_classes, "files": {}, "shards": shards}
        },
    }
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        split = open_dataset(tmp_path).splits["train"]
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05
    tracemalloc.start()
    try:
        split = open_dataset(tmp_path).splits["train"]
        ids = split.by_class[split.class_starts[-2] : split.class_starts[-1]]
        assert split.samples[n - 1]["size"] == 0
        assert tracemalloc.get_traced_memory()[1] < 20e6  # two bytes per sample: the shards' and the classes' entries
    finally:
        tracemalloc.stop()
    assert len(ids) == 1000
