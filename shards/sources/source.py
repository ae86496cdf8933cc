"""What a source is: labelled images by name, and a way to read one of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Listing:
    """Images of one split: `names`, N strings that `Source.read` knows, and `labels`, shape (N,), int64."""

    names: list[str]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, ids: NDArray[np.int64]) -> "Listing":
        return Listing([self.names[i] for i in ids.tolist()], self.labels[ids])

    def class_counts(self, n_classes: int) -> NDArray[np.int64]:
        """Images per class, shape (n_classes,), int64."""
        return np.bincount(self.labels, minlength=n_classes).astype(np.int64)


@dataclass(frozen=True)
class Source:
    """A collection of labelled images, listed but not yet read.

    Attributes:
        classes: class names by label.
        splits: the collection's own splits; "train" always, "val" and "test" where it has them.
        read: gives an image's encoded bytes by its name, in any format that PIL reads. Worker processes
            call it, so it can be pickled and is small (it does not hold the listing).
        fingerprint: sha256 of what the collection holds; a changed collection has another one.
        preset: the training recipe that fits; None leaves it to the image sizes.
        profile: the imbalance profile taken when none is asked for.
        imbalance_factor: the one taken with a profile when none is asked for.
        notes: lines for the user about what was found.
    """

    classes: list[str]
    splits: dict[str, Listing]
    read: Callable[[str], bytes]
    fingerprint: str
    preset: str | None = None
    profile: str = "natural"
    imbalance_factor: float = 100.0
    notes: tuple[str, ...] = ()
