"""What the loop asks of a method. It never asks which method runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.stream import Stream
from shards.errors import UserError

if TYPE_CHECKING:  # launchable files import this, and torch takes seconds: see train/engine/launch.py
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.batch import Batch
    from train.networks.networks import Network


@dataclass(frozen=True)
class Progress:
    """Where training stands.

    Attributes:
        epoch: T, counted from 1 as in the papers.
        epochs: T_max.
        step: the step within the epoch, counted from 0; at the end of an epoch the number of its steps.
        seed: the run's seed, for methods that draw random numbers by (seed, epoch, step).
    """

    epoch: int
    epochs: int
    step: int
    seed: int


@dataclass(frozen=True)
class StepResult:
    """What a step gives back.

    The loop may take a step in parts and on several ranks, all of the same size: a step's loss and sums are those of
    the whole step's batch.

    Attributes:
        loss: scalar tensor to minimise; the step's is the mean over parts and ranks. (A class-weighted mean divides by
            the mean weight of the whole step: see `pipeline.batch.Batch.step_counts_C`.)
        sums: what is added up over parts, ranks and the steps of an epoch, and handed to `Method.end_of_epoch`: tensors
            of any shape, or numbers, under the same names in every step. The mean over parts, ranks and steps of those
            that are scalars is logged.
    """

    loss: Tensor
    sums: dict[str, Tensor | float] = field(default_factory=dict)


class Method(ABC):
    """A training method: made from the run's configuration and n_j, the training images of each class, shape (C,).

                        streams          step                       end_of_epoch
        configuration ─────────> batch ────────> loss, sums ─(epoch)──────────────> numbers to log, state

    Attributes:
        name: the launchable file's name, as in summary.json.
        Settings: a dataclass of the method's own settings, its section of the configuration.
        title: what tables call it.
        in_title: the settings that the title already names, such as method.q.
        streams: what the loader brings each step.
        network: what is trained. The loop replaces it by its prepared form (mixed precision, DDP).
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    in_title: ClassVar[frozenset[str]] = frozenset()
    title: str
    streams: tuple[Stream, ...]
    network: torch.nn.Module

    @abstractmethod
    def __init__(self, config: Any, train_counts_C: NDArray[np.int64]) -> None: ...

    @abstractmethod
    def step(self, batch: dict[str, Batch], progress: Progress) -> StepResult:
        """Compute the loss of one step from a batch of each stream; one forward of the network, as DDP wants."""

    @property
    def model(self) -> Network:
        """What is evaluated and exported: the trained network, or the part of it that is left when training ends."""
        network: Network = unwrapped(self.network)
        return network

    def predict(self, images_BHWC: Tensor) -> Tensor:
        """Return logits of shape (B, C) as they are used at test time, for uint8 images."""
        return self.model.predict(images_BHWC)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups of parameters; `lr_scale` in one multiplies its learning rate."""
        return [{"params": [p for p in self.network.parameters() if p.requires_grad]}]

    def end_of_epoch(self, sums: dict[str, Tensor], progress: Progress) -> dict[str, float]:
        """Take an epoch's sums, float64 on the CPU and alike on every rank; return further numbers to log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what the method itself keeps from step to step, alike on every rank: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, when a run is resumed."""
        assert not state, state.keys()


def unwrapped(network: torch.nn.Module) -> Any:
    """Return the network inside a DistributedDataParallel wrapper."""
    return getattr(network, "module", network)


def make_method(method_class: type[Method], config: Any, train_counts_C: NDArray[np.int64]) -> Method:
    """Make a method whose network is trained as the configuration says: what of it is frozen, which maps are kept.

    Raises:
        UserError: a mistake in the method's settings; no trunk to freeze; blocks that cannot be computed again.
    """
    method = method_class(config, train_counts_C)
    if config.optim.freeze == "trunk":
        method.model.freeze_trunk()
    if config.loop.grad_checkpointing:
        method.model.set_grad_checkpointing()
    if config.optim.lr_scale_trunk != 1 and not method.model.is_cut:
        raise UserError(
            f"optim.lr_scale_trunk={config.optim.lr_scale_trunk:g}: {method.model.spec['backbone']} is not cut, and has"
            " no trunk; use optim.layer_decay or optim.lr_scale_branches"
        )
    return method
