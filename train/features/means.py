"""A classifier without training: class means on the unit sphere, and how sharp their probabilities are."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from shards.errors import UserError
from train.features.classifiers import nearest_means

SCALES = 1.0, 200.0
# With many classes a part of the images tells the scale: cosines of so many pairs are looked at.
PAIRS = 50_000_000


@torch.no_grad()
def mean_classifier(
    features_ND: Tensor, labels_N: Tensor, num_classes: int, tau: float = 1.0
) -> tuple[nn.Linear, float]:
    """Return the classifier z_c = s·cos(μ_c, f) + (1 − τ)·log π_c, and s.

    It is Bayes' rule where every class is a von Mises-Fisher distribution on the unit sphere around its mean μ_c, all
    equally concentrated, less the logit adjustment of Menon et al., "Long-Tail Learning via Logit Adjustment" (ICLR
    2021): π_c are the classes' shares of the training images, and τ = 1 takes all classes for equally likely.

    Args:
        features_ND: training features of unit length, of any floating dtype.
        labels_N: their classes.
        num_classes: C.
        tau: τ >= 0.

    Raises:
        UserError: a class without images, which has no mean.
    """
    counts_C = torch.bincount(labels_N, minlength=num_classes)
    if (counts_C == 0).any():
        missing = int((counts_C == 0).sum())
        raise UserError(f"{missing} of {num_classes} classes have no training image that decodes, so they have no mean")
    linear = nearest_means(features_ND, labels_N, num_classes, cosine=True)
    scale = best_scale(features_ND, labels_N, linear.weight)
    linear.weight.mul_(scale)
    prior_C = counts_C / counts_C.sum()
    linear.bias.copy_((1 - tau) * prior_C.log())
    return linear, scale


@torch.no_grad()
def best_scale(features_ND: Tensor, labels_N: Tensor, means_CD: Tensor) -> float:
    """Return the s in [1, 200] under which the training images' classes are likeliest, each judged by the others.

    An image is left out of its own class's mean, (S_c − f)/‖S_c − f‖ with the sum S_c of the class, since a network
    that never saw the images fits them no better than others; an image alone in its class says nothing. The mean of
    −log softmax(s·cos)_y is taken within classes first, so that the tail counts as much as the head. Where no image can
    be left out it is 30, as in LDAM's code (Cao et al. 2019).

    Args:
        features_ND: of unit length, of any floating dtype.
        labels_N: their classes, ascending.
        means_CD: the classes' mean directions, of unit length, float32.
    """
    counts_C = torch.bincount(labels_N, minlength=len(means_CD))
    rows_B = _even_share(counts_C, PAIRS // max(means_CD.shape)).to(labels_N.device)
    if not len(rows_B):
        return 30.0
    features_BD, labels_B = features_ND[rows_B].float(), labels_N[rows_B]
    cosines_BC = features_BD @ means_CD.T
    # The sum of a class has the direction of its mean, and the length of the sum of its images' shadows on it.
    lengths_C = torch.zeros(len(means_CD), device=means_CD.device)
    for start in range(0, len(labels_N), len(rows_B)):
        part = slice(start, start + len(rows_B))
        own_n = (features_ND[part].float() * means_CD[labels_N[part]]).sum(1)
        lengths_C.index_add_(0, labels_N[part], own_n)
    sums_BD = lengths_C[labels_B, None] * means_CD[labels_B]
    own_B = F.cosine_similarity(features_BD, sums_BD - features_BD)
    cosines_BC[torch.arange(len(labels_B), device=labels_B.device), labels_B] = own_B
    weights_B = 1.0 / torch.bincount(labels_B, minlength=len(means_CD))[labels_B].float()
    weights_B /= weights_B.sum()

    def loss(log_scale: float) -> float:
        return float(F.cross_entropy(np.exp(log_scale) * cosines_BC, labels_B, reduction="none") @ weights_B)

    return float(np.exp(minimize_scalar(loss, bounds=tuple(np.log(SCALES)), method="bounded").x))


def _even_share(counts_C: Tensor, most: int) -> Tensor:
    """Return rows of a class-sorted bank, at most so many, equally many of each class as far as it has them.

    Classes of one image are left out. Where there are more classes than that, some are left out all over their range.
    """
    per_class = max(1, most // max(1, int((counts_C > 1).sum())))
    ends = counts_C.cumsum(0).tolist()
    rows: list[int] = []
    for end, count in zip(ends, counts_C.tolist(), strict=True):
        if count > 1:
            rows += np.linspace(end - count, end - 1, min(count, per_class)).round().astype(int).tolist()
    places = np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int)
    return torch.tensor([rows[place] for place in places], dtype=torch.int64)
