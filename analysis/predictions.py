"""What a run predicted for each image, and how sure a difference between runs is.

predictions.npz, for each split that was predicted (here `test`; `val` alike):
    test_ids          (N,) int64      which images, no two alike
    test_labels       (N,) int64      their classes
    test_topk_labels  (N, K) int      the K likeliest classes, the likeliest first; all C where classes are few
    test_topk_scores  (N, K) float    their softmax probabilities, descending; half precision is enough
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.compare import Entry
from analysis.runs import Run, damaged_arrays, read_arrays
from shards.groups import GROUPS, class_groups

CONFIDENCE = 0.95
RESAMPLES = 2000
_FILE = "predictions.npz"
_CHUNK = 4_000_000  # drawn numbers at a time
_ROUNDING = 1e-3  # of half precision
_LEAST_IMAGES = 6  # with fewer, even where all of them turned, a sign test would not reach 95 %


@dataclass(frozen=True)
class Predictions:
    """A split's predictions by rising id.

    Attributes:
        ids_N: shape (N,), int64.
        labels_N: shape (N,), int64, in [0, C).
        topk_labels_NK: shape (N, K), int64, in [0, C).
        topk_scores_NK: shape (N, K), float32, in [0, 1], descending.
    """

    ids_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    topk_labels_NK: NDArray[np.int64]
    topk_scores_NK: NDArray[np.float32]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The predicted classes, shape (N,)."""
        return self.topk_labels_NK[:, 0]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which images were recognised, shape (N,)."""
        return self.predicted == self.labels_N

    @property
    def confidence(self) -> NDArray[np.float32]:
        """The probabilities of the predicted classes, shape (N,), in [0, 1]."""
        return self.topk_scores_NK[:, 0]


def read_predictions(run: Run, likeliest: int | None = None) -> Predictions | None:
    """Read what a run predicted on the split that it was evaluated on, after its last epoch.

    Args:
        run: the run.
        likeliest: of how many classes to keep the scores; None: of all that the file holds.

    Returns:
        None where the run kept no predictions of that split.

    Raises:
        UserError: the file is damaged, or disagrees with the run's per_class.json.
    """
    names = [f"{run.summary['evaluated_on']}_{name}" for name in ("ids", "labels", "topk_labels", "topk_scores")]
    arrays = read_arrays(run, _FILE, names)
    if not arrays:
        return None
    if lacking := [name for name in names if name not in arrays]:
        raise damaged_arrays(run, _FILE, f"it lacks {lacking[0]}")
    ids_N, labels_N, topk_labels_NK, topk_scores_NK = (arrays[name] for name in names)
    if (fault := _fault(run, ids_N, labels_N, topk_labels_NK, topk_scores_NK)) is not None:
        raise damaged_arrays(run, _FILE, fault)
    order_N = np.argsort(ids_N, kind="stable")
    return Predictions(
        ids_N[order_N].astype(np.int64),
        labels_N[order_N].astype(np.int64),
        topk_labels_NK[order_N, :likeliest].astype(np.int64),
        topk_scores_NK[order_N, :likeliest].astype(np.float32),
    )


def _fault(
    run: Run,
    ids_N: NDArray[np.generic],
    labels_N: NDArray[np.generic],
    topk_labels_NK: NDArray[np.generic],
    topk_scores_NK: NDArray[np.generic],
) -> str | None:
    """Say what is wrong with the arrays of a file; None where nothing is."""
    n, num_classes = len(ids_N) if ids_N.ndim else 0, len(run.classes)
    if not (
        ids_N.shape == labels_N.shape == (n,)
        and topk_labels_NK.ndim == 2
        and topk_labels_NK.shape == topk_scores_NK.shape
        and len(topk_labels_NK) == n
        and topk_labels_NK.shape[1] >= 1
    ):
        return "the shapes of its arrays disagree"
    if any(array.dtype.kind not in "iu" for array in (ids_N, labels_N, topk_labels_NK)):
        return "ids and labels must be whole numbers"
    if topk_scores_NK.dtype.kind != "f":
        return "scores must be floating-point numbers"
    if len(np.unique(ids_N)) != n:
        return "an image occurs twice"
    if any(array.size and not (array.min() >= 0 and array.max() < num_classes) for array in (labels_N, topk_labels_NK)):
        return f"a label lies outside its {num_classes} classes"
    scores_NK = topk_scores_NK.astype(np.float32)
    if not ((scores_NK >= 0) & (scores_NK <= 1 + _ROUNDING)).all() or (np.diff(scores_NK) > 0).any():
        return "scores must be descending probabilities"
    labels, hit_N = labels_N.astype(np.int64), topk_labels_NK[:, 0] == labels_N
    if (np.bincount(labels, minlength=num_classes) != run.total_C).any():
        return "it does not hold the images of per_class.json"
    # Of equal scores either class may come first; more than such ties are the predictions of other weights.
    apart = np.abs(np.bincount(labels[hit_N], minlength=num_classes) - run.correct_C).sum()
    if apart > max(1, n // 100):
        return f"it disagrees with per_class.json about {apart} of {n} images"
    return None


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95 % bootstrap interval; fractions in [-1, 1]."""

    estimate: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether it is a clear difference: 0 lies outside."""
        return not self.low <= 0 <= self.high


def intervals(
    values_N: ArrayLike, labels_N: ArrayLike, train_counts_C: ArrayLike, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Bootstrap the class means of per-image values over test images, stratified by class.

    Each resample draws n_c − 1 of a class's n_c images with replacement, so that the variance is unbiased also where
    classes have two or three test images (McCarthy and Snowden, "The Bootstrap and Finite Population Sampling", 1985).
    Classes with a single image, which say nothing of their own variance, are drawn together within their group, which
    makes the interval rather too wide (collapsed strata: Cochran, "Sampling Techniques", 1977, section 5A.12); a
    group's only one adds no variance. What is drawn depends on the values alone, and is the same each time.

    Args:
        values_N: shape (N,), in [-1, 1]: whether each image was recognised, or the difference of two such answers to
            the same image, which makes the bootstrap a paired one; means over seeds in both cases.
        labels_N: true classes, shape (N,), integers in [0, C).
        train_counts_C: n_j, shape (C,); decides many, medium and few.
        resamples: how many.

    Returns:
        Percentile intervals by the keys of an evaluation: `top1`, the mean over images; `balanced_accuracy`, over
        classes; `many`, `medium`, `few`, over classes of a group. What rests on fewer than six images is left out.
    """
    values_N, labels_N = np.asarray(values_N, np.float64), np.asarray(labels_N, np.int64)
    groups_C = class_groups(train_counts_C)
    distinct_V, which_N = np.unique(values_N.round(9), return_inverse=True)
    counts_CV = np.zeros((len(groups_C), len(distinct_V)), np.int64)
    np.add.at(counts_CV, (labels_N, which_N), 1)
    seen_C = counts_CV.sum(axis=1) > 0
    if not seen_C.any():
        return {}

    places = ["", *sorted(GROUPS)]  # "": classes without training images, which are of no group
    group_of = np.searchsorted(places, groups_C[seen_C])
    rows = _strata(group_of, counts_CV[seen_C])
    # Those of one group with the same answers are drawn alike, so all of them are drawn at once.
    rows_U, alike_U = np.unique(rows, axis=0, return_counts=True)
    classes_U, counts_UV = rows_U[:, 1], rows_U[:, 2:]
    images_U = counts_UV.sum(axis=1)
    # What a row's mean, summed over those alike, is multiplied with for each figure.
    shares_SU = {
        "top1": images_U / (images_U @ alike_U),
        "balanced_accuracy": classes_U / (classes_U @ alike_U),
    }
    known = dict.fromkeys(shares_SU, images_U @ alike_U >= _LEAST_IMAGES)
    for i, group in enumerate(places[1:], start=1):
        mine_U = rows_U[:, 0] == i
        shares_SU[group] = mine_U * classes_U / max(1, mine_U * classes_U @ alike_U)
        known[group] = mine_U * images_U @ alike_U >= _LEAST_IMAGES
    shares_US = np.stack(list(shares_SU.values()), axis=1)
    draws_U = np.maximum(images_U - 1, 1)
    probabilities_UV = counts_UV / images_U[:, None]
    generator = np.random.default_rng(0)
    estimates_S = (probabilities_UV @ distinct_V * alike_U) @ shares_US
    chunk = max(1, _CHUNK // counts_UV.size)
    drawn_BS = np.concatenate(
        [
            (
                generator.multinomial(
                    draws_U * alike_U, probabilities_UV, size=(min(chunk, resamples - b), len(rows_U))
                )
                @ distinct_V
                / draws_U
            )
            @ shares_US
            for b in range(0, resamples, chunk)
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    low_S, high_S = np.quantile(drawn_BS, [tail, 1 - tail], axis=0)
    return {
        key: Interval(float(estimates_S[s]), float(low_S[s]), float(high_S[s]))
        for s, key in enumerate(shares_SU)
        if known[key]
    }


def _strata(group_C: NDArray[np.int64], counts_CV: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what is drawn from, a row each: the group, how many classes it stands for, its images by value.

    A class with several images is a row; those of a group with one image each are one row together.
    """
    alone_C = counts_CV.sum(axis=1) == 1
    ones = np.ones(len(group_C), np.int64)
    rows = [np.column_stack([group_C, ones, counts_CV])[~alone_C]]
    for group in np.unique(group_C[alone_C]):
        mine_C = alone_C & (group_C == group)
        rows.append(np.concatenate([[group, mine_C.sum()], counts_CV[mine_C].sum(axis=0)])[None])
    return np.concatenate(rows)


Differences = dict[tuple[str, str], dict[str, Interval]]  # by dataset and title


@dataclass(frozen=True)
class Answers:
    """What an entry's runs answered for each image.

    Attributes:
        runs: each run's predictions, only the likeliest class of each image; all of the same images.
        correct_N: the share of the seeds that recognised each image, shape (N,), float64.
    """

    runs: list[Predictions]
    correct_N: NDArray[np.float64]

    @property
    def labels(self) -> NDArray[np.int64]:
        """True classes, shape (N,)."""
        return self.runs[0].labels_N


def answers(entry: Entry) -> Answers | None:
    """Read the predictions of an entry's runs; None unless all of them kept theirs, of the same images."""
    replicates = [[read_predictions(run, likeliest=1) for run in runs] for runs in entry.replicates.values()]
    found = [predictions for runs in replicates for predictions in runs if predictions is not None]
    if len(found) < len(entry.runs) or not all(_same_images(found[0], other) for other in found):
        return None
    means = [np.mean([one.correct for one in runs if one is not None], axis=0) for runs in replicates]
    return Answers(found, np.mean(means, axis=0))


def _same_images(one: Predictions, other: Predictions) -> bool:
    return np.array_equal(one.ids_N, other.ids_N) and np.array_equal(one.labels_N, other.labels_N)


def against_first(entries: Sequence[Entry], answered: Mapping[str, Answers | None]) -> dict[str, dict[str, Interval]]:
    """Compare the entries of one dataset with the first of them, image by image.

    Args:
        entries: of one dataset.
        answered: their answers by title.

    Returns:
        By title, the intervals of the differences (see `intervals`), of those entries that were trained on the first
        one's class counts and answered the same images.
    """
    return {
        entry.title: intervals(one.correct_N - first.correct_N, one.labels, entry.runs[0].train_counts_C)
        for entry in entries[1:]
        if (one := answered[entry.title]) is not None
        and (first := answered[entries[0].title]) is not None
        and _incomparable(entries[0], first, entry, one) is None
    }


def _incomparable(first: Entry, first_answers: Answers, other: Entry, answered: Answers) -> str | None:
    """Say why two entries cannot be compared image by image; None where they can."""
    if not np.array_equal(first.runs[0].train_counts_C, other.runs[0].train_counts_C):
        return "other class counts"
    if first.runs[0].classes != other.runs[0].classes:
        return "other classes"
    return None if _same_images(first_answers.runs[0], answered.runs[0]) else "other test images"


def differences(entries: Sequence[Entry]) -> tuple[Differences, list[str]]:
    """Compare the entries of each dataset with its first, and say which cannot be, and why."""
    found: Differences = {}
    notes = []
    for dataset in dict.fromkeys(entry.dataset for entry in entries):
        first, *others = [entry for entry in entries if entry.dataset == dataset]
        answered = {entry.title: answers(entry) for entry in (first, *others)}
        compared = against_first([first, *others], answered)
        found |= {(dataset, title): of for title, of in compared.items()}
        if not any(answered.values()):
            continue  # runs of a time before there were predictions
        whys: dict[str, list[str]] = {}
        for entry in others if answered[first.title] is not None else [first]:
            if entry.title not in compared:
                mine, base = answered[entry.title], answered[first.title]
                why = None if mine is None or base is None else _incomparable(first, base, entry, mine)
                whys.setdefault(why or "no predictions of the same images", []).append(entry.title)
        if others:
            notes += [
                f"not compared image by image on {dataset}, {why}: {', '.join(titles)}" for why, titles in whys.items()
            ]
    return found, notes
