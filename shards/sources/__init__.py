"""Where images come from. A new kind of source is one module with an `open_source` and a line here."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from shards.errors import UserError
from shards.sources import cifar, coco, digits, fashion, folder, lists, table
from shards.sources.source import Listing, Source

__all__ = ["SOURCES", "Listing", "Source", "check_dataset", "open_source"]

SOURCES: dict[str, Callable[[Path | None], Source]] = {
    "digits": digits.open_source,
    "fashion-mnist": fashion.open_source,
    **{name: partial(cifar.open_source, name) for name in cifar.KINDS},
    **{name: partial(coco.open_source, name) for name in coco.FILES},
    **{name: partial(lists.open_source, name) for name in ("imagenet-lt", "places-lt")},
    "folder": folder.open_source,
    "csv": table.open_source,
}


def check_dataset(dataset: str) -> None:
    """Raise a UserError unless a dataset is a key of `SOURCES`."""
    if dataset not in SOURCES:
        raise UserError(f"unknown dataset {dataset!r}; choose one of: {', '.join(SOURCES)}")


def open_source(dataset: str, path: Path | None) -> Source:
    """List a source's images.

    Args:
        dataset: a key of `SOURCES`.
        path: where the user has the images; None where none was given.

    Raises:
        UserError: an unknown dataset, or images that cannot be listed.
    """
    check_dataset(dataset)
    try:
        return SOURCES[dataset](path)
    except OSError as error:
        raise UserError(f"--source {path} cannot be read: {error.filename}: {error.strerror}") from None
