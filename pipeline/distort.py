"""What a recipe does to pictures that were cut out: the interface of distortions, and the one way to apply them.

    window ─> resize ─> mirror ─> distort:  each distortion of the recipe in turn, uint8 to uint8
                                  one row of the draw for each picture, with a field for each distortion

Every loader calls `distort`, so their pictures stay the same. A new distortion is one class in one file: a frozen
dataclass of its arguments that says what to draw and what to do with it. Recipes find it by its name once its module is
imported; those of the house are listed in `pipeline.distortions`.

    @dataclass(frozen=True)
    class Darken(Distortion):               # --input.augment "cifar+darken(0.5)"
        name = "darken"
        least: float

        def draw(self, generator, count, image_size):
            return generator.uniform(self.least, 1, count).astype(np.float32)

        def apply(self, images_BHWC, rows_B):
            factors_B = torch.from_numpy(rows_B.copy()).to(images_BHWC.device)
            return (images_BHWC * factors_B.view(-1, 1, 1, 1)).byte()
"""

import re
from abc import ABC, abstractmethod
from dataclasses import Field, fields
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, cast, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray

from shards.errors import UserError

DISTORTIONS: dict[str, type["Distortion"]] = {}


class Distortion(ABC):
    """One thing that is done to pictures, with parameters of its own for each: a frozen dataclass of numbers.

    Attributes:
        name: what recipes call it.
    """

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            DISTORTIONS[cls.name] = cls

    @abstractmethod
    def draw(self, generator: np.random.Generator, count: int, image_size: int) -> NDArray[Any]:
        """Draw the parameters of each picture: any array of `count` rows.

        Args:
            generator: the plan's, after the windows, flips and distortions before this one.
            count: pictures in the global batch.
            image_size: their height and width.
        """

    def check(self, image_size: int) -> None:  # noqa: B027  (most take any)
        """Raise a UserError where pictures of so many pixels are too small for it."""

    @abstractmethod
    def apply(self, images_BHWC: torch.Tensor, rows_B: NDArray[Any]) -> torch.Tensor:
        """Return distorted pictures, uint8; those given, uint8 on any device, stay as they are.

        What becomes of a picture may not depend on the others: ranks see different parts of a batch.
        """

    @classmethod
    def usage(cls) -> str:
        """Return how recipes call it, such as rand(n,m)."""
        names = ",".join(field.name for field in _parameters(cls))
        return f"{cls.name}({names})" if names else cls.name

    def __str__(self) -> str:
        values = ",".join(f"{getattr(self, field.name)}" for field in _parameters(type(self)))
        return f"{self.name}({values})" if values else self.name


@cache
def find_distortion(text: str) -> Distortion:
    """Return the distortion that a recipe calls, such as "rand(2,9)".

    Raises:
        UserError: no distortion of that name, or arguments that it does not take.
    """
    match = re.fullmatch(r"([^()]*)(?:\((.*)\))?", text)
    name = match[1].strip() if match else text
    module, _, short = name.rpartition(".")
    if match is not None and module:  # somebody's own
        try:
            import_module(module)
        except (ImportError, TypeError) as error:  # TypeError: a path such as ../mine
            raise UserError(
                f"the distortion {text!r} cannot be imported ({error}); is its folder on PYTHONPATH?"
            ) from None
        name = short
    if match is None or name not in DISTORTIONS:
        choices = {name: kind.usage() for name, kind in sorted(DISTORTIONS.items())}
        raise UserError(
            f"no distortion is called {name!r}; choose one of: {', '.join(choices.values())}{nearest(name, choices)}"
        )
    kind = DISTORTIONS[name]
    parameters = _parameters(kind)
    given = match[2].split(",") if match[2] and match[2].strip() else []
    if len(given) != len(parameters):
        raise UserError(
            f"the distortion {text!r} has {len(given)} argument{'s' * (len(given) != 1)} and is written {kind.usage()}"
        )
    types, arguments = get_type_hints(kind), {}  # a field's own type may be text
    for parameter, value in zip(parameters, given, strict=True):
        try:
            arguments[parameter.name] = types[parameter.name](value)
        except ValueError:
            number = "a whole number" if types[parameter.name] is int else "a number"
            raise UserError(
                f"the distortion {text!r} is written {kind.usage()}, and {parameter.name}={value.strip()!r} is"
                f" not {number}"
            ) from None
    return kind(**arguments)


def _parameters(kind: type[Distortion]) -> tuple[Field[Any], ...]:
    """Return the fields of a distortion's class, which `Distortion` asks to be a dataclass."""
    return fields(cast(Any, kind))


def nearest(name: str, choices: Any) -> str:
    """Return what to append to a list of choices: which of them a name resembles, if any."""
    close = get_close_matches(name, list(choices), n=1)
    return f" (nearest: {close[0]})" if close else ""


def distort(images_BHWC: torch.Tensor, distortions_B: NDArray[np.void]) -> torch.Tensor:
    """Apply a recipe's distortions to pictures, one after the other.

    Args:
        images_BHWC: uint8, RGB, on any device; stays as it is.
        distortions_B: what was drawn (`pipeline.augment.Recipe.draw_distortions`), a row for each image.

    Returns:
        Like images_BHWC, uint8. What becomes of an image does not depend on the others.
    """
    assert len(distortions_B) == len(images_BHWC), (len(distortions_B), len(images_BHWC))
    for text in distortions_B.dtype.names or ():
        images_BHWC = find_distortion(text).apply(images_BHWC, distortions_B[text])
    return images_BHWC
