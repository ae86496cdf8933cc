"""What loaders keep of a split from one opening to the next."""

import weakref
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

from shards.index import Split

Thing = TypeVar("Thing")

_shelves: dict[int, dict[Hashable, object]] = {}  # by id(split): a split holds arrays and has no hash


def kept_with(split: Split, name: Hashable, make: Callable[[], Thing]) -> Thing:
    """Return the thing of this name that is kept with a split, made at the first call.

    It goes when the split does, so it must not hold on to the split.
    """
    if id(split) not in _shelves:
        _shelves[id(split)] = {}
        weakref.finalize(split, _shelves.pop, id(split)).atexit = False
    shelf = _shelves[id(split)]
    if name not in shelf:
        shelf[name] = make()
    return cast(Thing, shelf[name])


def is_kept_with(split: Split, name: Hashable) -> bool:
    """Whether a thing of this name is kept with a split."""
    return name in _shelves.get(id(split), {})


def drop(split: Split, name: Hashable) -> None:
    """Keep the thing of this name, if there is one, no longer: its memory goes with its last user."""
    _shelves.get(id(split), {}).pop(name, None)
