"""How processes write rows of a feature bank together, each its own, so that a kill loses a few batches at most."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Batches between two moments at which what was taken is safe on the disk.
BATCHES_PER_SYNC = 64


class Rows:
    """Writes rows of a bank, and says that they are there only when they are safe.

    Not by memory mapping: machines that share the filesystem would overwrite each other's pages.
    """

    def __init__(self, folder: Path, dimensions: int) -> None:
        self._row_bytes = 2 * dimensions
        self._files = [(folder / f"{name}.npy").open("r+b") for name in ("features", "seen")]
        self._starts = [np.load(file.name, mmap_mode="r").offset for file in self._files]
        self._unsaid: list[NDArray[np.int64]] = []

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *exception: object) -> None:
        self._say()
        for file in self._files:
            file.close()

    def write(self, rows_B: NDArray[np.int64], features_BD: NDArray[np.float16]) -> None:
        """Write features to their rows, of each of which one process writes."""
        for row, feature_D in zip(rows_B.tolist(), features_BD, strict=True):
            os.pwrite(self._files[0].fileno(), feature_D.data, self._starts[0] + row * self._row_bytes)
        self._unsaid.append(rows_B)
        if len(self._unsaid) == BATCHES_PER_SYNC:
            self._say()

    def _say(self) -> None:
        os.fsync(self._files[0].fileno())
        for row in (row for rows_B in self._unsaid for row in rows_B.tolist()):
            os.pwrite(self._files[1].fileno(), b"\1", self._starts[1] + row)
        self._unsaid.clear()
