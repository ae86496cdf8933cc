"""`verify` names what was damaged."""

import itertools
import json
import shutil
import tarfile

import numpy as np
import pytest

from shards.build import build
from shards.errors import UserError
from shards.index import open_dataset
from shards.verify import verify
from shards.writer import sha256


@pytest.fixture(scope="module")
def built(tmp_path_factory, image_folder):
    source = image_folder(tmp_path_factory.mktemp("source"), {"a": 6, "b": 4})
    return build("folder", source=source, out=tmp_path_factory.mktemp("out") / "x", shard_samples=4, workers=1)


@pytest.fixture
def root(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")


def edit_manifest(root, change):
    path = root / "dataset.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def overwrite_with_checksum(root, file, data):
    """Change a file and its checksum, so that only what it says can give it away."""
    (root / file).write_bytes(data)

    def change(manifest):
        for split in manifest["splits"].values():
            if file in split["files"]:
                split["files"][file] = sha256(root / file)
            for shard in split["shards"]:
                if shard["file"] == file:
                    shard["sha256"] = sha256(root / file)
                elif shard["file"] == file.replace(".idx", ".tar"):
                    shard["index_sha256"] = sha256(root / file)

    edit_manifest(root, change)


def member(root, name):
    with tarfile.open(root / "train-000000.tar") as tar:
        return next(m for m in tar.getmembers() if m.name.endswith(name))


def test_a_whole_dataset_has_no_problem(root):
    assert verify(root, workers=1) == []
    assert verify(root, decode=False, workers=1) == []


def test_workers_find_the_same(root):
    (root / "train-000000.idx").unlink()
    (root / "test-000000.idx").unlink()
    assert sorted(verify(root, workers=2)) == sorted(verify(root, workers=1)) != []


@pytest.mark.parametrize("end", [".tar", ".idx", ".names.txt", ".samples.npy", ".by_class.npy"])
def test_missing_and_changed_files_are_named(root, end):
    path = next(root.glob(f"train*{end}"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert f"{path.name}: its checksum is not the manifest's" in verify(root, workers=1)
    path.unlink()
    assert f"{path.name}: missing" in verify(root, workers=1)


def test_a_broken_image_is_named(root):
    image = member(root, ".png")
    data = bytearray((root / "train-000000.tar").read_bytes())
    data[image.offset_data + 60] ^= 0xFF
    overwrite_with_checksum(root, "train-000000.tar", data)
    assert verify(root, workers=1) == [f"train-000000.tar: {image.name}: damaged or truncated"]
    assert verify(root, workers=1, decode=False) == []


def test_a_wrong_label_in_the_tar_is_named(root):
    cls = member(root, ".cls")
    data = bytearray((root / "train-000000.tar").read_bytes())
    data[cls.offset_data] ^= 1
    overwrite_with_checksum(root, "train-000000.tar", data)
    (problem,) = verify(root, workers=1)
    assert problem.startswith(f"train-000000.tar: {cls.name} holds b'")


def test_a_truncated_tar_is_named(root):
    data = (root / "train-000000.tar").read_bytes()
    overwrite_with_checksum(root, "train-000000.tar", data[:3000])
    assert any(p.startswith("train-000000.tar: not a complete tar file") for p in verify(root, workers=1))


def test_a_wrong_text_index_is_named(root):
    text = (root / "train-000000.idx").read_text()
    overwrite_with_checksum(root, "train-000000.idx", text.replace("png 512", "png 513").encode())
    assert verify(root, workers=1) == ["train-000000.idx: does not describe train-000000.tar"]


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        ("offset", "lies elsewhere than the samples array says"),
        ("height", "pixels, the samples array says"),
        ("label", "train.samples.npy: the labels do not add up to the manifest's class counts"),
        ("shard", "train-000000.tar: samples: 4, expected 3"),
    ],
)
def test_a_wrong_row_is_named(root, field, problem):
    samples = np.load(root / "train.samples.npy")
    samples[field][0] = 1 if field in ("label", "shard") and samples[field][0] == 0 else 0
    np.save(root / "changed.npy", samples)
    overwrite_with_checksum(root, "train.samples.npy", (root / "changed.npy").read_bytes())
    assert any(problem in p for p in verify(root, workers=1))


def test_by_class_out_of_order_is_named(root):
    np.save(root / "changed.npy", np.load(root / "train.by_class.npy")[::-1])
    overwrite_with_checksum(root, "train.by_class.npy", (root / "changed.npy").read_bytes())
    assert verify(root, workers=1) == ["train.by_class.npy: not the sample ids sorted by class"]


def test_a_lost_name_is_reported(root):
    text = (root / "train.names.txt").read_text()
    overwrite_with_checksum(root, "train.names.txt", text[text.index("\n") + 1 :].encode())
    n = len(open_dataset(root).splits["train"])
    assert verify(root, workers=1) == [f"train.names.txt: names: {n - 1}, samples: {n}"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.update(imbalance_factor=9.0), "dataset.json: imbalance factor 9.0"),
        (lambda m: m["image"].update(max_width=1), "dataset.json: the image sizes"),
        (lambda m: m["rejected"].update(total=3), "rejected.jsonl: lines: 0, the manifest counts 3"),
        (lambda m: m["splits"]["train"]["shards"].pop(), "dataset.json: the train shards do not add up"),
    ],
)
def test_a_manifest_that_contradicts_the_files_is_reported(root, change, problem):
    edit_manifest(root, change)
    assert any(p.startswith(problem) for p in verify(root, workers=1))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def append_sample(path):
    """Another sample behind the last; tar readers see it."""
    with tarfile.open(path, "a") as tar:
        for end in ("png", "cls"):
            tar.addfile(tarfile.TarInfo(f"999999999.{end}"))


def drop_last_sample(path):
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    path.write_bytes(path.read_bytes()[: members[-2].offset] + bytes(1024))


def swap(one, other):
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


TAMPERINGS = {
    "a flipped byte in an image": (
        lambda root: flip(root / "train-000000.tar", 600),
        ["train-000000.tar: its checksum is not the manifest's"],
    ),
    "a flipped byte in a tar header": (
        lambda root: flip(root / "train-000000.tar", 3),
        ["train-000000.tar: its checksum is not the manifest's", "train-000000.tar: not a complete tar file"],
    ),
    "a truncated shard": (
        lambda root: (root / "train-000000.tar").write_bytes((root / "train-000000.tar").read_bytes()[:3000]),
        ["train-000000.tar: its checksum", "train-000000.tar: 3000 bytes long, the manifest says"],
    ),
    "an empty shard": (
        lambda root: (root / "train-000000.tar").write_bytes(b""),
        ["train-000000.tar: its checksum", "train-000000.tar: 0 bytes long, the manifest says"],
    ),
    "a missing shard": (lambda root: (root / "train-000001.tar").unlink(), ["train-000001.tar: missing"]),
    "an extra sample": (
        lambda root: append_sample(root / "train-000000.tar"),
        ["train-000000.tar: its checksum", "train-000000.tar: samples: 5, expected 4"],
    ),
    "a missing sample": (
        lambda root: drop_last_sample(root / "train-000000.tar"),
        ["train-000000.tar: its checksum", "train-000000.tar: samples: 3, expected 4"],
    ),
    "an extra shard": (
        lambda root: shutil.copy(root / "train-000000.tar", root / "train-000009.tar"),
        ["train-000009.tar: the manifest does not know it"],
    ),
    "shards in each other's place": (
        lambda root: swap(root / "train-000000.tar", root / "train-000001.tar"),
        ["train-000000.tar: its checksum", "train-000001.tar: its checksum"],
    ),
    "a wrong text index": (
        lambda root: swap(root / "train-000000.idx", root / "test-000000.idx"),
        ["train-000000.idx: does not describe train-000000.tar", "test-000000.idx: does not describe"],
    ),
    "a row too few": (
        lambda root: np.save(root / "train.samples.npy", np.load(root / "train.samples.npy")[1:]),
        ["train.samples.npy: its checksum", "train.samples.npy holds 6 entries of the manifest's 7"],
    ),
    "a wrong class index": (
        lambda root: np.save(root / "train.by_class.npy", np.load(root / "train.by_class.npy")[::-1]),
        ["train.by_class.npy: its checksum", "train.by_class.npy: not the sample ids sorted by class"],
    ),
    "a name too many": (
        lambda root: (root / "train.names.txt").open("a").write("more\n"),
        ["train.names.txt: its checksum", "train.names.txt: names: 8, samples: 7"],
    ),
    "no list of rejected images": (lambda root: (root / "rejected.jsonl").unlink(), ["rejected.jsonl: missing"]),
    "a damaged list of rejected images": (
        lambda root: (root / "rejected.jsonl").write_text("{"),
        ["rejected.jsonl: damaged ("],
    ),
}


@pytest.mark.parametrize(("tamper", "problems"), TAMPERINGS.values(), ids=TAMPERINGS)
def test_tampering_is_named(root, tamper, problems):
    tamper(root)
    found = verify(root, workers=1)
    for problem in problems:
        assert any(problem in line for line in found), found


def test_a_split_that_contradicts_the_shards_in_the_tar_order_is_named(root):
    samples = np.load(root / "train.samples.npy")
    np.save(root / "changed.npy", samples[::-1])
    overwrite_with_checksum(root, "train.samples.npy", (root / "changed.npy").read_bytes())
    assert "train.samples.npy: the rows are not in the order of the shards" in verify(root, workers=1)


def test_two_samples_with_one_key_are_named(root):
    tar = (root / "train-000000.tar").read_bytes()
    path = root / "train-000000.tar"
    with tarfile.open(path) as opened:
        members = opened.getmembers()
    samples = [tar[a.offset : b.offset] for a, b in itertools.pairwise([*members[::2], members[-1]])]
    path.write_bytes(samples[0] + samples[0] + tar[members[4].offset :])
    assert "train-000000.tar: its keys are not in ascending order" in verify(root, workers=1)


def test_an_image_of_another_kind_than_its_name_says_is_named(root):
    path = root / "train-000000.tar"
    with tarfile.open(path) as tar:
        header = tar.getmembers()[0]
    header.name = header.name.replace(".png", ".jpg")
    data = path.read_bytes()
    overwrite_with_checksum(root, path.name, header.tobuf(tarfile.USTAR_FORMAT) + data[512:])
    assert f"train-000000.tar: {header.name}: not an upright 8-bit RGB or greyscale JPEG or PNG, as its name says" in (
        verify(root, workers=1)
    )


def test_a_shard_that_cannot_be_read_is_named(root):
    (root / "train-000000.tar").unlink()
    (root / "train-000000.tar").symlink_to("train-000000.tar")
    problems = verify(root, workers=1)
    assert any(problem.startswith("train-000000.tar: ") for problem in problems)


def test_an_unfinished_build_is_reported(root):
    (root / "dataset.json").unlink()
    (root / ".build").mkdir()
    with pytest.raises(UserError, match="holds an unfinished build; give the command that began it again"):
        verify(root)


def test_no_dataset_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"has no dataset\.json, so it is not a dataset"):
        verify(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        verify(tmp_path / "nowhere")


def test_a_manifest_without_its_parts_is_a_mistake(root):
    edit_manifest(root, lambda m: m["splits"]["train"].pop("shards"))
    with pytest.raises(UserError, match=r"dataset\.json is damaged \(KeyError\('shards'\)\)"):
        verify(root, workers=1)


def test_workers_are_counted_from_one(root):
    with pytest.raises(UserError, match="--workers is 0"):
        verify(root, workers=0)
