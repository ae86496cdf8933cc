"""CIFAR and Fashion-MNIST in their official files, made small, and LDAM's totals."""

import gzip
import hashlib
import json
import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from shards.build import build
from shards.errors import UserError
from shards.index import open_dataset
from shards.plan import plan_splits
from shards.sources import arrays, cifar, fashion, open_source

GENERATOR = np.random.default_rng(0)


def pixels(data: bytes) -> np.ndarray:
    with Image.open(BytesIO(data)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def write_cifar(root, monkeypatch, kind, train, test):
    """Write torchvision's files with `train` and `test` labels, and let torchvision expect them."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    label_key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    classes = [f"class {j}" for j in range(max(train) + 1)]

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return name, hashlib.md5(data).hexdigest()

    def batch(labels):
        values = GENERATOR.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        return {"data": values, label_key: labels}

    halves = np.array_split(train, 2)
    monkeypatch.setattr(kind, "train_list", [write(f"data_batch_{i}", batch(h.tolist())) for i, h in enumerate(halves)])
    monkeypatch.setattr(kind, "test_list", [write("test_batch", batch(test))])
    name, md5 = write("batches.meta", {kind.meta["key"]: classes})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": kind.meta["key"], "md5": md5})


@pytest.fixture(autouse=True)
def nothing_remembered():
    cifar._load.cache_clear()
    fashion._load.cache_clear()


@pytest.fixture
def no_network(monkeypatch):
    def fail(request, *_, **__):
        raise OSError(f"no route to {request.full_url}")

    monkeypatch.setattr("urllib.request.urlopen", fail)


@pytest.mark.parametrize(("dataset", "kind"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_in_torchvisions_files(tmp_path, monkeypatch, dataset, kind, inside):
    write_cifar(tmp_path, monkeypatch, kind, train=[2, 0, 1, 0, 2, 1, 1], test=[1, 0, 2])
    source = open_source(dataset, tmp_path / kind.base_folder if inside else tmp_path)
    assert source.classes == ["class 0", "class 1", "class 2"]
    assert source.splits["train"].labels.tolist() == [2, 0, 1, 0, 2, 1, 1]
    assert source.splits["test"].labels.tolist() == [1, 0, 2]
    assert (source.preset, source.profile, source.imbalance_factor, source.val_fraction) == (dataset, "exp", 100, 0)
    batch = pickle.loads((tmp_path / kind.base_folder / "data_batch_1").read_bytes())
    assert np.array_equal(pixels(source.read("train-00006")), batch["data"][2].reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar_that_was_listed_is_read_from_any_folder(tmp_path, monkeypatch):
    write_cifar(tmp_path / "data" / "fetched", monkeypatch, datasets.CIFAR10, train=[0, 1, 2], test=[0, 1, 2])
    monkeypatch.chdir(tmp_path)
    source = open_source("cifar10", None)
    cifar._load.cache_clear()
    monkeypatch.chdir("/")  # as a worker of a cluster
    assert source.read("train-00000")[:4] == b"\x89PNG"


def test_cifars_own_folder_may_be_the_current_one(tmp_path, monkeypatch, no_network):
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR10, train=[0, 1, 2], test=[0, 1, 2])
    monkeypatch.chdir(tmp_path / "cifar-10-batches-py")
    assert open_source("cifar10", Path()).classes == ["class 0", "class 1", "class 2"]


def test_cifar_that_is_not_there_and_cannot_be_fetched(tmp_path, monkeypatch, no_network):
    with pytest.raises(UserError, match=r"hold cifar-10-batches-py or cifar-10-python\.tar\.gz whole, and") as e:
        open_source("cifar10", tmp_path)
    assert "\n" not in str(e.value)
    assert "no route to https://" in str(e.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data/fetched does not hold cifar-100-python"):
        open_source("cifar100", None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="--source nowhere is not a folder; give one that holds"):
        open_source("cifar10", Path("nowhere"))


def test_a_damaged_cifar_is_not_opened(tmp_path, monkeypatch, no_network):
    write_cifar(tmp_path, monkeypatch, datasets.CIFAR10, train=[0, 1], test=[0, 1])
    with (tmp_path / "cifar-10-batches-py" / "data_batch_0").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"cifar-10-batches-py or .* whole"):
        open_source("cifar10", tmp_path)


def write_idx(path, values, packed=False):
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    data = header + values.astype(np.uint8).tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


@pytest.fixture
def fashion_files(tmp_path):
    """Write the four files: 20 training and 10 test images of 28x28."""

    def write(root=tmp_path, packed=True):
        root.mkdir(parents=True, exist_ok=True)
        for prefix, n in (("train", 20), ("t10k", 10)):
            images = GENERATOR.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            write_idx(root / f"{prefix}-images-idx3-ubyte", images, packed)
            write_idx(root / f"{prefix}-labels-idx1-ubyte", np.arange(n) % 10, packed)
        return root

    return write


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_fashion_mnist(tmp_path, fashion_files, packed, below):
    fashion_files(tmp_path / below, packed)
    source = open_source("fashion-mnist", tmp_path)
    assert source.classes[0] == "T-shirt/top"
    assert source.splits["train"].labels.tolist() == [*range(10), *range(10)]
    assert len(source.splits["test"]) == 10
    path = tmp_path / below / "t10k-images-idx3-ubyte"
    data = path.read_bytes() if not packed else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
    assert pixels(source.read("test-00009")).tobytes() == data[-28 * 28 :]
    assert (source.preset, source.profile, source.imbalance_factor) == ("fashion-mnist", "exp", 100)


def test_fashion_mnist_lies_where_debian_puts_it(tmp_path, fashion_files, monkeypatch):
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "debian")
    with pytest.raises(UserError, match=r"fashion-mnist needs --source DIR, .*package dataset-fashion-mnist would"):
        open_source("fashion-mnist", None)
    fashion_files(tmp_path / "debian")
    assert len(open_source("fashion-mnist", None).splits["train"]) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, r"t10k-labels-idx1-ubyte\.gz is missing; give"),
        (lambda path: write_idx(path, np.arange(9)), "10 test images and 9 labels"),
        (lambda path: write_idx(path, np.arange(10) + 1), "the test labels are not 0 to 9, see 0"),
        (lambda path: write_idx(path, np.zeros((2, 5))), r"is not a complete IDX file \(axes: 1\); fetch"),
        (lambda path: path.write_bytes(b""), r"is not a complete IDX file \(axes: 1\); fetch"),
        (lambda path: path.write_bytes(b"\0\0\x08\1\0\0\0\x0a12"), r"is not a complete IDX file \(axes: 1\); fetch"),
    ],
)
def test_idx_files_that_will_not_do(fashion_files, change, message):
    root = fashion_files(packed=False)
    change(root / "t10k-labels-idx1-ubyte")
    with pytest.raises(UserError, match=message):
        open_source("fashion-mnist", root)


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_cut_gzip_file(fashion_files, cut):
    root = fashion_files(packed=True)
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz cannot be read \(.*\); fetch it again"):
        open_source("fashion-mnist", root)


@pytest.mark.parametrize(
    ("dataset", "factor", "total"),
    [("cifar10", f, t) for f, t in {10: 20431, 50: 13996, 100: 12406, 200: 11203}.items()]
    + [("cifar100", f, t) for f, t in {10: 19573, 50: 12608, 100: 10847, 200: 9502}.items()],
)
def test_the_long_tails_have_ldams_totals(monkeypatch, dataset, factor, total):
    n_classes = int(dataset.removeprefix("cifar"))
    labels = {"train": np.arange(50_000) % n_classes, "test": np.arange(10_000) % n_classes}
    loaded = {split: (np.zeros((len(of), 1, 1), np.uint8), of) for split, of in labels.items()}
    source = arrays.array_source(lambda: loaded, [str(j) for j in range(n_classes)], profile="exp", val_fraction=0.0)
    plan = plan_splits(source, profile="exp", imbalance_factor=factor, test_fraction=0, val_fraction=0, seed=0)
    assert {split: len(listing) for split, listing in plan.splits.items()} == {"train": total, "test": 10_000}


def test_fashion_mnist_builds_long_tailed_in_worker_processes(tmp_path, fashion_files):
    root = build(
        "fashion-mnist", source=fashion_files(), out=tmp_path / "out", imbalance_factor=2, shard_samples=9, workers=2
    )
    dataset = open_dataset(root)
    assert dataset.train_counts.tolist() == [2, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert sorted(dataset.splits) == ["test", "train"]
    options = json.loads((root / "dataset.json").read_text())["options"]
    assert (options["profile"], options["imbalance_factor"], options["val_fraction"]) == ("exp", 2.0, 0.0)
    assert dataset.manifest["preset"] == "fashion-mnist"
