"""One interface for every loader: a plan goes in, batches of both streams come out.

with open_loader(plan, kind="auto", device=device, start_step=k) as loader:
    for step in loader:                      # endless for a TrainPlan
        step["uniform"].images_BHWC          # uint8, on the device
"""

from importlib.util import find_spec
from typing import Literal

import torch

from pipeline.batch import Loader
from pipeline.plan import Plan
from shards.errors import UserError

LoaderKind = Literal["auto", "dali", "torch"]


def open_loader(
    plan: Plan,
    kind: LoaderKind = "auto",
    device: torch.device | str = "cpu",
    threads: int = 2,
    start_step: int = 0,
) -> Loader:
    """Open a loader for a plan.

    Args:
        plan: a TrainPlan or an EvalPlan.
        kind: "dali" (two pipelines, decoding on the GPU where the device is one), "torch" (the portable
            reference), or "auto": DALI where it is installed.
        device: where batches shall lie.
        threads: decoding threads per stream (DALI) or worker processes (torch; 0 loads in this process).
        start_step: the first step to deliver, counted from 0 over all epochs.

    Raises:
        UserError: DALI is asked for and not installed, or threads is out of range.
    """
    device = torch.device(device)
    if kind == "auto":
        kind = "dali" if find_spec("nvidia") and find_spec("nvidia.dali") else "torch"
    if threads < (1 if kind == "dali" else 0):
        raise UserError(f"input.threads={threads} is too small for the {kind} loader; use at least 1")
    if kind == "dali":
        try:
            from pipeline.dali_loader import DaliLoader
        except ModuleNotFoundError as error:
            raise UserError(
                f"the DALI loader needs nvidia-dali-cuda130 ({error}); install it, or use --input.loader torch"
            ) from None
        return DaliLoader(plan, device, threads, start_step)
    from pipeline.torch_loader import TorchLoader

    return TorchLoader(plan, device, threads, start_step)
