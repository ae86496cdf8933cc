"""What the loop asks of a method. It never asks which method runs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.batch import Batch
from pipeline.plan import Stream


@dataclass(frozen=True)
class Progress:
    """Where training stands.

    Attributes:
        epoch: T, counted from 1 as in the papers.
        epochs: T_max.
        step: the step within the epoch, counted from 0.
        seed: the run's seed, for methods that draw random numbers by (seed, epoch, step).
    """

    epoch: int
    epochs: int
    step: int
    seed: int


@dataclass(frozen=True)
class StepResult:
    """What a step gives back.

    Attributes:
        loss: scalar tensor to minimise.
        logits: shape (B, C), of the step's images.
        log: numbers for metrics.jsonl, such as {"alpha": 0.9}; the epoch's last ones are kept.
    """

    loss: torch.Tensor
    logits: torch.Tensor
    log: dict[str, float] = field(default_factory=dict)


class Method(ABC):
    """A training method: made from the run's configuration and n_j, the training images of each class, shape (C,).

    Attributes:
        name: the launchable file's name, as in summary.json.
        Settings: a dataclass of the method's own settings, its section of the configuration.
        title: what tables call it.
        streams: what the loader brings each step.
        network: what is trained. The loop replaces it by its prepared form (mixed precision, DDP).
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    title: str
    streams: tuple[Stream, ...]
    network: torch.nn.Module

    @abstractmethod
    def __init__(self, config: Any, train_counts_C: NDArray[np.int64]) -> None: ...

    @abstractmethod
    def step(self, batch: dict[str, Batch], progress: Progress) -> StepResult:
        """Compute the loss of one step from a batch of each stream; one forward of the network, as DDP wants."""

    @abstractmethod
    def predict(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (B, C) as they are used at test time, for uint8 images."""


def unwrapped(network: torch.nn.Module) -> Any:
    """Return the network inside a DistributedDataParallel wrapper."""
    return getattr(network, "module", network)
