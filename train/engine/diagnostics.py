"""What a finished run keeps of its classifier and its features, so that a report can show them without the network.

diagnostics.npz
    norms             (C,) float32: length of each class's row of the classifier, W (BBN, Figure 4)
    norms_conventional, norms_rebalancing  (C,) float32: of each branch's half, where there are two
    distances         (C,) float32: how far the test features of a class lie from their centroid (BBN, supplement,
                      Figure 6), nan where it has fewer than two; see `Compactness`. Not of a second stage, whose
                      features are stage one's
    beta              (C,) float32: β in the end, of a second stage with a β per class; nan for head classes
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from shards.atomic import partial_file
from train.networks.cosine import plain_weight
from train.networks.networks import Network

FILE = "diagnostics.npz"
BRANCHES = ("conventional", "rebalancing")


class Compactness:
    """How closely the features of a class lie around their centroid, summed up while a network is evaluated.

    Features are brought to unit length, so that no method gains by short ones. The mean squared distance of n of them
    from their mean μ is 1 − ‖μ‖²: a sum of features per class is all that is kept, whatever the number of images. The
    root of n/(n − 1) times that is the distance, which does not depend on n (BBN's is the mean of the distances).

        with Compactness(network, num_classes) as compactness:
            network.predict(images); compactness.add(labels_B)
    """

    def __init__(self, network: Network, num_classes: int) -> None:
        classifier = network.classifier
        self._sums_CD = torch.zeros(num_classes, classifier.in_features, device=classifier.weight.device)
        self._counts_C = torch.zeros(num_classes, device=classifier.weight.device)
        self._classifier, self._features_BD = classifier, torch.empty(0)

    def __enter__(self) -> Self:
        self._hook = self._classifier.register_forward_pre_hook(self._see)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hook.remove()

    def _see(self, _classifier: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features_BD = inputs[0]

    def add(self, labels_B: Tensor) -> None:
        """Take the batch that the classifier saw last, with its labels; of a method without such a batch, nothing."""
        if len(self._features_BD) != len(labels_B):
            return
        features_BD = nn.functional.normalize(self._features_BD.float())
        labels_B = labels_B.to(features_BD.device)
        self._sums_CD.index_add_(0, labels_B, features_BD)
        self._counts_C.index_add_(0, labels_B, torch.ones_like(labels_B, dtype=torch.float32))

    def distances(self, accelerator: Accelerator) -> NDArray[np.float32]:
        """Return each class's distance over all ranks' images, shape (C,), in [0, √2]; nan for fewer than two."""
        sums_CD, n_C = (accelerator.reduce(part, "sum") for part in (self._sums_CD, self._counts_C))
        lengths_C = sums_CD.double().div(n_C[:, None]).square().sum(1)  # nan for 0 images
        spread_C = (1 - lengths_C).clamp(min=0) * n_C / (n_C - 1)  # nan or inf for 1
        found = spread_C.masked_fill(n_C < 2, torch.nan).sqrt().float().cpu().numpy()
        return np.asarray(found, np.float32)


def norms(classifier: nn.Linear, branches: int) -> dict[str, NDArray[np.float32]]:
    """Return the lengths of a classifier's rows, and of their halves where there are two branches; each (C,)."""
    weight_CD = plain_weight(classifier).detach().float().cpu()
    parts = {"norms": weight_CD}
    if branches > 1:
        halves = weight_CD.chunk(branches, dim=1)
        parts |= {f"norms_{name}": half for name, half in zip(BRANCHES, halves, strict=True)}
    return {name: part.norm(dim=1).numpy() for name, part in parts.items()}


def write_diagnostics(run_folder: Path, network: Network, **arrays: Any) -> None:
    """Write diagnostics.npz, of the network's classifier and of further arrays; None leaves one out."""
    kept: dict[str, Any] = {**norms(network.classifier, network.branches)}
    kept |= {name: np.asarray(array, np.float32) for name, array in arrays.items() if array is not None}
    with partial_file(run_folder / FILE) as temporary, temporary.open("wb") as file:
        np.savez(file, **kept)
