"""Imbalance profiles: how many training images each class keeps, from how many it has.

IF is the imbalance factor, n_max the largest class's count. Class j = 0 … C−1 counts in the order of the class list
where the source is balanced, as published long-tailed sets do, and else from the largest class to the smallest: or a
rare class would be asked to be the head, and a common one be thinned to the tail.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

PARETO_ALPHA = 6
BALANCED = 0.9  # smallest over largest class: drawing by hand, or holding a share out, leaves classes a little unequal


def _exp(n_max: int, factor: float, n_classes: int) -> NDArray[np.float64]:
    return n_max * (1 / factor) ** (np.arange(n_classes) / (n_classes - 1))


def _step(n_max: int, factor: float, n_classes: int) -> NDArray[np.float64]:
    return np.where(np.arange(n_classes) < n_classes // 2, n_max, n_max * (1 / factor))


def _pareto(n_max: int, factor: float, n_classes: int) -> NDArray[np.float64]:
    excess_C = ((np.arange(n_classes) + 0.5) / n_classes) ** (-1 / PARETO_ALPHA)
    share_C = (excess_C - excess_C[-1]) / (excess_C[0] - excess_C[-1])
    return n_max / factor + (n_max - n_max / factor) * share_C


PROFILES: dict[str, Callable[[int, float, int], NDArray[np.float64]] | None] = {
    "natural": None,
    "exp": _exp,
    "step": _step,
    "pareto": _pareto,
}


def profile_counts(profile: str, available_C: ArrayLike, imbalance_factor: float) -> NDArray[np.int64]:
    """Return how many images a profile asks of each class.

        exp      n_j = int(n_max · (1/IF)^(j/(C−1)))         Cao et al., LDAM, 2019, as their code has it
        step     n_j = n_max for j < C//2, else int(n_max/IF)        Buda et al., 2018; LDAM's code
        pareto   n_j = int(n_min + (n_max − n_min) · (x_j − x_{C−1}) / (x_0 − x_{C−1})), n_min = n_max/IF,
                 x_j = ((j + ½)/C)^(−1/α), α = 6: evenly spaced quantiles of a Pareto distribution, stretched
                 to end at n_max and n_min. Liu et al., 2019, drew ImageNet-LT from one with α = 6 and published
                 the draw, not the recipe: at C = 1000, n_max = 1280, IF = 256 this gives 104,345 images and
                 349/488/163 many/medium/few classes, theirs has 115,846 and 385/479/136.
        natural  n_j = what the class has

    Args:
        profile: a key of `PROFILES`.
        available_C: images that each class has, shape (C,), integers >= 1, C >= 2.
        imbalance_factor: IF >= 1; "natural" ignores it.

    Returns:
        Shape (C,), int64, at least 1 each. A class may have fewer than it is asked for.
    """
    counts_C = np.asarray(available_C, dtype=np.int64)
    assert counts_C.size >= 2
    assert counts_C.min() >= 1
    assert imbalance_factor >= 1
    shape = PROFILES[profile]
    if shape is None:
        return counts_C
    wanted_C = np.empty_like(counts_C)
    wanted_C[class_order(counts_C)] = shape(int(counts_C.max()), imbalance_factor, counts_C.size).astype(np.int64)
    return np.maximum(wanted_C, 1)


def class_order(counts_C: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the classes from a profile's head to its tail, shape (C,)."""
    if counts_C.min() >= BALANCED * counts_C.max():
        return np.arange(counts_C.size)
    return np.argsort(-counts_C, kind="stable")
