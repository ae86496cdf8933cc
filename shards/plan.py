"""Which image goes into which split, and in what order. Nothing is read here."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.profiles import profile_counts
from shards.sources import Listing, Source
from shards.sources.files import printable

HELD_OUT = ("test", "val")


@dataclass(frozen=True)
class Plan:
    """What a dataset is made of.

    Attributes:
        splits: the images of each split in the order they are written.
        pools: of each class, the positions in the source's listing of its training images that are not held out; the
            profile keeps the first so many.
        notes: lines for the user.
    """

    splits: dict[str, Listing]
    pools: list[NDArray[np.int64]]
    notes: list[str]


def plan_splits(
    source: Source,
    *,
    profile: str,
    imbalance_factor: float,
    test_fraction: float,
    val_fraction: float,
    seed: int,
    copies: Sequence[Sequence[int]] = (),
    unreadable: Sequence[int] = (),
) -> Plan:
    """Hold out test and validation images, then thin the training images by the profile.

        a class's shuffled training images:  | test | val | kept by the profile | left out |

    Held-out images are taken first, so they stay as balanced as the source is, and each class is shuffled by
    its own seed: a larger imbalance factor keeps a part of what a smaller one keeps, and the test images are
    the same for both. Splits that the source has are taken as they are.

    Args:
        source: the listed images; each class has a training image.
        profile: a key of `shards.profiles.PROFILES`.
        imbalance_factor: for the profile, >= 1.
        test_fraction: share of each class's training images that is held out where the source has no test
            split, in [0, 1); rounded half up, and one image always stays.
        val_fraction: likewise for the validation split, of what the test split left.
        seed: an integer >= 0.
        copies: groups of identical training images, by their position in the listing. A group is held out whole,
            whatever its labels, or not at all.
        unreadable: positions of training images that the profile keeps last.

    Returns:
        The splits; one that would be empty is left out.
    """
    n_classes = len(source.classes)
    train = source.splits["train"]
    by_class = np.split(np.argsort(train.labels, kind="stable"), np.cumsum(train.class_counts(n_classes))[:-1])
    pools = [np.random.default_rng([seed, 0, j]).permutation(ids) for j, ids in enumerate(by_class)]
    splits = {}
    notes = []
    for name, fraction in zip(HELD_OUT, (test_fraction, val_fraction), strict=True):
        if name in source.splits:
            splits[name] = source.splits[name]
            continue
        if fraction:
            held_out = _held_out(train, pools, fraction, copies)
            splits[name] = train[np.concatenate([pool[held_out[pool]] for pool in pools])]
            pools = [pool[~held_out[pool]] for pool in pools]

    if unreadable:
        pools = [pool[np.argsort(np.isin(pool, unreadable), kind="stable")] for pool in pools]
    available_C = np.array([len(pool) for pool in pools])
    wanted_C = profile_counts(profile, available_C, imbalance_factor)
    splits["train"] = train[np.concatenate([pool[:n] for pool, n in zip(pools, wanted_C, strict=True)])]
    if short := [source.classes[j] for j in np.flatnonzero(available_C < wanted_C)]:
        notes.append(f"too few images for profile {profile} in {_some(short)}: all of theirs are kept")

    if copies:
        notes.append(_copies_note(source, copies))

    planned = {}
    for i, name in enumerate(("train", "val", "test")):
        if name not in splits:
            continue
        split = splits[name]
        if not len(split):
            notes.append(f"the classes are too small to hold out any {name} images; there is no {name} split")
            continue
        if missing := [source.classes[j] for j in np.flatnonzero(split.class_counts(n_classes) == 0)]:
            notes.append(f"{name} has no image of {_some(missing)}")
        planned[name] = split[np.random.default_rng([seed, 1, i]).permutation(len(split))]
    return Plan(planned, pools, notes)


def _held_out(
    train: Listing, pools: Sequence[NDArray[np.int64]], fraction: float, copies: Sequence[Sequence[int]]
) -> NDArray[np.bool_]:
    """Which training images are held out of the pools, shape (N,): the first of each class that may go."""
    held_out = np.zeros(len(train), dtype=bool)
    left_C = np.array([len(pool) for pool in pools])
    wanted_C = np.minimum((left_C * fraction + 0.5).astype(np.int64), left_C - 1)
    there = set(np.concatenate(pools).tolist()) if copies else set()
    group_of = {i: group for group in copies if there.issuperset(group) for i in group}
    for j, pool in enumerate(pools):
        wanted = int(wanted_C[j]) - np.count_nonzero(held_out[pool])  # with copies in classes before
        for i in pool.tolist():
            if wanted <= 0:
                break
            if held_out[i]:
                continue
            group = group_of.get(i, (i,))
            taken_C = Counter(train.labels[list(group)].tolist())
            if taken_C[j] <= wanted and all(n < left_C[k] for k, n in taken_C.items()):
                held_out[list(group)] = True
                wanted -= taken_C[j]
                for k, n in taken_C.items():
                    left_C[k] -= n
    return held_out


def _copies_note(source: Source, copies: Sequence[Sequence[int]]) -> str:
    train = source.splits["train"]
    named = [[printable(train.names[i]) for i in group] for group in copies]
    note = (
        f"identical images: {sum(map(len, copies)):,}, groups: {len(copies):,}, such as {' = '.join(named[0][:3])};"
        " each group is kept in one split"
    )
    if torn := [names for names, group in zip(named, copies, strict=True) if len(set(train.labels[group])) > 1]:
        note += f"; {len(torn):,} have different labels, such as {' = '.join(torn[0][:3])}"
    return note


def _some(classes: list[str], limit: int = 5) -> str:
    """Name a few classes: "3 classes (a, b, c)"."""
    names = ", ".join(classes[:limit]) + (", …" if len(classes) > limit else "")
    return f"{len(classes)} class{'es' if len(classes) > 1 else ''} ({names})"
