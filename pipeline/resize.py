"""Windows of any size to pictures of one size, on the CPU: antialiased and straight into the batch.

DALI's own resize takes half of all its time on a CPU. torch's kernel for uint8 gives the same pictures (triangle
filter, as PIL and torchvision resize) in a ninth of that time where it writes into memory that is already there.
"""

import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def resize_windows(windows: Sequence[torch.Tensor], images_BHWC: torch.Tensor) -> None:
    """Resize each window to the batch's height and width, which overwrites the batch.

    Args:
        windows: B tensors of shape (height, width, 3), uint8, on the CPU.
        images_BHWC: where they go, uint8, on the CPU.
    """
    size = list(images_BHWC.shape[1:3])
    images_BCHW = images_BHWC.permute(0, 3, 1, 2)
    # interpolate() is this very operator but takes no `out`, and to allocate and copy costs twice what resizing does.
    resize = torch.ops.aten._upsample_bilinear2d_aa.out
    for i, window_HWC in enumerate(windows):
        resize(window_HWC.permute(2, 0, 1).unsqueeze(0), size, False, out=images_BCHW[i : i + 1])


class Buffers:
    """Batches whose memory is used again once nobody holds them any more: fresh pages cost as much as the resize.

    Args:
        shape: of a batch.
        most: how many may lie here unused; what comes back beyond that is freed.
    """

    def __init__(self, *shape: int, most: int = 8) -> None:
        self._shape = shape
        self._unused: deque[NDArray[np.uint8]] = deque(maxlen=most)

    def take(self) -> torch.Tensor:
        """Return a batch with whatever lies in it; uint8."""
        memory = self._unused.pop() if self._unused else np.empty(self._shape, dtype=np.uint8)
        # The tensor and every view of it hold this lease, and nothing else does.
        lease = memory[:]
        weakref.finalize(lease, self._unused.append, memory).atexit = False
        return torch.from_numpy(lease)
