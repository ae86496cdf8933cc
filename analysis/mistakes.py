"""Pictures of the tail's worst mistakes, where the dataset that a run was trained on is still within reach."""

import base64
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from analysis.predictions import Answers
from analysis.runs import Run
from analysis.settings import parse_config
from shards.errors import UserError
from shards.groups import class_groups
from shards.index import Split, open_dataset
from shards.remote import is_url

SHOWN = 12
_OF_A_CLASS = 3  # at most, so that one hopeless class does not fill the sheet; more where classes are few
_SIDE = 160  # pixels: shown at half of that, sharp on fine screens
_TINY = 64  # smaller pictures are stored without loss


@dataclass(frozen=True)
class Mistake:
    """A test image that was taken for another class.

    Attributes:
        image: its row in the split.
        true, predicted: classes; the prediction is that of most runs that were wrong.
        confidence: mean probability that the runs that were wrong gave their predictions, in [0, 1].
        wrong: the share of the runs that were wrong, in (0, 1].
    """

    image: int
    true: int
    predicted: int
    confidence: float
    wrong: float


def worst_mistakes(answers: Answers, counts_C: NDArray[np.int64]) -> tuple[str, list[Mistake]]:
    """Return the group nearest the tail that has test images, "few" or "medium", and its worst mistakes.

    The worst are those that most runs make, the surest first. A group "many" is no tail.
    """
    groups_C = class_groups(counts_C)
    ids_N, labels_N = answers.runs[0].ids_N, answers.labels
    for group in ("few", "medium"):
        if (mine_N := groups_C[labels_N] == group).any():
            break
    else:
        return "many", []
    rows = np.flatnonzero(mine_N)
    wrong_RM = np.stack([~one.correct[rows] for one in answers.runs])
    sure_RM = np.stack([one.confidence[rows] for one in answers.runs]).astype(np.float64)
    share_M = wrong_RM.mean(axis=0)
    confidence_M = (sure_RM * wrong_RM).sum(axis=0) / np.maximum(1, wrong_RM.sum(axis=0))
    at_most = max(_OF_A_CLASS, -(-SHOWN // len(np.unique(labels_N[rows[share_M > 0]])))) if share_M.any() else 0
    found: list[Mistake] = []
    taken = Counter[int]()
    for m in np.lexsort((rows, -confidence_M, -share_M)):
        true = int(labels_N[rows[m]])
        if not share_M[m] or len(found) == SHOWN:
            break
        if taken[true] < at_most:
            taken[true] += 1
            predicted = Counter(
                int(one.predicted[rows[m]]) for one, wrong in zip(answers.runs, wrong_RM[:, m], strict=True) if wrong
            )
            found.append(
                Mistake(
                    int(ids_N[rows[m]]), true, predicted.most_common(1)[0][0], float(confidence_M[m]), float(share_M[m])
                )
            )
    return group, found


def reachable_split(run: Run, answers: Answers) -> Split | None:
    """Open the split that a run was evaluated on; None where it is not on this machine, or holds other images."""
    place = _place(run)
    if place is None or is_url(place):
        return None
    # As it was named from the folder that training was started in: this one, or the one that holds runs/.
    for folder in (Path(), run.path.resolve().parent.parent):
        try:
            dataset = open_dataset(folder / place)
        except (UserError, OSError, ValueError):  # not there, not ours to read, or damaged
            continue
        split = dataset.splits.get(run.summary["evaluated_on"])
        same = dataset.classes == run.classes and np.array_equal(dataset.train_counts, run.train_counts_C)
        if split is None or not same:
            continue
        ids_N, labels_N = answers.runs[0].ids_N, answers.labels
        if len(ids_N) and ids_N[-1] < len(split) and np.array_equal(split.samples["label"][ids_N], labels_N):
            return split
    return None


def _place(run: Run) -> str | None:
    about = parse_config(run.config).get("about")
    found = about.get("data") if isinstance(about, dict) else None
    return str(found) if found else None


def thumbnail(split: Split, image: int) -> str | None:
    """Return an image, made smaller, as a data URI; None where it cannot be read."""
    row = split.samples[image]
    try:
        with split.shard_paths[row["shard"]].open("rb") as file:
            file.seek(row["offset"])
            data = file.read(row["size"])
        with Image.open(io.BytesIO(data)) as opened:
            if opened.size != (row["width"], row["height"]):
                return None
            picture = opened.convert("RGB")
    # PIL's plugins meet damaged bytes with whatever their code runs into.
    except Exception:
        return None
    picture.thumbnail((_SIDE, _SIDE))
    kind = "PNG" if max(picture.size) <= _TINY else "JPEG"
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({} if kind == "PNG" else {"quality": 80}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
