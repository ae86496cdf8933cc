"""A sample of real and generated features of a few classes, kept for a picture of them (GLAG, Figure 4).

feature_sample.npz
    features     (P, D) float16: of head classes, and of the tail classes with generated ones
    labels       (P,) int64
    generated    (P,) bool
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shards.atomic import partial_file
from train.features.mixing import Mixture

FILE = "feature_sample.npz"
CLASSES_AT_AN_END = 4  # as many of the largest as of the smallest: eight colours are distinguishable
EACH = 40  # at most so many real features of a class, and so many generated ones


def write_sample(run_folder: Path, mixture: Mixture, beta: float | Tensor, seed: int) -> None:
    """Write feature_sample.npz: of the largest and the smallest classes, where anything is generated at all.

    Args:
        run_folder: where to.
        mixture: the features, and how others are generated from them.
        beta: β in [0, 1], one for all or shape (C,).
        seed: of the choice.
    """
    counts_C, targets_C = mixture.gaussians.counts_C, mixture.targets_C
    order_C = counts_C.argsort(descending=True, stable=True)
    ends = min(CLASSES_AT_AN_END, len(order_C) // 2)
    chosen = torch.cat([order_C[:ends], order_C[len(order_C) - ends :]])
    few_C = torch.zeros_like(targets_C)
    few_C[chosen] = targets_C[chosen].clamp(max=EACH)
    if not few_C.any():
        return
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label in chosen:
        mine = (mixture.labels_N == label).nonzero()[:, 0]
        rows.append(mine[torch.randperm(len(mine), generator=generator)[:EACH].to(mine.device)])
    real_PD, real_labels_P = mixture.real(torch.cat(rows))
    alone = replace(mixture, targets_C=few_C, rank=0, world_size=1)
    features, labels = zip((real_PD, real_labels_P), *alone.generated(beta, generator), strict=True)
    generated_P = np.arange(sum(map(len, labels))) >= len(real_labels_P)
    with partial_file(run_folder / FILE) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            features=torch.cat(features).clamp(max=torch.finfo(torch.half).max).half().cpu().numpy(),
            labels=torch.cat(labels).cpu().numpy(),
            generated=generated_P,
        )
