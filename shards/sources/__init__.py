"""Where images come from. A new kind of source is one module with an `open_source` and a line here."""

from collections.abc import Callable
from pathlib import Path

from shards.errors import UserError
from shards.sources import digits, folder
from shards.sources.source import Listing, Source

__all__ = ["SOURCES", "Listing", "Source", "open_source"]

SOURCES: dict[str, Callable[[Path | None], Source]] = {
    "digits": digits.open_source,
    "folder": folder.open_source,
}


def open_source(dataset: str, path: Path | None) -> Source:
    """List a source's images.

    Args:
        dataset: a key of `SOURCES`.
        path: where the user has the images; None where none was given.

    Raises:
        UserError: an unknown dataset, or images that cannot be listed.
    """
    if dataset not in SOURCES:
        raise UserError(f"unknown dataset {dataset!r}; choose one of: {', '.join(SOURCES)}")
    return SOURCES[dataset](path)
