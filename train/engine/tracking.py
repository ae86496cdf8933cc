"""Curves for TensorBoard, for whoever wants to watch: tensorboard --logdir runs."""

from pathlib import Path
from typing import Any, Literal

from shards.errors import UserError

Tracker = Literal["none", "tensorboard"]


class Tracking:
    """Writes numbers by step; does nothing where tracking is off.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._writer_class: Any = None
        self._writer: Any = None
        if tracker == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError(
                    f"loop.track=tensorboard needs the package tensorboard ({error}); install it, or use"
                    " --loop.track none"
                ) from None
            self._writer_class = SummaryWriter

    def open(self, run_folder: Path, step: int) -> None:
        """Begin to write into the run's folder, over what an interrupted run wrote from `step` on."""
        if self._writer_class is not None:
            self._writer = self._writer_class(str(run_folder / "tensorboard"), purge_step=step)

    def row(self, row: dict[str, Any]) -> None:
        """Write an epoch's row of metrics.jsonl: its numbers as train/NAME, those of its evaluation as SPLIT/NAME."""
        if self._writer is None:
            return
        numbers = {f"train/{name}": value for name, value in row.items()}
        if "eval" in row:
            numbers |= {f"{row['eval']['split']}/{name}": value for name, value in row["eval"].items()}
        for name, value in numbers.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """End."""
        if self._writer is not None:
            self._writer.close()
