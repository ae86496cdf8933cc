"""What has to be known of the images before the first shard is written; an interrupted build remembers it.

    copies      identical images, which the plan keeps together
    unreadable  training images in whose place the profile takes others of a class that would be lost
    lost        classes without a readable training image, and held-out splits without a readable one: they are left
                out, and labels count the other classes
    grey bits   how many bits 16-bit grey images use: one scale for all, so that dark ones stay dark
    colour      whether there is 16-bit colour, of which only the upper byte is stored

For the second and the third, one image of each class and split is decoded, and the others where that fails. For the
last two every file that is no JPEG is opened, and decoded where it is of 16 bits; JPEGs too where one of those was.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from shards.encode import GREY_BITS, BadImageError, Depth, Encoded, depth
from shards.errors import UserError
from shards.parallel import run_jobs
from shards.plan import Plan
from shards.progress import Progress
from shards.sources import Listing, Source
from shards.sources.files import printable, some
from shards.writer import read_image

AT_ONCE = 100  # images of a job
HELD_OUT = {"val", "test"}
JPEG_ENDS = (".jpg", ".jpeg", ".jpe", ".jfif")
LEFT_OUT = "its class is left out"  # the reason of images that nobody looked at


@dataclass(frozen=True)
class Findings:
    """What was found out; goes into a JSON file and back.

    Attributes:
        copies: groups of identical training images, by position in the source's listing.
        lost: labels of the classes that are left out, ascending.
        lost_splits: held-out splits that are left out.
        rejected: their images, and those in whose place others are kept, as in `rejected.jsonl`; the labels are null.
        grey_bits: of 16-bit grey images.
        colour: the largest upper byte of the 16-bit colour images that were looked at; -1 where none was.
        unreadable: training images of classes of which the profile would keep no other, by position likewise; it keeps
            others in their place.
    """

    copies: list[list[int]]
    lost: list[int]
    lost_splits: list[str]
    rejected: list[dict[str, Any]]
    grey_bits: int
    colour: int = -1
    unreadable: list[int] = field(default_factory=list)

    def notes(self, source: Source) -> Iterator[str]:
        """Lines for the user."""
        if self.lost:
            names = [source.classes[j] for j in self.lost]
            first = _first_of(names, self.rejected)
            yield (
                f"classes of which no training image can be read are left out: {some(names)}, for example"
                f" {first['source']}: {first['reason']}"
            )
        for split in self.lost_splits:
            yield f"no image that was held out for {split} can be read; there is no {split} split"
        if self.grey_bits != max(GREY_BITS):
            white = (1 << self.grey_bits) - 1
            yield f"16-bit grey images use {self.grey_bits} bits: value v is stored as v · 255 / {white}"
        if self.colour >= 0:
            dark = f"; the brightest that was looked at is then {self.colour} of 255: scale them first"
            yield f"of 16-bit colour the upper byte is stored{dark if self.colour < 128 else ''}"

    def applied(self, source: Source, plan: Plan) -> tuple[Source, Plan]:
        """Leave out the lost classes."""
        if not self.lost and not self.lost_splits:
            return source, plan
        kept_C = np.ones(len(source.classes), dtype=bool)
        kept_C[self.lost] = False
        label_C = np.cumsum(kept_C) - 1

        def kept(listing: Listing) -> Listing:
            rest = listing[np.flatnonzero(kept_C[listing.labels])]
            return replace(rest, labels=label_C[rest.labels])

        splits = {
            split: rest
            for split, listing in plan.splits.items()
            if split not in self.lost_splits and len(rest := kept(listing))
        }
        classes = [name for name, keep in zip(source.classes, kept_C, strict=True) if keep]
        return replace(source, classes=classes), replace(plan, splits=splits)


@dataclass(frozen=True)
class _Job:
    images: Listing
    read: Callable[[str], bytes]
    encode: Callable[[bytes], Encoded] | None


class _Looked(NamedTuple):
    reasons: list[str]  # why each image cannot be stored, "" where it can
    depth: Depth  # the largest


def find_out(
    source: Source,
    plan: Plan,
    copies: list[list[int]],
    encode: Callable[[bytes], Encoded],
    keep_bytes: bool = False,
    *,
    workers: int | None,
    scheduler: str | None,
) -> Findings:
    """Look at the planned images, and where they would leave a class without one at the others of it.

    Where `keep_bytes` turns 16-bit images away, nobody asks how deep they are.

    Raises:
        UserError: fewer than two classes have a readable training image, or an official split has none.
    """
    look = partial(_look_at, source=source, encode=encode, workers=workers, scheduler=scheduler)
    train, listing = plan.splits["train"], source.splits["train"]
    trained, first_ids = np.unique(train.labels, return_index=True)
    first = look("look at each class", train[first_ids])
    deepest = first.depth
    lost: list[int] = []
    rejected: list[dict[str, Any]] = []
    unreadable: list[int] = []
    instead: list[int] = []
    kept_C = train.class_counts(len(source.classes))
    for j in [int(j) for j, reason in zip(trained, first.reasons, strict=True) if reason]:
        images = listing[plan.pools[j]]
        found = _until_one_is_good(images, partial(look, f"look at class {source.classes[j]}"))
        deepest = _larger(deepest, found.depth)
        bad = next((i for i, reason in enumerate(found.reasons) if not reason), len(images))
        if bad == len(images):
            lost.append(j)
            rejected += _lines("train", source, images, found.reasons)
            for split in sorted(HELD_OUT & plan.splits.keys()):
                others = plan.splits[split][np.flatnonzero(plan.splits[split].labels == j)]
                rejected += _lines(split, source, others, [LEFT_OUT] * len(others))
        elif bad >= kept_C[j]:
            unreadable += plan.pools[j][:bad].tolist()
            instead += plan.pools[j][bad : bad + kept_C[j]].tolist()
            # The first of them fill the class up where too few others are left: their shards list those.
            again = max(0, int(kept_C[j]) - (len(images) - bad))
            rejected += _lines("train", source, images[np.arange(again, bad)], found.reasons[again:bad])
    if len(trained) - len(lost) < 2:
        line = _first_of([source.classes[j] for j in lost], rejected)
        raise UserError(
            f"classes with a training image that can be read: {len(trained) - len(lost)}; a dataset needs at least two"
            f" (class {line['class']!r}: {line['source']}: {line['reason']})"
        )
    lost_splits = []
    for split in sorted(HELD_OUT & plan.splits.keys()):
        listing = plan.splits[split]
        images = listing[np.flatnonzero(~np.isin(listing.labels, lost))]
        found = _until_one_is_good(images, partial(look, f"look at {split}"))
        deepest = _larger(deepest, found.depth)
        if all(found.reasons):
            if split in source.splits:
                why = f"{images.names[0]}: {found.reasons[0]}" if len(images) else "no class of it is left"
                raise UserError(f"no image of the {split} split can be read ({why}); nothing was built")
            lost_splits.append(split)
            rejected += _lines(split, source, images, found.reasons)
    # One scale for all: every file that may hold 16 bits is opened, and its header says whether it does.
    deepest = Depth() if keep_bytes else deepest
    planned = [*plan.splits.values(), source.splits["train"][np.array(instead, np.int64)]]
    for listing in () if keep_bytes else planned:
        images = listing if deepest.grey >= 0 else _maybe_deep(listing)
        if len(images):
            deepest = _larger(deepest, look("look for 16-bit images", images, encode=None).depth)
    bits = max(GREY_BITS)
    if deepest.grey >= 0:
        bits = next((bits for bits in GREY_BITS if deepest.grey < 1 << bits), bits)
    return Findings(copies, lost, lost_splits, rejected, bits, deepest.colour, unreadable)


def _maybe_deep(images: Listing) -> Listing:
    """Return the files that are no JPEGs, which have 8 bits; none of images that are no files."""
    if images.sizes is None:
        return images[np.zeros(0, np.int64)]
    return images[np.flatnonzero([not name.lower().endswith(JPEG_ENDS) for name in images.names])]


def _until_one_is_good(images: Listing, look: Callable[[Listing], _Looked]) -> _Looked:
    """Look at images in order, until one can be stored."""
    reasons: list[str] = []
    deepest = Depth()
    # The first is good, as a rule.
    for ids in np.split(np.arange(len(images)), np.arange(1, len(images), AT_ONCE)):
        found = look(images[ids])
        reasons, deepest = [*reasons, *found.reasons], _larger(deepest, found.depth)
        if not all(found.reasons):
            break
    return _Looked(reasons, deepest)


def _look_at(
    task: str,
    images: Listing,
    *,
    source: Source,
    encode: Callable[[bytes], Encoded] | None,
    workers: int | None,
    scheduler: str | None,
) -> _Looked:
    parts = np.array_split(np.arange(len(images)), -(-len(images) // AT_ONCE) or 1)
    with Progress(task, len(images)) as progress:
        found = run_jobs(
            _look,
            [_Job(images[ids], source.read, encode) for ids in parts],
            n_images=len(images),
            workers=workers,
            scheduler=scheduler,
            done=lambda looked: progress.add(len(looked.reasons)),
        )
    return _Looked([reason for looked in found for reason in looked.reasons], _larger(*[of.depth for of in found]))


def _look(job: _Job) -> _Looked:
    reasons = []
    deepest = Depth()
    for i in range(len(job.images)):
        try:
            data = read_image(job.images, i, job.read)
            deepest = _larger(deepest, depth(data))
            if job.encode is not None:
                job.encode(data)
            reasons.append("")
        except BadImageError as error:
            reasons.append(str(error))
    return _Looked(reasons, deepest)


def _larger(*depths: Depth) -> Depth:
    return Depth(*map(max, *depths)) if len(depths) > 1 else depths[0]


def _first_of(classes: Sequence[str], rejected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first line about an image of these classes."""
    return next(line for line in rejected if line["class"] in classes)


def _lines(split: str, source: Source, images: Listing, reasons: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"split": split, "class": source.classes[j], "label": None, "source": printable(name), "reason": reason}
        for name, j, reason in zip(images.names, images.labels.tolist(), reasons, strict=True)
    ]
