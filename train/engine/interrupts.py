"""Signals that shut a run down cleanly, and how every rank comes to act after the same step.

    SIGTERM, SIGINT, SIGUSR1, SIGHUP ─> the step is finished ─> checkpoint ─> exit status 75

A second Ctrl-C ends the process at once. SIGHUP comes when a terminal closes or a connection breaks; where it is
ignored, as under nohup, it stays so.
"""

import os
import signal
import stat
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, give it again.
EXIT_STATUS = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
OUTPUTS = (1, 2)  # descriptors


class Interrupted(BaseException):
    """The run was asked to stop, and has shut down cleanly.

    Like KeyboardInterrupt, it is no Exception: whoever catches those, such as a tracker or a download that fails, must
    not take it for one of theirs.

    Attributes:
        signal: the name of the signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number).name


class Interrupts:
    """Remembers, within a with block, the last signal that asked to stop, and says on the first rank what is finished.

    A step may be one call into foreign code that takes minutes, in which Python runs no handler: a thread hears of the
    signals at once, says what is waited for, and ends the process at the second Ctrl-C.

    Attributes:
        received: the signal's number, or 0.
        doing: what is said to be done then.
    """

    doing = "finishing this step and writing a checkpoint"

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._woken_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=_say_what_is_waited_for, args=(reader, self.doing), daemon=True)
        self._thread.start()
        # A tee at the end of a pipe hears of the same SIGHUP, and ends of it.
        self._shown = [output for output in OUTPUTS if os.isatty(output) or _is_pipe(output)]
        obeyed = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in obeyed}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._woken_before)
        os.close(self._writer)
        self._thread.join()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGHUP:
            self._leave_outputs()

    def _leave_outputs(self) -> None:
        """Write to nowhere from now on: to write to a terminal that is gone fails, or to a pipe that nobody reads."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in self._shown:
            os.dup2(nowhere, output)
        os.close(nowhere)


def _is_pipe(output: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(output).st_mode)
    except OSError:  # closed
        return False


def _say_what_is_waited_for(reader: int, doing: str) -> None:
    """Watch the numbers of the signals that come out of a pipe, to its end."""
    announced = interrupted = False
    with open(reader, "rb", buffering=0) as pipe:
        while numbers := pipe.read(64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if interrupted and number == signal.SIGINT:
                    os._exit(128 + number)
                interrupted |= number == signal.SIGINT
                if not announced and os.environ.get("RANK", "0") == "0":
                    now = f"; Ctrl-C again, or kill -INT {os.getpid()}, stops at once" if interrupted else ""
                    with suppress(OSError):  # the terminal may be gone
                        print(f"\n{signal.Signals(number).name}: {doing}{now}", file=sys.stderr, flush=True)
                announced = True


class Stops(Interrupts):
    """Raises Interrupted where the program is: files appear whole or not at all, so that nothing has to be finished."""

    doing = "stopping"

    def _receive(self, number: int, frame: FrameType | None) -> None:
        super()._receive(number, frame)
        raise Interrupted(number)


class Consensus:
    """The largest of each number over the ranks, which every rank gets at the same call.

    With several ranks a call returns the result of the call before it (zeros at the first), so that no rank waits
    for the others, and none for its GPU: the numbers travel between the hosts while a step is computed.
    """

    def __init__(self, processes: int) -> None:
        self._group: Any = dist.new_group(backend="gloo") if processes > 1 else None
        self._sent: tuple[Any, torch.Tensor] | None = None

    def __call__(self, *numbers: int) -> list[int]:
        """See the class."""
        if self._group is None:
            return list(numbers)
        previous = self.wait() or [0] * len(numbers)
        tensor = torch.tensor(numbers)
        self._sent = dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group, async_op=True), tensor
        return previous

    def wait(self) -> list[int] | None:
        """Return the result of the last call, unless it has been returned."""
        if self._sent is None:
            return None
        (work, tensor), self._sent = self._sent, None
        work.wait()
        return [int(number) for number in tensor]
