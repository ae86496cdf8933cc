"""Use a trained model: what it says of images, as a table, CSV, JSON Lines or Parquet.

    tailstream predict --run runs/birds-bbn-1 ~/holiday --topk 3 --out birds.jsonl
    find /archive -name '*.jpg' -print0 | tailstream predict --run runs/birds-bbn-1 -
    tailstream predict --run runs/seed-0 --run runs/seed-1 --run runs/seed-2 ~/holiday       averaged

It shows the network exactly the pictures that an evaluation with the torch loader would, and needs neither the dataset
nor DALI: the run's folder, copied anywhere, is enough. Images that cannot be read are named on standard error and left
out. A name that begins with a dash comes after `--`.

    --prior uniform     where every class is as likely as any other; or a JSON file, {"class": share, …}, that sums to 1
"""

import csv
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TextIO

import numpy as np
from jsonargparse.typing import PositiveInt
from numpy.typing import NDArray

from shards.atomic import partial_file
from shards.cli import Parser, program_name
from shards.cores import cores
from shards.encode import unread
from shards.errors import UserError, user_errors_exit_2
from shards.progress import Progress, say

if TYPE_CHECKING:  # a command line is read without torch: see train/engine/launch.py
    from train.engine.inference import Item, Model

Format = Literal["table", "csv", "jsonl", "parquet"]
FORMATS: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


class Row(NamedTuple):
    """What is said of one image.

    Attributes:
        file: its name.
        label: the class; None where its score is below the calibration's threshold.
        score: the probability of the most likely class, in [0, 1].
        topk: the most likely classes with their probabilities, falling.
    """

    file: str
    label: str | None
    score: float
    topk: list[tuple[str, float]]


def predict(
    models: "Sequence[Model]",
    items: "Sequence[Item]",
    topk: int,
    batch_size: int,
    prior_C: NDArray[np.float64] | None = None,
    strict: bool = False,
) -> Iterator[Row | None]:
    """Say what images show: the mean of the models' probabilities.

    Args:
        models: of the same classes.
        items: the images.
        topk: classes to name.
        batch_size: images at a time.
        prior_C: as in `Model.probabilities`.
        strict: whether to stop at an image that cannot be read.

    Yields:
        A row per image, in order; None for one that cannot be read, which is said on stderr.

    Raises:
        UserError: with `strict`, an image that cannot be read.
    """
    from train.engine.inference import show_images

    classes = models[0].description.classes
    least_C = np.mean([model.calibrated.thresholds() for model in models], axis=0)
    views = list(dict.fromkeys(model.view for model in models))
    batch: list[tuple[Any, list[NDArray[np.uint8]]]] = []

    def rows() -> Iterator[Row]:
        if not batch:
            return
        shown = {view: np.stack([pictures[v] for _, pictures in batch]) for v, view in enumerate(views)}
        mean_BC = np.mean([model.probabilities(shown[model.view], prior_C) for model in models], axis=0)
        order_BK = np.argsort(-mean_BC, axis=1, kind="stable")[:, :topk]
        for (item, _), p_C, order_K in zip(batch, mean_BC, order_BK.tolist(), strict=True):
            best = order_K[0]
            label = classes[best] if p_C[best] >= least_C[best] else None
            yield Row(item.name, label, float(p_C[best]), [(classes[c], float(p_C[c])) for c in order_K])
        batch.clear()

    for item, shown in show_images(items, views, threads=cores(), ahead=2 * batch_size):
        if isinstance(shown, str):
            if strict:
                raise UserError(f"{printable(item.name)}: {shown}; leave --strict out to skip such images")
            say(f"skipped {printable(item.name)}: {shown}")
            yield from rows()  # so that rows keep their order
            yield None
            continue
        batch.append((item, shown))
        if len(batch) == batch_size:
            yield from rows()
    yield from rows()


def read_prior(asked: str | None, description_classes: Sequence[str], train_counts: Sequence[int]) -> Any:
    """Return the class shares that --prior asks for, shape (C,), or None.

    Raises:
        UserError: a file that is missing, damaged, does not name all classes, or does not sum to 1.
    """
    classes = list(description_classes)
    if asked is None:
        return None
    if asked == "train":
        from train.engine.calibration import shares

        return shares(train_counts)
    if asked == "uniform":
        return np.full(len(classes), 1 / len(classes))
    remedy = 'give {"class": share, …} for all classes'
    try:
        given = json.loads(Path(asked).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--prior {asked} cannot be read ({error.strerror}); {remedy}, train or uniform") from None
    except ValueError as error:
        raise UserError(f"--prior {asked} is not JSON ({error}); {remedy}") from None
    if not isinstance(given, dict) or given.keys() != set(classes):
        named = given.keys() if isinstance(given, dict) else set()
        odd = [name for name in classes if name not in named] + sorted(named - set(classes))
        raise UserError(f"--prior {asked} and the model differ in {len(odd)} classes ({odd[0]!r}, …); {remedy}")
    values = [given[name] for name in classes]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 for value in values)
    if not numbers or not math.isclose(sum(values), 1.0, abs_tol=1e-3):
        raise UserError(f"--prior {asked} holds no shares of at least 0 that sum to 1; divide each by their sum")
    return np.array(values, np.float64) / sum(values)


def printable(text: object) -> str:
    r"""Return text on one line for a terminal: control, direction and undecodable characters as \x1b, \u202e, …"""
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )


class Writer(Protocol):
    """Takes rows one by one; `close` ends the file."""

    def write(self, row: Row) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class _Table:
    """For reading: a line per image, every character visible."""

    def __init__(self, file: TextIO, topk: int) -> None:
        self._file = file

    def write(self, row: Row) -> None:
        first = "(rejected)" if row.label is None else printable(row.label)
        others = [f"{printable(name)} {score:.3f}" for name, score in row.topk[row.label is not None :]]
        more = f"  ({', '.join(others)})" if others else ""
        self._file.write(f"{printable(row.file)}  {first}  {row.score:.3f}{more}\n")

    def close(self) -> None:
        pass


class _Csv:
    """file,label,score,label_1,score_1,…: all texts are quoted (until Python 3.13 csv leaves out a carriage return)."""

    def __init__(self, file: TextIO, topk: int) -> None:
        self._writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        ranks = [f"{what}_{k}" for k in range(1, topk + 1) for what in ("label", "score")]
        self._writer.writerow(["file", "label", "score", *ranks])

    def write(self, row: Row) -> None:
        ranks = [value for pair in row.topk for value in pair]
        self._writer.writerow([row.file, "" if row.label is None else row.label, row.score, *ranks])

    def close(self) -> None:
        pass


class _JsonLines:
    """One object a line, in ASCII, so that no character of a name can break a line."""

    def __init__(self, file: TextIO, topk: int) -> None:
        self._file = file

    def write(self, row: Row) -> None:
        topk = [{"label": label, "score": score} for label, score in row.topk]
        self._file.write(json.dumps({"file": row.file, "label": row.label, "score": row.score, "topk": topk}) + "\n")

    def close(self) -> None:
        pass


class _Parquet:
    """Columns file, label, score, topk (a list of label and score); bytes of names that are no UTF-8 as \\udc…."""

    ROWS = 10_000

    def __init__(self, path: Path, topk: int) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError("--format parquet needs pyarrow; pip install 'tailstream[parquet]', or use csv") from None
        self._arrow, text = pyarrow, pyarrow.string()
        ranks = pyarrow.list_(pyarrow.struct({"label": text, "score": pyarrow.float64()}))
        self._schema = pyarrow.schema({"file": text, "label": text, "score": pyarrow.float64(), "topk": ranks})
        self._writer = pyarrow.parquet.ParquetWriter(str(path), self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, row: Row) -> None:
        ranks = [{"label": label, "score": score} for label, score in row.topk]
        name = row.file.encode("utf-8", "backslashreplace").decode("utf-8")
        self._rows.append({"file": name, "label": row.label, "score": row.score, "topk": ranks})
        if len(self._rows) == self.ROWS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


_TEXT: dict[str, Any] = {"table": _Table, "csv": _Csv, "jsonl": _JsonLines}


@contextmanager
def open_writer(form: Format, out: Path | None, topk: int) -> Iterator[Writer]:
    """Open a file that appears whole or not at all, or standard output.

    Raises:
        UserError: the file is there, cannot be written, or the format needs one or a package.
    """
    if out is None:
        if form == "parquet":
            raise UserError("--format parquet needs a file; name it with --out")
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
        yield _TEXT[form](sys.stdout, topk)
        sys.stdout.flush()
        return
    check_new(out)
    try:
        with partial_file(out) as temporary:
            if form == "parquet":
                writer: Writer = _Parquet(temporary, topk)
                yield writer
                writer.close()
            else:
                with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                    yield _TEXT[form](file, topk)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); name another file") from None


def check_new(out: Path) -> None:
    """Raise a UserError where a file that is to be written is there already, or its folder is not."""
    if os.path.lexists(out):
        raise UserError(f"--out {out} already exists; remove it or name another")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; make it or name another")


def read_list(file: Any) -> list[str]:
    """Return the names in a list (bytes): one a line, or ended by zero bytes, as `find -print0` writes."""
    data: bytes = file.read()
    names = data.split(b"\0") if b"\0" in data else [line.removesuffix(b"\r") for line in data.split(b"\n")]
    return [os.fsdecode(name) for name in names if name]


def main(argv: list[str] | None = None) -> None:
    """Predict as the command line says; a user's mistake exits with status 2."""
    program = program_name("python -m train.predict", "predict")
    parser = Parser(prog=program, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", action="append", metavar="RUN", help="a run's folder; several are averaged")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="images, folders, .tar shards; - reads a list of them")
    parser.add_argument("--topk", type=PositiveInt, default=5, help="classes to name")
    parser.add_argument("--format", type=Format | None, help="of the output; default: by the end of --out, else table")
    parser.add_argument("--out", type=Path | None, metavar="FILE", help="default: standard output")
    parser.add_argument(
        "--prior", type=str | None, help="class shares where the model is used: train, uniform or a JSON file"
    )
    parser.add_argument("--batch-size", type=PositiveInt, default=32, help="images at a time")
    parser.add_argument(
        "--weights", type=Literal["last", "selected"] | None, help="default: those that val chose, where it chose"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be read")
    asked = parser.parse_args(argv)
    try:
        with user_errors_exit_2(program):
            _main(asked)
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)


def _main(asked: Any) -> None:
    if not asked.run:
        raise UserError("no model is named; give --run RUN, the folder of a trained run")
    if asked.out is not None:
        check_new(asked.out)  # before any work
    from train.engine.inference import find_images, left_out, open_model

    models = [open_model(Path(run), asked.weights) for run in asked.run]
    first = models[0].description
    for model in models[1:]:
        if model.description.classes != first.classes:
            raise UserError(f"{model.run} and {models[0].run} have other classes; average runs on the same dataset")
    prior_C = read_prior(asked.prior, first.classes, first.train_counts)
    topk = min(asked.topk, len(first.classes))
    listed = read_list(sys.stdin.buffer) if "-" in asked.paths else []
    items = find_images([path for path in asked.paths if path != "-"], listed)
    for path in asked.paths:
        if others := left_out(path):
            say(f"{printable(path)}: {unread(others)}")
    for model in models:
        how = "calibrated" if model.calibration else "not calibrated"
        say(f"{printable(model.run)}: {model.description.method}, {model.weights} weights, {how}")
    if prior_C is not None and not all(model.calibration for model in models):
        say(
            "note: --prior takes uncalibrated probabilities to be made for the class shares of the training images,"
            " which is wrong after a method that re-balances them; where there is a val split, run tailstream calibrate"
            " first"
        )
    skipped = 0
    form = asked.format or FORMATS.get(asked.out.suffix.lower() if asked.out else "", "table")
    with open_writer(form, asked.out, topk) as writer, Progress("predict", len(items)) as progress:
        for row in predict(models, items, topk, asked.batch_size, prior_C, asked.strict):
            progress.add(1)
            if row is None:
                skipped += 1
            else:
                writer.write(row)
        if skipped == len(items):
            raise UserError(f"none of the {skipped:,} images could be read")
    if skipped:
        say(f"{skipped:,} of {len(items):,} images could not be read and were skipped")


if __name__ == "__main__":
    main()
