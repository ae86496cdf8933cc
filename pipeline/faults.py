"""Images that do not decode in the middle of a run: one policy for every loader.

    drawn         17  4  8  4          4 does not decode
    training      17  5  8  5          the next image of its class, so that the stream's class balance stays
    evaluation    17     8             left out: the batch is shorter

What takes a bad image's place is a pure function of the draw and of which images are bad: the same in every loader,
on any number of ranks, and after resuming. (Only where no image of a class decodes it is the next sample of the
rank's batch. DALI's window decoding does not see damage below the window: there an image counts as bad from the first
draw on that reaches it; and of JPEGs with noise in them DALI shows some that PIL refuses.) It shows the part of itself
that the bad one would have shown: the window is scaled to its size.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.augment import Windows
from pipeline.kept import kept_with
from pipeline.pictures import UndecodableError, decode, show_windows
from pipeline.plan import Draw, Plan
from pipeline.reader import ShardReader
from shards.errors import UserError
from shards.index import Split

LIMIT = 10  # or a thousandth of the split, if that is more


@dataclass(frozen=True)
class BadImage:
    """A stored image that does not decode: its shard and the byte where it begins there, and why."""

    shard: Path
    byte: int
    reason: str


class Faults:
    """The images of a split that did not decode.

    A loader that meets a batch which does not decode calls `rescue`, and `replace` keeps the same image out of later
    ones: both from any thread. As it hands a step over it calls `count` with what the plan drew, and `check`.

    Attributes:
        limit: how many images may be bad before the run is stopped.
        bad: the bad images by sample id.
        repaired: those that were bad before the run was resumed, and decode now.
        times: how often each was drawn, by sample id; 0 for one that was only to take another's place.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bad: dict[int, BadImage] = {}
        self.repaired: dict[int, BadImage] = {}
        self.times: Counter[int] = Counter()
        self._told: set[int] = set()

    def replace(self, plan: Plan, draw: Draw) -> Draw:
        """Return a draw without the images that are known to be bad: replaced in training, left out in evaluation.

        Raises:
            UserError: in training, no image of the batch's classes decodes.
        """
        drawn = draw.ids_B.tolist() if self.bad else []
        if self.bad.keys().isdisjoint(drawn):
            return draw
        if plan.steps is not None:  # a plan that ends is an evaluation
            return draw.part([position for position, sample in enumerate(drawn) if sample not in self.bad])
        stand_ins = [self._stand_in(plan.split, sample) for sample in drawn]
        good = [position for position, sample in enumerate(stand_ins) if sample is not None]
        if not good:
            raise UserError(f"no image of a batch of {plan.split.name} decodes: {self._remedy(drawn)}")
        # Whose place stays empty repeats the next position that has one; the last is followed by the first.
        sources = [good[i % len(good)] for i in np.searchsorted(good, np.arange(len(drawn)))]
        part = draw.part(sources)
        ids_B = np.array([stand_ins[position] for position in sources], dtype=np.int64)
        windows_B4 = _scaled(part.windows_B4, plan.split.samples[part.ids_B], plan.split.samples[ids_B])
        return replace(part, ids_B=ids_B, windows_B4=windows_B4)

    def rescue(self, plan: Plan, reader: ShardReader, draw: Draw) -> tuple[torch.Tensor, Draw]:
        """Load a batch image by image, on the portable path, with others in place of those that do not decode.

        Returns:
            Images of shape (B, S, S, 3), uint8, on the CPU, and the draw that they show. In evaluation B may be 0.

        Raises:
            UserError: as `replace`; more bad images than `limit`; a shard that cannot be read.
        """
        while True:
            replaced = self.replace(plan, draw)
            try:
                return show_windows(plan.split, reader, replaced, plan.image_size), replaced
            except UndecodableError as error:
                self.add(plan.split, error)

    def add(self, split: Split, error: UndecodableError) -> None:
        """Remember a bad image.

        Raises:
            UserError: there are more of them than `limit`.
        """
        self.bad[error.sample] = BadImage(*_place(split, error.sample), error.reason)
        self._stop_above_limit()

    def count(self, draw: Draw) -> None:
        """Count the bad images in what a plan drew for a step."""
        if self.bad:
            self.times.update(sample for sample in draw.ids_B.tolist() if sample in self.bad)

    def take(self) -> tuple[dict[int, BadImage], dict[int, int]]:
        """Return the bad images, and how often each was drawn since the last call."""
        # A plain dict: where a DataLoader pins memory it copies what workers send and calls `update` on the copy with
        # the same items, which in a Counter adds them once more.
        times, self.times = dict(self.times), Counter()
        return dict(self.bad), times  # a worker's is pickled by a thread, while the next step may add to it

    def merge(self, bad: dict[int, BadImage], times: dict[int, int]) -> None:
        """Add what a worker process's record took."""
        self.bad |= bad
        self.times.update(times)

    def recall(self, split: Split, rows: Sequence[dict[str, Any]], counted: bool) -> None:
        """Add what `rows` said of a split elsewhere: in another process, or before the run was resumed.

        Each image is decoded once more: its shard may have been repaired, as the user was asked to.

        Args:
            split: the split.
            rows: from `rows`.
            counted: whether their `times` are added, too.
        """
        reader = ShardReader(split)
        for row in rows:
            sample = row["sample"]
            if sample >= len(split):
                continue  # of another build
            image = BadImage(*_place(split, sample), row["reason"])
            if (image.shard.name, image.byte) != (row["shard"], row["byte"]):
                continue
            try:
                if sample not in self.bad:
                    decode(split, reader, sample)
                    self.repaired[sample] = image
            except UndecodableError:
                self.bad[sample] = image
            if counted:
                self.times[sample] += row["times"]
        reader.close()

    def check(self) -> None:
        """Name each bad image on stderr, once.

        Raises:
            UserError: there are more of them than `limit`.
        """
        for sample in sorted(self.bad.keys() - self._told):
            self._told.add(sample)
            print(f"warning: {self._describe(sample)}", file=sys.stderr)
        self._stop_above_limit()

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per image that is bad or was, ready for JSON: sample, shard, byte, reason, times (drawn)."""
        return [
            {"sample": sample, "shard": image.shard.name, "byte": image.byte, "reason": image.reason}
            | {"times": self.times[sample]}
            for sample, image in sorted((self.repaired | self.bad).items())
        ]

    def _stand_in(self, split: Split, sample: int) -> int | None:
        """Return the first good image from here on in the class, which is a ring; None where there is none."""
        if sample not in self.bad:
            return sample
        label, starts = split.samples["label"][sample], split.class_starts
        members = split.by_class[starts[label] : starts[label + 1]]
        ring = np.roll(members, -int(np.flatnonzero(members == sample)[0])).tolist()
        return next((member for member in ring if member not in self.bad), None)

    def _stop_above_limit(self) -> None:
        if len(self.bad) > self.limit:
            raise UserError(
                f"{len(self.bad)} image{'s do' if len(self.bad) > 1 else ' does'} not decode and input.fault_limit is"
                f" {self.limit}:"
                f" {self._remedy(sorted(self.bad))}"
            )

    def _describe(self, sample: int) -> str:
        image = self.bad[sample]
        return f"the image at byte {image.byte} of {image.shard} (sample {sample}) does not decode ({image.reason})"

    def _remedy(self, samples: list[int]) -> str:
        bad = list(dict.fromkeys(samples))
        more = [f"{len(bad) - 3} more"] if len(bad) > 3 else []
        folder = self.bad[bad[0]].shard.parent
        return f"{', '.join([*map(self._describe, bad[:3]), *more])}; run: tailstream verify {shlex.quote(str(folder))}"


def faults_of(split: Split) -> Faults:
    """Return the record that all loaders of a split share in this process."""
    return kept_with(split, Faults, lambda: Faults(max(LIMIT, len(split) // 1000)))


def _place(split: Split, sample: int) -> tuple[Path, int]:
    """Return the shard that holds an image, and the byte where it begins there."""
    row = split.samples[sample]
    return split.shard_paths[row["shard"]], int(row["offset"])


def _scaled(windows_B4: Windows, before_B: NDArray[np.void], after_B: NDArray[np.void]) -> Windows:
    """Return the windows of the same parts of other images, given both as rows of `Split.samples`.

    Edges are scaled and rounded down, so that what lies inside stays inside and equal sizes change nothing.
    """
    starts_B2, ends_B2 = windows_B4[:, :2].astype(np.int64), windows_B4[:, :2] + windows_B4[:, 2:].astype(np.int64)
    before_B2 = np.stack([before_B["height"], before_B["width"]], axis=1)
    after_B2 = np.stack([after_B["height"], after_B["width"]], axis=1)
    starts_B2, ends_B2 = starts_B2 * after_B2 // before_B2, ends_B2 * after_B2 // before_B2
    return np.concatenate([starts_B2, np.maximum(ends_B2 - starts_B2, 1)], axis=1).astype(np.int32)
