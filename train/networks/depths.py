"""How deep each parameter of a network lies, for rates that fall with the depth."""

import re
from typing import Any, Literal

Part = Literal["trunk", "branch", "classifier"]
# What `depth_key` gives for what no pattern fits, such as the last norm, which belongs to the last block.
LAST = (float("inf"),)
# timm's number for what goes with the group before it, such as the norm after the last block.
WITH_BEFORE = 99999


def part_of(parameter: str) -> Part:
    """Return which part of a network a parameter belongs to, by its name in `named_parameters`."""
    first = parameter.partition(".")[0]
    return "trunk" if first == "trunk" else "classifier" if first == "classifier" else "branch"


def depth_key(groups: Any, name: str) -> tuple[float, ...]:
    """Return what sorts parameters by depth.

    Args:
        groups: timm's patterns, {group: pattern, or [(pattern, numbers), …]}, or its function of a name.
        name: of a parameter.
    """
    if callable(groups):  # timm's other way to say it: name -> depth
        place = groups(name)
        places = tuple(map(float, place if isinstance(place, list | tuple) else (place,)))
        return LAST if places[-1] == LAST[-1] else places
    for ordinal, patterns in enumerate(groups.values()):
        for pattern, numbers in patterns if isinstance(patterns, list | tuple) else [(patterns, None)]:
            found = re.match(pattern, name)
            if found is not None:
                places = (*map(float, filter(None, found.groups())), *(numbers or ()))
                return LAST if places == (WITH_BEFORE,) else (float(ordinal), *places)
    return LAST


def numbered(keys: set[tuple[float, ...]]) -> dict[tuple[float, ...], int]:
    """Return how deep each of `depth_key`'s lies, from 0; `LAST` is left out."""
    order: dict[tuple[float, ...], int] = {}
    for key in sorted(keys - {LAST}):
        order[key] = max(order.values(), default=-1) + (key[-1] != WITH_BEFORE or not order)
    return order
