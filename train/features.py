"""The feature bank: what a frozen network makes of every image of a split, kept with the run that trained it.

    runs/digits-bbn-1/features/train.safetensors     features (N, D) float16 and labels (N,) int64, by sample id

A bank is reused while its fingerprint fits: the weights, the dataset and the way the images were shown.
"""

import hashlib
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from pipeline.loader import open_loader
from pipeline.plan import EvalPlan
from shards.index import MANIFEST, Dataset
from train.config import Input
from train.networks import WEIGHTS_FILE, BilateralNetwork, PlainNetwork

FOLDER = "features"


def fingerprint(run: Path, dataset: Dataset, input: Input) -> str:
    """Return a hash of everything that features depend on: weights, dataset, image size and evaluation recipe."""
    digest = hashlib.sha256(f"{input.image_size} {input.eval_augment}".encode())
    for path in (run / WEIGHTS_FILE, dataset.root / MANIFEST):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def feature_bank(
    run: Path,
    network: PlainNetwork | BilateralNetwork,
    dataset: Dataset,
    split: str,
    input: Input,
    accelerator: Accelerator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a split's features and labels, from the run's bank where it fits, else by extraction.

    Args:
        run: the stage-one run, which keeps the bank.
        network: the run's network, on the accelerator's device; it is used in evaluation mode.
        dataset: what to look at.
        split: the split's name.
        input: how the run showed images; its evaluation recipe is used.
        accelerator: gives device and precision. Every rank returns the whole bank.

    Returns:
        features_ND, float32 (rounded to float16, which is what the bank holds), >= 0, and labels_N, int64; both on
        the accelerator's device, in the order of the sample ids.
    """
    path = run / FOLDER / f"{split}.safetensors"
    wanted = fingerprint(run, dataset, input)
    bank = _read(path, wanted)
    if bank is None:
        bank = _extract(network, dataset, split, input, accelerator)
        if accelerator.is_main_process:
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f".{path.name}.partial")
            save_file({"features": bank[0], "labels": bank[1]}, temporary, {"fingerprint": wanted})
            os.replace(temporary, path)
    features_ND, labels_N = bank
    return features_ND.to(accelerator.device, torch.float32), labels_N.to(accelerator.device)


def _read(path: Path, wanted: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("fingerprint") != wanted:
                return None
            return file.get_tensor("features"), file.get_tensor("labels")
    except (OSError, SafetensorError):
        return None


@torch.no_grad()
def _extract(
    network: PlainNetwork | BilateralNetwork, dataset: Dataset, split: str, input: Input, accelerator: Accelerator
) -> tuple[torch.Tensor, torch.Tensor]:
    network.eval()
    plan = EvalPlan(dataset.splits[split], input.batch_size, input.image_size, input.eval_augment)
    features, labels = [], []
    with open_loader(plan, input.loader, accelerator.device, input.threads) as loader:
        for batch in tqdm(loader, f"features of {split}", plan.steps, unit="batch", leave=False, disable=None):
            with accelerator.autocast():
                features_BD = network.features(batch["eval"].images_BHWC)
            features.append(features_BD.half().cpu())
            labels.append(batch["eval"].labels_B.cpu())
    return torch.cat(features), torch.cat(labels)
