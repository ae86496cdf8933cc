"""Signals that end a run in good order, and how every rank comes to act after the same step.

    SIGTERM, SIGINT, SIGUSR1 ─> the step is finished ─> checkpoint ─> exit status 75

A second Ctrl-C leaves at once.
"""

import signal
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, give it again.
EXIT_STATUS = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop, and has stopped in good order.

    Attributes:
        signal: the name of the signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number).name


class Interrupts:
    """Remembers, within a with block, the last signal that asked to stop.

    Attributes:
        received: its number, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


class Consensus:
    """The largest of each number over the ranks, which every rank gets at the same call.

    With several ranks a call returns what was told at the call before it (zeros at the first), so that no rank waits
    for the others, and none for its GPU: the numbers travel between the hosts while a step is computed.
    """

    def __init__(self, processes: int) -> None:
        self._group: Any = dist.new_group(backend="gloo") if processes > 1 else None
        self._sent: tuple[Any, torch.Tensor] | None = None

    def __call__(self, *numbers: int) -> list[int]:
        """See the class."""
        if self._group is None:
            return list(numbers)
        told = self.wait() or [0] * len(numbers)
        tensor = torch.tensor(numbers)
        self._sent = dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group, async_op=True), tensor
        return told

    def wait(self) -> list[int] | None:
        """Return what the last call told, if it was not yet returned."""
        if self._sent is None:
            return None
        (work, tensor), self._sent = self._sent, None
        work.wait()
        return [int(number) for number in tensor]
