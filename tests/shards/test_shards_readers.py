"""The shards are plain WebDataset: other people's readers see every sample with its label."""

import tarfile

import numpy as np
import pytest
from shards_pictures import encoded, picture

from shards.build import build
from shards.index import open_dataset

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own


@pytest.fixture(scope="module")
def photos(tmp_path_factory, image_folder):
    """JPEGs and PNGs by turns, shrunk, and two files that are no images."""
    root = image_folder(tmp_path_factory.mktemp("photos"), {"cat": 5, "dog": 4})
    for i in range(8):
        name = root / ("cat", "dog")[i % 2] / f"{i}-ünï cödé.jpg"
        name.write_bytes(encoded(picture(i, (60, 40)), "JPEG", quality=95))
    (root / "cat" / "bad.jpg").write_text("no image")
    (root / "dog" / "bad.png").write_bytes(b"")
    out = tmp_path_factory.mktemp("out") / "photos"
    return build("folder", source=root, out=out, shorter_side=16, shard_samples=4, workers=1)


@pytest.fixture(scope="module", params=["digits", "photos"])
def expected(request):
    """For each split its shards, and label and encoded bytes of each sample, read through our own index."""
    splits = open_dataset(request.getfixturevalue(request.param)).splits.values()
    read = []
    for split in splits:
        files = [path.read_bytes() for path in split.shard_paths]
        rows = split.samples.tolist()
        samples = [(label, files[shard][offset : offset + size]) for offset, size, shard, label, _, _ in rows]
        read.append((split.shard_paths, samples))
    assert any(len(paths) > 1 for paths, _ in read)
    return read


def test_tarfile_sees_the_same_headers_everywhere(digits):
    with tarfile.open(digits / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert [m.name for m in members[:4]] == ["000000000.png", "000000000.cls", "000000001.png", "000000001.cls"]
    assert all(m.offset_data == m.offset + 512 for m in members)


def test_webdataset_sees_every_sample(expected):
    import webdataset

    for paths, samples in expected:
        read = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
        assert [(int(s["cls"]), s.get("jpg") or s["png"]) for s in read] == samples


def test_dali_sees_every_sample(expected):
    from nvidia.dali import fn, pipeline_def

    for paths, samples in expected:

        @pipeline_def(batch_size=len(samples), num_threads=1, device_id=None)
        def pipeline(paths=paths):
            return tuple(
                fn.readers.webdataset(
                    paths=[str(path) for path in paths],
                    index_paths=[str(path.with_suffix(".idx")) for path in paths],
                    ext=["jpg;png", "cls"],
                )
            )

        pipe = pipeline()
        pipe.build()
        images, labels = pipe.run()
        read = [(int(bytes(np.asarray(labels.at(i)))), bytes(np.asarray(images.at(i)))) for i in range(len(samples))]
        assert read == samples
        assert {meta["epoch_size"] for meta in pipe.reader_meta().values()} == {len(samples)}
