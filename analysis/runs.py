"""A finished run, read from its folder.

runs/bbn/
    config.yaml       the resolved configuration
    metrics.jsonl     one row per epoch, appended while training
    summary.json      the figures of the whole run; written last, so a folder without it is unfinished
    per_class.json    correct and total test images of each class, after the last epoch
    predictions.npz   what was predicted for each test image: see analysis.predictions
    diagnostics.npz, feature_sample.npz    of its classifier and features: see analysis.inside
"""

import json
import math
import os
import zipfile
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError

# The figures of one evaluation, in the order of every table: their key and their name for a reader.
METRICS = {
    "top1": "overall",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "balanced_accuracy": "balanced",
    "ece": "ECE",
}

_NUMBER = (int, float)
_SUMMARY: dict[str, type | tuple[type, ...]] = {
    "title": str,
    "stage": int,
    "from": (str, type(None)),
    "dataset": str,
    "seed": int,
    "epochs": int,
    "last": dict,
    "selected": (dict, type(None)),
    "selected_on": (str, type(None)),
    "evaluated_on": str,
    "images_per_second": (*_NUMBER, type(None)),
    "seconds": _NUMBER,
    "environment": dict,
    "command": str,
}
_PER_CLASS = dict.fromkeys(("classes", "train_counts", "correct", "total"), list)


@dataclass(frozen=True)
class Run:
    """What one run left behind.

    Attributes:
        path: the folder.
        config: the text of config.yaml.
        epochs: the rows of metrics.jsonl by rising epoch; where a resumed run repeated one, the later row.
        summary: summary.json; `last` and `selected` hold fractions in [0, 1], or None, for each of `METRICS`.
        classes: class names by label.
        train_counts_C: n_j, training images of class j, shape (C,), int64.
        correct_C: test images of class j predicted correctly after the last epoch, shape (C,), int64.
        total_C: test images of class j, shape (C,), int64.
    """

    path: Path
    config: str
    epochs: list[dict[str, Any]]
    summary: dict[str, Any]
    classes: list[str]
    train_counts_C: NDArray[np.int64]
    correct_C: NDArray[np.int64]
    total_C: NDArray[np.int64]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def title(self) -> str:
        """What a table calls the method, such as "BBN + AFG"."""
        return str(self.summary["title"])

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return str(self.summary["dataset"])

    @property
    def baselines(self) -> list[dict[str, Any]]:
        """What the run measured itself against, if anything: rows with a `name` and figures like those of `last`."""
        return list(self.summary.get("baselines", {}).get("rows", []))

    @property
    def last(self) -> dict[str, float | None]:
        """The figures after the last epoch: fractions in [0, 1], None where there was nothing to measure."""
        return {key: self.summary["last"][key] for key in METRICS}


class NotFinishedError(UserError):
    """A run that has no summary.json yet."""


class NotARunError(UserError):
    """A file, or a folder that training did not write."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read finished runs in the order given; a folder named twice counts once.

    Raises:
        UserError: a path is no run, a run is unfinished, or one of its files is missing or damaged.
    """
    return [read_run(path) for path in _distinct(paths)]


def read_finished_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read the finished runs among several paths, as `runs/*` lists them, and say which were skipped, and why.

    Raises:
        UserError: as `read_runs` does for a path that does not exist, for a single one, where none is a finished run,
            and for damaged files.
    """
    distinct = _distinct(paths)
    runs: list[Run] = []
    skipped: dict[str, list[str]] = {}
    for path in distinct:
        try:
            runs.append(read_run(path))
        except (NotFinishedError, NotARunError) as error:
            if len(distinct) == 1 or not os.path.lexists(path):
                raise
            why = "not finished" if isinstance(error, NotFinishedError) else "no run"
            skipped.setdefault(why, []).append(str(path))
    if not runs:
        raise UserError(f"none of the {len(distinct)} paths is a finished run; name folders of finished runs")
    return runs, [f"skipped, {why}: {', '.join(names)}" for why, names in skipped.items()]


def _distinct(paths: Sequence[Path]) -> list[Path]:
    return list({os.path.realpath(path): path for path in paths}.values())


def read_run(path: Path) -> Run:
    """Read one finished run; see `read_runs`."""
    if not path.is_dir():
        raise NotARunError(f"{path} is not a folder; name the folder of a run")
    if not (path / "summary.json").exists():
        if (path / "config.yaml").exists():
            raise NotFinishedError(f"{path} is not finished: it has no summary.json; resume its training first")
        raise NotARunError(f"{path} is not a run: it has no config.yaml; name a folder that training wrote")
    summary = _read_table(path / "summary.json", _SUMMARY)
    for key in ("last", "selected"):
        if summary[key] is not None and not _is_evaluation(summary[key]):
            raise _damaged(path / "summary.json", f"{key!r} must hold fractions in [0, 1] or null")
    if summary["selected"] is not None and not isinstance(summary["selected"].get("epoch"), int):
        raise _damaged(path / "summary.json", "'selected' names no epoch")
    if not _has_baselines(summary):
        raise _damaged(path / "summary.json", "'baselines' must hold named rows of figures")
    per_class = _read_table(path / "per_class.json", _PER_CLASS)
    try:
        counts, correct, total = (
            np.array(per_class[key], dtype=np.int64) for key in ("train_counts", "correct", "total")
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise _damaged(path / "per_class.json", error) from None
    if not counts.shape == correct.shape == total.shape == (len(per_class["classes"]),):
        raise _damaged(path / "per_class.json", "its lists differ in length")
    if (counts < 0).any() or (correct < 0).any() or (correct > total).any():
        raise _damaged(path / "per_class.json", "a count is negative, or more images are correct than there are")
    return Run(
        path=path,
        config=_read_text(path / "config.yaml"),
        epochs=_read_epochs(path / "metrics.jsonl"),
        summary=summary,
        classes=[str(name) for name in per_class["classes"]],
        train_counts_C=counts,
        correct_C=correct,
        total_C=total,
    )


_ARCHIVE = (zipfile.BadZipFile, zlib.error)


def read_arrays(run: Run, file: str, names: Collection[str] | None = None) -> dict[str, NDArray[Any]] | None:
    """Read arrays of a run's .npz file.

    Args:
        run: the run.
        file: the file's name.
        names: which arrays, so far as it has them; None: all.

    Returns:
        None where there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with np.load(run.path / file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in (arrays.files if names is None else names) if name in arrays}
    except FileNotFoundError:
        return None
    except PermissionError:  # reported as what it is
        raise
    # Damaged archives meet NumPy with whatever its code runs into.
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, *_ARCHIVE) as error:
        raise damaged_arrays(run, file, error) from None


def damaged_arrays(run: Run, file: str, why: object) -> UserError:
    """Return what to raise about a damaged .npz file, without which the run can be shown too."""
    text = " ".join(str(why).split())
    return UserError(f"{run.path / file} is damaged ({text}); repeat that run, or remove the file to go without it")


def _damaged(path: Path, why: object) -> UserError:
    return UserError(f"{path} is damaged ({why}); repeat that run or leave it out")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read ({why}); repeat that run or leave it out") from None


def _read_table(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    text = _read_text(path)
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged(path, error) from None
    if not isinstance(table, dict):
        raise _damaged(path, "it holds no JSON object")
    for key, kind in kinds.items():
        if key not in table or not isinstance(table[key], kind):
            raise _damaged(path, f"{key!r} is missing or of the wrong type")
        if isinstance(table[key], float) and not math.isfinite(table[key]):
            raise _damaged(path, f"{key!r} is not finite")
    return table


def _is_evaluation(figures: dict[str, Any]) -> bool:
    def is_fraction(value: object) -> bool:
        return value is None or (isinstance(value, _NUMBER) and 0 <= value <= 1)

    return all(key in figures and is_fraction(figures[key]) for key in METRICS)


def _has_baselines(summary: dict[str, Any]) -> bool:
    """Whether the baselines of a summary can be read; there need not be any."""
    baselines = summary.get("baselines", {})
    rows = baselines.get("rows", []) if isinstance(baselines, dict) else None
    return isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("name"), str) and _is_evaluation(row) for row in rows
    )


def _read_epochs(path: Path) -> list[dict[str, Any]]:
    *lines, tail = _read_text(path).split("\n")
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate([*lines, tail], start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            if number > len(lines):  # a kill cut off the last line
                break
            raise _damaged(path, f"line {number}: {error}") from None
        if row is None:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("epoch"), int):
            raise _damaged(path, f"line {number} names no epoch")
        rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]
