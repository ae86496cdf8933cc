"""Linear classifiers on features: how they are trained, those that need no training, and how they are measured."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from analysis.metrics import Tally, tally
from shards.errors import UserError

# Features that are evaluated at once: a bound on memory.
FEATURES_PER_BLOCK = 16384


@torch.no_grad()
def tau_normalized(linear: nn.Linear, tau: float) -> nn.Linear:
    """Return W's rows divided by ‖w_c‖^τ, and no bias (Kang et al., ICLR 2020, Eq. 4)."""
    plain = copy.deepcopy(linear)
    plain.weight.div_(plain.weight.norm(dim=1, keepdim=True).clamp(min=1e-12) ** tau)
    plain.bias.zero_()
    return plain


@torch.no_grad()
def logit_adjusted(linear: nn.Linear, counts_C: Tensor, tau: float) -> nn.Linear:
    """Return a classifier whose logits are less by τ·log P(c) (Menon et al., ICLR 2021, post-hoc logit adjustment)."""
    plain = copy.deepcopy(linear)
    plain.bias.sub_(tau * (counts_C / counts_C.sum()).log().to(plain.bias))
    return plain


@torch.no_grad()
def nearest_means(features_ND: Tensor, labels_N: Tensor, num_classes: int, cosine: bool) -> nn.Linear:
    """Return a classifier whose top class is the one of the nearest mean (NCM; Kang et al., ICLR 2020, section 4.2).

    Args:
        features_ND: training features, of any floating dtype.
        labels_N: their classes; every class occurs.
        num_classes: C.
        cosine: by the angle between feature and mean; else by Euclidean distance, as μ·f − ‖μ‖²/2. A feature's own
            length changes no order, so that both are linear.
    """
    plain = nn.Linear(features_ND.shape[1], num_classes).to(features_ND.device)
    sums_CD = torch.zeros_like(plain.weight)
    for features_BD, labels_B in zip(
        features_ND.split(FEATURES_PER_BLOCK), labels_N.split(FEATURES_PER_BLOCK), strict=True
    ):
        sums_CD.index_add_(0, labels_B, features_BD.float())
    means_CD = sums_CD / torch.bincount(labels_N, minlength=num_classes)[:, None]
    plain.weight.copy_(F.normalize(means_CD) if cosine else means_CD)
    plain.bias.copy_(torch.zeros_like(plain.bias) if cosine else -means_CD.square().sum(1) / 2)
    return plain


@torch.no_grad()
def measure(linear: nn.Linear, bank: tuple[Tensor, Tensor]) -> tuple[Tally, float]:
    """Evaluate a classifier on a bank of at least one feature.

    Args:
        linear: the classifier.
        bank: features (N, D), of any floating dtype, and labels (N,).

    Returns:
        The tally, and the mean cross-entropy.

    Raises:
        UserError: a logit is not finite.
    """
    total, loss = Tally.zeros(linear.out_features), 0.0
    for features_BD, labels_B in zip(*(part.split(FEATURES_PER_BLOCK) for part in bank), strict=True):
        logits_BC = linear(features_BD.float())
        loss += F.cross_entropy(logits_BC, labels_B, reduction="sum").item()
        try:
            total = total + tally(logits_BC.cpu().numpy(), labels_B.cpu().numpy())
        except ValueError as error:
            raise UserError(f"on features, {error}") from None
    return total, loss / len(bank[1])
