"""Which images are held out, kept and in what order."""

import numpy as np
import pytest

from shards.plan import plan_splits
from shards.sources import Listing, Source


def listing(prefix: str, counts: list[int]) -> Listing:
    labels = np.repeat(np.arange(len(counts)), counts)
    return Listing([f"{prefix}{label}-{i}" for i, label in enumerate(labels)], labels)


def source(counts: list[int], **splits: list[int]) -> Source:
    return Source(
        classes=[f"class{j}" for j in range(len(counts))],
        splits={name: listing(name, split) for name, split in {"train": counts, **splits}.items()},
        read=str.encode,
        fingerprint="",
    )


def plan(images, profile="natural", factor=1.0, test=0.25, val=0.1, seed=0):
    return plan_splits(
        images, profile=profile, imbalance_factor=factor, test_fraction=test, val_fraction=val, seed=seed
    )


def counts(planned, name, n_classes):
    return planned.splits[name].class_counts(n_classes).tolist()


def test_every_image_goes_to_one_split_and_shares_are_stratified():
    images = source([40, 20, 10])
    planned = plan(images)
    assert counts(planned, "test", 3) == [10, 5, 3]  # a half is rounded up
    assert counts(planned, "val", 3) == [3, 2, 1]
    assert counts(planned, "train", 3) == [27, 13, 6]
    names = [name for split in planned.splits.values() for name in split.names]
    assert sorted(names) == sorted(images.splits["train"].names)
    assert planned.notes == []


def test_names_keep_their_labels():
    for split in plan(source([9, 9])).splits.values():
        assert all(name.startswith(f"train{label}-") for name, label in zip(split.names, split.labels, strict=True))


def test_a_single_image_stays_in_train_and_is_reported():
    planned = plan(source([40, 1, 1]), test=0.99, val=0.99)
    assert counts(planned, "train", 3) == [1, 1, 1]
    assert counts(planned, "test", 3) == [39, 0, 0]
    assert "test has no image of 2 classes (class1, class2)" in planned.notes


def test_many_classes_without_an_image_are_not_all_named():
    notes = plan(source([40] + [1] * 30)).notes
    assert "test has no image of 30 classes (class1, class2, class3, class4, class5, …)" in notes


def test_fraction_0_makes_no_split():
    planned = plan(source([40, 40]), val=0)
    assert sorted(planned.splits) == ["test", "train"]
    assert planned.notes == []


def test_classes_too_small_to_share_make_no_split_and_are_reported():
    planned = plan(source([3, 3]))
    assert sorted(planned.splits) == ["test", "train"]
    assert planned.notes == ["the classes are too small to hold out any val images; there is no val split"]


def test_own_splits_are_taken_as_they_are():
    planned = plan(source([10, 10], test=[3, 4], val=[0, 2]), profile="exp", factor=10)
    assert counts(planned, "train", 2) == [10, 1]
    assert counts(planned, "test", 2) == [3, 4]
    assert counts(planned, "val", 2) == [0, 2]
    assert "val has no image of 1 class (class0)" in planned.notes


def test_the_profile_thins_train_only_and_what_is_held_out_does_not_depend_on_it():
    images = source([80] * 4)
    mild, strong = plan(images, "exp", 2), plan(images, "exp", 50)
    assert counts(strong, "train", 4) == [54, 14, 3, 1]
    for held_out in ("test", "val"):
        assert mild.splits[held_out].names == strong.splits[held_out].names
    assert set(strong.splits["train"].names) < set(mild.splits["train"].names)


def test_a_class_with_too_few_images_keeps_all_and_is_reported():
    planned = plan(source([40, 4, 40]), "exp", 4, test=0, val=0)
    assert counts(planned, "train", 3) == [40, 4, 20]
    assert planned.notes == ["too few images for profile exp in 1 class (class1): all of theirs are kept"]


def test_seeds_differ_and_repeat():
    images = source([30, 30])
    assert plan(images, seed=1).splits["train"].names == plan(images, seed=1).splits["train"].names
    assert plan(images, seed=1).splits["train"].names != plan(images, seed=2).splits["train"].names
    assert set(plan(images, seed=1).splits["test"].names) != set(plan(images, seed=2).splits["test"].names)


def test_classes_are_shuffled_among_each_other():
    labels = plan(source([50, 50])).splits["train"].labels
    assert np.count_nonzero(np.diff(labels)) > 10


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.999])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_train_never_loses_a_class(count, fraction):
    assert counts(plan(source([count, 50]), test=fraction, val=fraction), "train", 2)[0] >= 1
