"""`python -m pipeline.preview DIR`: a picture of what the network sees.

The streams, their ids, windows, flips and distortions are those of a run of BBN with the same seed, batch size and
augmentation, brought by the same loaders. (A stream's name is part of its seed, so that other methods see others.)
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from pipeline.batch import Batch
from pipeline.kinds import LoaderKind
from pipeline.loader import open_loader
from pipeline.plan import Stream, TrainPlan
from shards.atomic import partial_file
from shards.cli import Parser, program_name
from shards.errors import UserError, user_errors_exit_2
from shards.groups import FEW_BELOW, GROUPS, MANY_ABOVE, class_groups
from shards.index import Dataset, open_dataset

# Of Okabe and Ito's colours, which colour-blind eyes tell apart: three that also differ in lightness.
COLOURS = {"many": "#0072b2", "medium": "#009e73", "few": "#e69f00"}
MEANINGS = {
    "many": f"more than {MANY_ABOVE} training images",
    "medium": f"{FEW_BELOW} to {MANY_ABOVE}",
    "few": f"fewer than {FEW_BELOW}",
}
INK, MUTED = "#1b1f27", "#5f6774"
COLUMNS = 8
CELL = (1.14, 1.48)  # inches: a picture of 1 by 1, its frame, two lines of text
MOST_SHOWN = 64  # of each stream: more are too small to look at
LONGEST_NAME = 15


def preview(
    root: str,
    out: Path = Path("preview.png"),
    augment: str = "none",
    image_size: PositiveInt | None = None,
    batch_size: PositiveInt = 32,
    seed: NonNegativeInt = 0,
    epoch: PositiveInt = 1,
    step: NonNegativeInt = 0,
    split: str = "train",
    loader: LoaderKind = "auto",
) -> Path:
    """Draw one step's images of the uniform and the reversed stream, with each class's n_j, as a PNG file.

    Args:
        root: the dataset's folder or URL.
        out: the file to write.
        augment: as in input.augment: a crop and what follows it, such as cifar+autoaugment+cutout(16) or imagenet.
        image_size: in pixels, as in input.image_size (default: the smallest side of the stored images, at most 224).
        batch_size: images of each stream, as in input.batch_size; the first 64 are shown.
        seed: as in loop.seed.
        epoch: counted from 1.
        step: within the epoch, counted from 0.
        split: train, val or test.
        loader: as in input.loader.

    Returns:
        The file that was written.

    Raises:
        UserError: no dataset, split, recipe or step of that name or number, or a file that cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"{out} is not the name of a PNG file; end it with .png")
    dataset = open_dataset(root)
    if split not in dataset.splits:
        raise UserError(f"{dataset.place} has no split {split!r}; choose one of: {', '.join(dataset.splits)}")
    stored = dataset.manifest["image"]
    image_size = image_size or min(224, stored["min_height"], stored["min_width"])
    streams = (Stream("uniform", 1.0, augment), Stream("reversed", -1.0, augment))
    plan = TrainPlan(dataset.splits[split], streams, batch_size, image_size, seed, epoch)
    if step >= plan.steps_per_epoch:
        raise UserError(f"--step {step} is beyond the epoch's last, {plan.steps_per_epoch - 1}")
    with open_loader(plan, loader, start_step=(epoch - 1) * plan.steps_per_epoch + step, first_steps=1) as batches:
        (shown,) = islice(batches, 1)
    title = (
        f"{dataset.name}, {split}: epoch {epoch}, step {step}, seed {seed}, augment {augment},"
        f" {image_size}×{image_size} pixels, batch size {batch_size}"
        + (f", the first {MOST_SHOWN} shown" if batch_size > MOST_SHOWN else "")
    )
    _write(draw(dataset, streams, shown, title), out)
    return out


def draw(dataset: Dataset, streams: Sequence[Stream], batches: dict[str, Batch], title: str) -> Figure:
    """Draw the streams' batches as grids side by side, each picture framed in its group's colour."""
    count = min(MOST_SHOWN, max(len(batch.ids_B) for batch in batches.values()))
    rows = -(-count // COLUMNS)
    inches = (len(streams) * CELL[0] * COLUMNS + 1, CELL[1] * rows + 1.4)
    figure = Figure(figsize=inches, dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.25, h_pad=0.12))
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    for stream, ax in zip(streams, figure.subplots(1, len(streams), squeeze=False)[0], strict=True):
        batch = batches[stream.name]
        groups_B = class_groups(dataset.train_counts)[batch.labels_B.cpu().numpy()]
        shares = ", ".join(f"{np.count_nonzero(groups_B == group)} {group}" for group in GROUPS)
        q = f"{stream.q:g}".replace("-", "−")
        ax.set_title(f"{stream.name}, q = {q}: {shares}", fontsize=11, color=INK, loc="left")
        _draw_grid(ax, dataset, batch, groups_B, rows)
    figure.legend(
        handles=[Patch(color=COLOURS[group], label=f"{group}: {MEANINGS[group]}") for group in GROUPS],
        loc="outside lower center",
        ncols=len(GROUPS),
        frameon=False,
        labelcolor=MUTED,
    )
    return figure


def _draw_grid(ax: Axes, dataset: Dataset, batch: Batch, groups_B: NDArray[np.str_], rows: int) -> None:
    """Draw the pictures, 1 by 1, each at the top of its cell."""
    names = _readable_names(dataset.classes)
    ax.set_xlim(-0.06, COLUMNS * CELL[0])
    ax.set_ylim(1.06 - rows * CELL[1], 1.06)
    ax.set_aspect("equal", anchor="N")
    ax.set_axis_off()
    images_BHWC, labels_B = batch.images_BHWC.cpu().numpy(), batch.labels_B.tolist()
    for number in range(min(MOST_SHOWN, len(labels_B))):
        row, column = divmod(number, COLUMNS)
        left, bottom, label = column * CELL[0], -row * CELL[1], labels_B[number]
        # Behind the picture and a little larger: a frame that hides no pixel.
        colour = COLOURS[str(groups_B[number])]
        ax.add_patch(Rectangle((left - 0.035, bottom - 0.035), 1.07, 1.07, color=colour, linewidth=0, zorder=1))
        ax.imshow(images_BHWC[number], extent=(left, left + 1, bottom, bottom + 1), zorder=2)
        size = f"n = {dataset.train_counts[label]:,}"
        for down, text, fontsize, ink in ((0.07, names[label], 8, INK), (0.21, size, 7, MUTED)):
            ax.text(
                left + 0.5, bottom - down, text, ha="center", va="top", fontsize=fontsize, color=ink, parse_math=False
            )


def _readable_names(classes: Sequence[str]) -> list[str]:
    """Return class names that fit below a picture; the number of a class whose letters the font lacks."""
    glyphs = get_font(findfont(FontProperties())).get_charmap()
    names = []
    for number, name in enumerate(classes):
        if not all(ord(letter) in glyphs for letter in name):
            name = f"class {number}"
        names.append(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1].rstrip()}…")
    return names


def _write(figure: Figure, out: Path) -> None:
    try:
        with partial_file(out) as part:
            figure.savefig(part, format="png")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another --out") from None


def main(argv: list[str] | None = None) -> None:
    """Run the command; a user's mistake exits with status 2."""
    program = program_name("python -m pipeline.preview", "preview")
    parser = Parser(prog=program, description="Draw what the network sees: a step of the uniform and reversed streams.")
    parser.add_function_arguments(preview, as_positional=True)
    options = parser.parse_args(argv)
    with user_errors_exit_2(program):
        print(preview(**vars(options)))


if __name__ == "__main__":
    main()
