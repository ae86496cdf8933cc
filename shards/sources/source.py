"""What a source is: labelled images by name, and a way to read one of them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Listing:
    """Images of one split.

    Attributes:
        names: N strings that `Source.read` knows.
        labels: shape (N,), int64.
        sizes: shape (N,), int64: each file's bytes when it was listed, -1 for a missing one. An image that has
            another size when it is read has changed since. None where images are no files.
        changed: shape (N,), int64: when each file changed last, in nanoseconds since 1970; None likewise.
    """

    names: list[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64] | None = None
    changed: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, ids: NDArray[np.int64]) -> "Listing":
        sizes = None if self.sizes is None else self.sizes[ids]
        changed = None if self.changed is None else self.changed[ids]
        return Listing([self.names[i] for i in ids.tolist()], self.labels[ids], sizes, changed)

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
        peek: gives a few of these bytes at less cost, which differ between most different images; None where
            `read` costs little.
        fingerprint: sha256 of what the collection holds; a changed collection has another one.
        preset: the training recipe that fits; None leaves it to the image sizes.
        profile: the imbalance profile taken when none is asked for.
        imbalance_factor: the one taken with a profile when none is asked for.
        val_fraction: share of each class held out for validation when none is asked for and the collection has
            no validation split; 0 where published figures are for training on all images.
        notes: lines for the user about what was found.
        skipped: lines about what is listed and had to be left out, which a strict build does not accept.
    """

    classes: list[str]
    splits: dict[str, Listing]
    read: Callable[[str], bytes]
    fingerprint: str
    peek: Callable[[str], bytes] | None = None
    preset: str | None = None
    profile: str = "natural"
    imbalance_factor: float = 100.0
    val_fraction: float = 0.1
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def fingerprint(classes: Sequence[str], splits: Mapping[str, Listing]) -> str:
    """Return the sha256 of class names and of every image's name, label and file size."""
    digest = hashlib.sha256("\n".join(classes).encode())
    for split, listing in splits.items():
        # Names of files may be no UTF-8, which Python keeps as surrogates.
        digest.update(f"\0{split}\0".encode() + "\n".join(listing.names).encode(errors="surrogateescape"))
        digest.update(listing.labels.astype("<i8").tobytes())
        if listing.sizes is not None:
            digest.update(listing.sizes.astype("<i8").tobytes())
    return digest.hexdigest()
