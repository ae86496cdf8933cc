"""Shifted batch norm: a frozen network whose running statistics are those of balanced draws.

MiSLAS (Zhong et al., "Improving Calibration for Long-Tailed Recognition", CVPR 2021, section 4.3): stage one's running
means and variances are those of the long-tailed data, and a second stage sees classes in balance. So they are taken
again there, while all weights stay, batch norm's own included.

The authors' code updates them while it trains the classifier, as moving averages, in which the last few dozen batches
count, and trains on features that each batch's own statistics normalise. Here one pass over balanced draws comes first;
the statistics are the plain mean over all its batches, and the classifier is trained on the features that an evaluation
of the shifted network sees.
"""

import hashlib
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from pipeline.plan import Stream, TrainPlan
from shards.index import MANIFEST, Dataset
from train.engine.config import Input
from train.engine.guards import StallGuard
from train.features.commands import STALL_MINUTES
from train.networks.model_files import SPEC_FILE, load_model, save_model
from train.networks.networks import BilateralNetwork, Network, PlainNetwork

FOLDER = "shifted"
# The fewest that statistics are taken from, where an epoch has fewer.
BATCHES = 16


def shifted(
    network: Network,
    folder: Path,
    dataset: Dataset,
    input: Input,
    accelerator: Accelerator,
    seed: int,
    stall_minutes: float = STALL_MINUTES,
) -> tuple[PlainNetwork | BilateralNetwork, Path]:
    """Return the network with shifted statistics, and where it is kept: read there, or made by a pass over images.

    Args:
        network: of stage one, on the accelerator's device; it is changed.
        folder: shifted networks lie in it, each in a folder of its own by what made it, as last weights.
        dataset: its train split is drawn from.
        input: how stage one showed images: its training recipe is used, as in the authors' code; and the batch size.
        accelerator: gives device, precision and ranks, which share the images.
        seed: of the draws.
        stall_minutes: how long to wait for a batch.
    """
    digest = hashlib.sha256((dataset.root / MANIFEST).read_bytes())
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    shown = (input.augment, input.image_size, input.batch_size, seed)
    digest.update(repr((*shown, accelerator.num_processes, accelerator.mixed_precision)).encode())
    home = folder / digest.hexdigest()[:16]
    kept = (home / SPEC_FILE).exists()
    accelerator.wait_for_everyone()  # all have looked
    if not kept:
        shift(network, dataset, input, accelerator, seed, stall_minutes)
        if accelerator.is_main_process:
            save_model(network, home)
        accelerator.wait_for_everyone()
    return load_model(home).to(accelerator.device), home


@torch.no_grad()
def shift(
    network: Network,
    dataset: Dataset,
    input: Input,
    accelerator: Accelerator,
    seed: int,
    stall_minutes: float = STALL_MINUTES,
) -> None:
    """Replace the running statistics of every batch norm by the means over one epoch of class-balanced batches."""
    norms = batch_norms(network)
    plan = TrainPlan(
        dataset.splits["train"],
        [Stream("shift", q=0, augment=input.augment)],
        input.batch_size * accelerator.num_processes,
        input.image_size,
        seed,
        1,
        accelerator.process_index,
        accelerator.num_processes,
    )
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    with (
        input.open_loader(plan, accelerator.device) as loader,
        StallGuard(loader, plan.streams, accelerator.process_index, 60 * stall_minutes) as batches,
    ):
        steps = max(plan.steps_per_epoch, BATCHES)
        silent = not accelerator.is_main_process or None
        bar = tqdm(islice(batches, steps), "shifting batch norm", steps, unit="batch", leave=False, disable=silent)
        for batch in bar:
            with accelerator.autocast():
                network.features(batch["shift"].images_BHWC)
    network.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            statistic.copy_(accelerator.reduce(statistic, reduction="mean"))


def batch_norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the layers of a network that keep running statistics."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    return [layer for layer in layers if layer.track_running_stats]
