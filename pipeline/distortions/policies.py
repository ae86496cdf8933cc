"""Policies: which operations are done to each picture, and how strongly."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.distort import Distortion
from pipeline.distortions.operations import NAMES, chosen, operate
from shards.errors import UserError

GREY, BLACK = 128, 0  # what comes in from beyond the border, as the papers' own code has it
LEVELS = 30  # of RandAugment and TrivialAugment, without 0
SEARCHED = len(NAMES) - 1  # both leave out the last operation, Invert


@dataclass(frozen=True)
class AutoAugment(Distortion):
    """CIFAR-10's policy (Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", 2019, Table 7).

    Each picture gets one of 25 pairs of operations, each with its probability and one of ten levels. The policy was
    searched with the labels of CIFAR-10: results there have seen more than a long-tailed training set.

    Translations reach 150/331 of the picture, as in the paper's table and in torchvision; the authors' own code for
    CIFAR stops at 10 of 32 pixels. One of the pairs translates twice: it leaves one picture in a hundred nearly blank.
    """

    name = "autoaugment"

    def draw(self, generator: np.random.Generator, count: int, image_size: int) -> NDArray[np.void]:
        """Draw operations: shape (count, 2), dtype `OPERATION`."""
        operations_P2, probabilities_P2, levels_P2 = _cifar_policy()
        policy_B = generator.integers(len(operations_P2), size=count)
        happens_B2 = generator.random((count, 2)) < probabilities_P2[policy_B]
        negative_B2 = generator.random((count, 2)) < 0.5
        operations_B2 = np.where(happens_B2, operations_P2[policy_B], NAMES.index("Identity"))
        return chosen(operations_B2, levels_P2[policy_B] / 9, negative_B2, image_size)

    def apply(self, images_BHWC: torch.Tensor, rows_B: NDArray[np.void]) -> torch.Tensor:  # noqa: D102
        return operate(images_BHWC, rows_B, GREY)


@cache
def _cifar_policy() -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Return operations, probabilities and levels 0 … 9 of the policy's pairs, shape (25, 2) each."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    pairs = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    return (
        np.array([[NAMES.index(name) for name, _, _ in pair] for pair in pairs]),
        np.array([[probability for _, probability, _ in pair] for pair in pairs]),
        np.array([[level or 0 for _, _, level in pair] for pair in pairs]),
    )


@dataclass(frozen=True)
class RandAugment(Distortion):
    """n operations, one after the other, all at the same level (Cubuk et al., "RandAugment", 2020).

    Attributes:
        n: how many; each is any of the fourteen.
        m: the level, from 0 to 30.
    """

    name = "rand"
    n: int
    m: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"{self} has n={self.n}; it must be at least 1 operation")
        if not 0 <= self.m <= LEVELS:
            raise UserError(f"{self} has m={self.m}; the level must be from 0 to {LEVELS}")

    def draw(self, generator: np.random.Generator, count: int, image_size: int) -> NDArray[np.void]:
        """Draw operations: shape (count, n), dtype `OPERATION`."""
        operations_BN = generator.integers(SEARCHED, size=(count, self.n))
        negative_BN = generator.random((count, self.n)) < 0.5
        return chosen(operations_BN, np.full(operations_BN.shape, self.m / LEVELS), negative_BN, image_size)

    def apply(self, images_BHWC: torch.Tensor, rows_B: NDArray[np.void]) -> torch.Tensor:  # noqa: D102
        return operate(images_BHWC, rows_B, GREY)


@dataclass(frozen=True)
class TrivialAugment(Distortion):
    """One operation at any level of a wide space (Müller and Hutter, "TrivialAugment", 2021: TA (Wide))."""

    name = "trivial"

    def draw(self, generator: np.random.Generator, count: int, image_size: int) -> NDArray[np.void]:
        """Draw operations: shape (count, 1), dtype `OPERATION`."""
        operations_B1 = generator.integers(SEARCHED, size=(count, 1))
        levels_B1 = generator.integers(LEVELS + 1, size=(count, 1)) / LEVELS
        return chosen(operations_B1, levels_B1, generator.random((count, 1)) < 0.5, image_size, wide=True)

    def apply(self, images_BHWC: torch.Tensor, rows_B: NDArray[np.void]) -> torch.Tensor:  # noqa: D102
        return operate(images_BHWC, rows_B, BLACK)
