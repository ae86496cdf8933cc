import shutil
from itertools import islice

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from pipeline.loader import open_loader
from pipeline.plan import Stream, TrainPlan
from pipeline.preview import CELL, COLOURS, MOST_SHOWN, draw, main, preview
from shards.build import build
from shards.groups import class_groups
from shards.index import Dataset, open_dataset

STREAMS = (Stream("uniform", 1.0, "shift"), Stream("reversed", -1.0, "shift"))


def first_batches(dataset: Dataset, batch_size: int, image_size: int = 16):
    plan = TrainPlan(dataset.splits["train"], STREAMS, batch_size, image_size, seed=0, epochs=1)
    with open_loader(plan, "torch", threads=0) as loader:
        (batches,) = islice(loader, 1)
    return batches


def test_a_png_is_written_and_named(digits, tmp_path, capsys):
    out = tmp_path / "seen.png"
    main([str(digits.root), "--out", str(out), "--augment", "shift+rand(2,9)+cutout(4)", "--batch-size", "8"])
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 100
    assert [path.name for path in tmp_path.iterdir()] == ["seen.png"]


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 1), (8, 1), (9, 2), (MOST_SHOWN + 5, 8)])
def test_every_picture_stands_in_its_cell_with_its_class_its_size_and_its_groups_colour(digits, batch_size, rows):
    batches = first_batches(digits, batch_size)
    figure = draw(digits, STREAMS, batches, "a title")
    assert figure.get_suptitle() == "a title"
    groups, shown = class_groups(digits.train_counts), min(batch_size, MOST_SHOWN)
    for stream, ax in zip(STREAMS, figure.axes, strict=True):
        batch = batches[stream.name]
        labels = batch.labels_B.numpy()
        assert len(ax.images) == shown
        for image, pixels in zip(ax.images, batch.images_BHWC.numpy(), strict=False):
            np.testing.assert_array_equal(image.get_array(), pixels)
        frames = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
        texts = [text.get_text() for text in ax.texts]
        for number, label in enumerate(labels[:shown]):
            assert texts[2 * number : 2 * number + 2] == [str(label), f"n = {digits.train_counts[label]}"]
            assert frames[number].get_facecolor() == pytest.approx(hex_colour(COLOURS[groups[label]]))
        counts = ", ".join(f"{(groups[labels] == group).sum()} {group}" for group in ("many", "medium", "few"))
        assert ax.get_title("left") == f"{stream.name}, q = {stream.q:g}: {counts}".replace("-", "−")
        assert ax.get_xlim()[1] == pytest.approx(8 * CELL[0])
        assert ax.get_ylim()[0] == pytest.approx(1.06 - rows * CELL[1])


def hex_colour(colour: str) -> tuple[float, ...]:
    return (*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)


def test_the_step_is_the_one_that_training_sees(digits, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "pipeline.preview.draw", lambda *given: seen.update(batches=given[2], title=given[3]) or draw(*given)
    )
    preview(str(digits.root), tmp_path / "p.png", "shift", batch_size=16, seed=7, epoch=3, step=2, loader="torch")
    plan = TrainPlan(digits.splits["train"], STREAMS, 16, 16, seed=7, epochs=30)
    for draws, batch in zip(plan.draws(2 * plan.steps_per_epoch + 2), seen["batches"].values(), strict=True):
        np.testing.assert_array_equal(draws.ids_B, batch.ids_B)
    assert seen["title"] == ("digits, train: epoch 3, step 2, seed 7, augment shift, 16×16 pixels, batch size 16")


def test_class_names_of_any_letters(photo_folder, tmp_path, recwarn):
    source = tmp_path / "source"
    names = {"temple": "$x^2$ {", "flower": "寺", "both": "a name that is long"}
    for name, new in names.items():
        shutil.copytree(photo_folder / name, source / new)
    dataset = open_dataset(build("folder", source=source, out=tmp_path / "named", workers=1))
    figure = draw(dataset, STREAMS, first_batches(dataset, 24), "$a^{")
    figure.savefig(tmp_path / "drawn.png")
    texts = {text.get_text() for ax in figure.axes for text in ax.texts[::2]}
    assert texts == {"$x^2$ {", f"class {dataset.classes.index('寺')}", "a name that is…"}
    assert not recwarn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "p.jpg"], "p.jpg is not the name of a PNG file; end it with .png"),
        (
            ["--out", "nowhere/p.png"],
            "nowhere/p.png cannot be written (No such file or directory); choose another --out",
        ),
        (["--split", "dev"], "has no split 'dev'; choose one of: train, val, test"),
        (["--augment", "x"], "no augmentation is called 'x'; choose one of: none, shift"),
        (
            ["--augment", "shift+cutuot(4)"],
            "no distortion is called 'cutuot'; choose one of: autoaugment, cutout(side)",
        ),
        (["--step", "51", "--batch-size", "8"], "--step 51 is beyond the epoch's last, 50"),
        (["--seed", "-1"], "--seed cannot be '-1' (give a whole number of at least 0)"),
        (["--epoch", "0"], "--epoch cannot be '0' (give a whole number of at least 1)"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_status_2(digits, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        main([str(digits.root), "--loader", "torch", *options])
    error = capsys.readouterr().err
    assert exited.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_dataset_is_reported(tmp_path, capsys):
    with pytest.raises(SystemExit) as exited:
        main([str(tmp_path)])
    assert exited.value.code == 2
    assert "has no dataset.json, so it is not a dataset" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_named(digits, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exited:
        main([str(digits.root), "--loader", "torch", "--out", str(tmp_path / "file" / "p.png")])
    assert exited.value.code == 2
    assert "cannot be written (Not a directory); choose another --out" in capsys.readouterr().err
