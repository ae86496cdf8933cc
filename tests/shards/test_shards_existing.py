"""What a build does about what is already there: the same dataset, one of changed images, or something else."""

import os
import shutil
from pathlib import Path

import pytest
from shards_pictures import encoded, picture

import shards.existing
from shards.build import build
from shards.errors import UserError
from shards.index import open_dataset


@pytest.fixture
def pets(tmp_path, image_folder):
    """BMP files: all of one size, whatever they show."""
    root = image_folder(tmp_path / "pets", {"cat": 0, "dog": 0})
    for i in range(12):
        (root / ("cat", "dog")[i % 2] / f"{i}.bmp").write_bytes(encoded(picture(i), "BMP"))
    (root / "dog" / "bad.bmp").write_bytes(bytes(len(encoded(picture(), "BMP"))))
    return root


def replace_by(path, data, like=None):
    """Put other contents of the same length in a file's place, as old as `like`."""
    assert path.stat().st_size == len(data)
    other = path.with_name("other")
    other.write_bytes(data)
    if like is not None:
        shutil.copystat(like, other)
    other.replace(path)


@pytest.mark.parametrize("as_old", [False, True])
def test_an_image_replaced_by_one_of_the_same_size_is_found(tmp_path, pets, as_old):
    out = build("folder", source=pets, out=tmp_path / "out", workers=1)
    path = pets / "cat" / "4.bmp"
    replace_by(path, encoded(picture(99), "BMP"), like=path if as_old else None)
    with pytest.raises(UserError, match=r"from other images \(cat/4\.bmp has changed since\); give --overwrite or"):
        build("folder", source=pets, out=out, workers=1)
    build("folder", source=pets, out=out, workers=1, overwrite=True)
    build("folder", source=pets, out=out, workers=1)


@pytest.mark.parametrize("listed", [False, True])
def test_a_link_that_leads_to_another_old_file_is_found(tmp_path, pets, monkeypatch, listed):
    for i in range(2):
        (tmp_path / f"{i}.bmp").write_bytes(encoded(picture(90 + i), "BMP"))
    monkeypatch.setattr("shards.build.FILE_TIMES", 0)
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"pets/cat/{i}.bmp,{i % 4}\n" for i in range(0, 12, 2)))
    dataset, source = ("csv", tmp_path / "list.csv") if listed else ("folder", pets)
    link = pets / "cat" / "4.bmp"
    link.unlink()
    link.symlink_to(tmp_path / "0.bmp")
    out = build(dataset, source=source, out=tmp_path / "out", workers=1)
    build(dataset, source=source, out=out, workers=1)
    link.unlink()
    link.symlink_to(tmp_path / "1.bmp")
    with pytest.raises(UserError, match=r"from other images \((pets/)?cat/4\.bmp has changed since\)"):
        build(dataset, source=source, out=out, workers=1)


def test_a_bad_image_that_was_fixed_is_found(tmp_path, pets):
    out = build("folder", source=pets, out=tmp_path / "out", workers=1)
    replace_by(pets / "dog" / "bad.bmp", encoded(picture(99), "BMP"))
    with pytest.raises(UserError, match=r"dog/bad\.bmp has changed since"):
        build("folder", source=pets, out=out, workers=1)


def test_touched_files_with_the_same_contents_are_the_same_images(tmp_path, pets, capsys):
    out = build("folder", source=pets, out=tmp_path / "out", workers=1)
    for path in pets.rglob("*.bmp"):
        replace_by(path, path.read_bytes())
    build("folder", source=pets, out=out, workers=1)
    assert "already built" in capsys.readouterr().err


def test_untouched_images_are_not_read_again(tmp_path, pets, monkeypatch):
    monkeypatch.setattr("shards.build.FILE_TIMES", 0)
    out = build("folder", source=pets, out=tmp_path / "out", workers=1)
    monkeypatch.setattr(shards.existing, "read_image", lambda *_: pytest.fail("nothing has changed"))
    build("folder", source=pets, out=out, workers=1)


def test_an_image_that_changes_while_it_is_built_is_found_later(tmp_path, pets, monkeypatch):
    """The dataset is as old as the list of images, and not as its last shard."""
    publish = shards.build.Staging.publish

    def late(staging):
        path = pets / "cat" / "4.bmp"
        replace_by(path, encoded(picture(99), "BMP"))
        return publish(staging)

    with monkeypatch.context() as patch:
        patch.setattr(shards.build.Staging, "publish", late)
        out = build("folder", source=pets, out=tmp_path / "out", workers=1)
    with pytest.raises(UserError, match=r"cat/4\.bmp has changed since"):
        build("folder", source=pets, out=out, workers=1)


def test_another_encoder_is_no_change_of_the_images(tmp_path, pets, monkeypatch):
    out = build("folder", source=pets, out=tmp_path / "out", workers=1)
    monkeypatch.setattr(shards.existing, "_stored", lambda *_: {f"cat/{i}.bmp": "other bytes" for i in range(12)})
    with pytest.raises(UserError, match="has changed since"):
        build("folder", source=pets, out=out, workers=1)
    monkeypatch.setattr(shards.existing, "ENCODER", "Pillow 99")
    build("folder", source=pets, out=out, workers=1)


def test_photographs_given_as_data_are_refused_with_a_command(pets):
    with pytest.raises(UserError) as error:
        open_dataset(pets)
    assert str(error.value) == (
        f"{pets} has no dataset.json, but images; build a dataset from them with:"
        f" tailstream build folder --source {pets} --out data/pets"
    )


def test_a_folder_of_datasets_and_one_of_something_else(tmp_path, digits):
    (tmp_path / "data").mkdir()
    shutil.copytree(digits, tmp_path / "data" / "digits")
    with pytest.raises(UserError, match=f"has no dataset.json, but {tmp_path}/data/digits has; give that"):
        open_dataset(tmp_path / "data")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"so it is not a dataset; give a folder that .tailstream build. made"):
        open_dataset(tmp_path / "thesis")
    with pytest.raises(UserError, match=r"chapter1\.tex is a file"):
        open_dataset(tmp_path / "thesis" / "chapter1.tex")


@pytest.mark.parametrize("overwrite", [False, True])
def test_photographs_given_as_out_are_left_alone(tmp_path, pets, overwrite):
    before = sorted(pets.rglob("*"))
    with pytest.raises(UserError) as error:
        build("digits", out=pets, workers=1, overwrite=overwrite)
    assert str(error.value) == (
        f"{pets} holds images and no dataset, and is left alone; to build from them:"
        f" tailstream build folder --source {pets} --out data/pets"
    )
    assert sorted(pets.rglob("*")) == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "is --source; give another --out, such as data/pets"),
        ("shards", r"lies inside --source .*, among the images; give an --out outside, such as .*/pets-shards"),
        ("cat/x/../out", "lies inside --source"),
        ("..", "holds --source .*; give another --out, such as data/pets"),
        ("link/shards", "lies inside --source"),
    ],
)
def test_source_and_out_lie_apart(tmp_path, pets, out, message):
    (tmp_path / "link").symlink_to(pets)
    place = tmp_path / out if out.startswith("link") else pets / out
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"--out {os.fspath(place)} {message}"):
        build("folder", source=pets, out=place, workers=1, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_csv_file_may_lie_above_its_dataset(tmp_path, pets):
    rows = [f"pets/{name}/{i}.bmp,{name}" for i in range(12) for name in [("cat", "dog")[i % 2]]]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    build("csv", source=tmp_path / "list.csv", out=tmp_path / "data" / "csv", workers=1)


def test_the_factor_that_was_reached_is_reported(tmp_path, image_folder, capsys):
    source = image_folder(tmp_path / "source", {"a": 30, "b": 30, "c": 2})
    options = {"source": source, "workers": 1, "profile": "exp", "test_fraction": 0, "val_fraction": 0}
    build("folder", out=tmp_path / "4", **options, imbalance_factor=4)
    assert "note: the imbalance factor is 15, not the 4 that was asked for\n" in capsys.readouterr().err
    assert open_dataset(tmp_path / "4").train_counts.tolist() == [30, 15, 2]
    build("folder", out=tmp_path / "15", **options, imbalance_factor=15)
    assert "factor" not in capsys.readouterr().err


def test_an_already_built_dataset_costs_one_listing(tmp_path, pets, monkeypatch):
    out = build("folder", source=pets, out=tmp_path / "out", workers=1)
    scans = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scans.append(str(path)) or scandir(path))
    build("folder", source=pets, out=out, workers=1)
    assert sorted(path for path in scans if path.startswith(f"{pets}/")) == [f"{pets}/cat", f"{pets}/dog"]


def test_what_is_proposed_for_images_in_data_can_be_built(tmp_path, pets, monkeypatch):
    (tmp_path / "data").mkdir()
    pets.rename(tmp_path / "data" / "pets")
    monkeypatch.chdir(tmp_path)
    for attempt in (
        lambda: open_dataset(Path("data/pets")),
        lambda: build("digits", out="data/pets", workers=1),
        lambda: build("folder", source="data/pets", out="data/pets", workers=1),
    ):
        with pytest.raises(UserError, match=r"(--out|such as) data/pets-shards$"):
            attempt()
    build("folder", source="data/pets", out="data/pets-shards", workers=1)


@pytest.mark.parametrize("name", ["train-000000.tar", "train-000000.idx", "train.samples.npy", "rejected.jsonl"])
@pytest.mark.parametrize("touched", [False, True])
def test_a_dataset_that_lacks_a_file_is_not_called_built(tmp_path, pets, name, touched):
    out = build("folder", source=pets, out=tmp_path / "out", workers=1)
    (out / name).unlink()
    if touched:
        (pets / "cat" / "4.bmp").touch()
    with pytest.raises(UserError, match=f"lacks '{name}' of its dataset; give --overwrite"):
        build("folder", source=pets, out=out, workers=1)
    build("folder", source=pets, out=out, workers=1, overwrite=True)
    assert (out / name).exists()


def test_a_good_image_of_a_class_that_was_left_out_is_no_changed_one(tmp_path, image_folder, capsys):
    counts = {f"{split}/{name}": 3 for split in ("train", "test") for name in ("cat", "dog", "owl")}
    source = image_folder(tmp_path / "source", counts)
    for path in (source / "train" / "owl").iterdir():
        path.write_text("no image")
    out = build("folder", source=source, out=tmp_path / "out", workers=1)
    assert open_dataset(out).classes == ["cat", "dog"]
    for path in source.rglob("*.png"):
        path.touch()
    capsys.readouterr()
    build("folder", source=source, out=out, workers=1)
    assert "already built" in capsys.readouterr().err


def test_an_interrupt_while_files_are_compared_says_nothing_of_an_unfinished_build(tmp_path, pets, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    out = build("folder", source=pets, out=tmp_path / "out", workers=1)
    (pets / "cat" / "4.bmp").touch()
    monkeypatch.setattr(shards.existing, "run_jobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build("folder", source=pets, out=out, workers=1)
    assert "unfinished" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", '{"format": "tailstream-shards/0"}', '{"format": "tailstream-shards/1"}'])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_manifest_that_cannot_be_read_says_what_to_remove(tmp_path, pets, text, overwrite):
    out = build("folder", source=pets, out=tmp_path / "out", workers=1)
    (out / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=f"; remove {out}, or give another --out$"):
        build("folder", source=pets, out=out, workers=1, overwrite=overwrite)


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("loop", "out", "--source .*loop does not exist"),
        ("pets", "loop", "loop exists and is not a dataset"),
        ("pets", "loop/out", "out cannot be written: Too many levels of symbolic links"),
    ],
)
def test_links_that_lead_round_in_circles(tmp_path, pets, source, out, message):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=message):
        build("folder", source=tmp_path / source, out=tmp_path / out, workers=1)


def test_touched_files_are_compared_by_as_many_processes_as_asked_for(tmp_path, pets, monkeypatch):
    out = build("folder", source=pets, out=tmp_path / "out", workers=1)
    (pets / "cat" / "4.bmp").touch()
    run_jobs, asked = shards.existing.run_jobs, []

    def here(*jobs, workers, **rest):
        asked.append(workers)
        return run_jobs(*jobs, workers=1, **rest)

    monkeypatch.setattr(shards.existing, "run_jobs", here)
    build("folder", source=pets, out=out, workers=3)
    assert asked == [3]
