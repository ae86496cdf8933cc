"""The shards are plain WebDataset: other people's readers see every sample with its label."""

import tarfile

import numpy as np
import pytest

from shards.index import open_dataset

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own


@pytest.fixture(scope="module")
def expected(digits):
    """Label and PNG bytes of each training sample, read through our own index."""
    split = open_dataset(digits).splits["train"]
    files = [path.read_bytes() for path in split.shard_paths]
    assert len(files) > 1
    return [(s["label"], files[s["shard"]][s["offset"] : s["offset"] + s["size"]]) for s in split.samples]


def test_tarfile_sees_the_same_headers_everywhere(digits):
    with tarfile.open(digits / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert [m.name for m in members[:4]] == ["000000000.png", "000000000.cls", "000000001.png", "000000001.cls"]
    assert all(m.offset_data == m.offset + 512 for m in members)


def test_webdataset_sees_every_sample(digits, expected):
    import webdataset

    urls = [str(path) for path in sorted(digits.glob("train-*.tar"))]
    read = [(int(s["cls"]), s["png"]) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert read == expected


def test_dali_sees_every_sample(digits, expected):
    from nvidia.dali import fn, pipeline_def

    paths = sorted(digits.glob("train-*.tar"))

    @pipeline_def(batch_size=len(expected), num_threads=1, device_id=None)
    def pipeline():
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
    read = [(int(bytes(np.asarray(labels.at(i)))), bytes(np.asarray(images.at(i)))) for i in range(len(expected))]
    assert read == expected
