"""The cosine classifier: logits are scaled cosines, and a plain linear layer in the end."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALE = 30.0  # LDAM's code; a softmax over bare cosines of C classes could not come near certainty


class CosineClassifier(nn.Linear):
    """s·cos(w_c, f) for features of unit length, without a bias.

    With two branches, whose features are of unit length each, it is the mean of s·cos(w_cb, f_b) over the branches b.
    The length of a row plays no part, so that it cannot grow with the class's frequency.

    Attributes:
        scale: s.
        branches: how many equal parts the features have.
    """

    def __init__(self, in_features: int, out_features: int, branches: int = 1, scale: float = SCALE) -> None:
        self.branches, self.scale = branches, scale
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw random directions of unit length."""
        nn.init.uniform_(self.weight, -1, 1)
        with torch.no_grad():
            self.weight.copy_(self._unit_rows())

    def plain_weight(self) -> Tensor:
        """Return the weight (C, D) of the linear layer that gives the same logits on the same features."""
        return self._unit_rows() * (self.scale / self.branches)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return logits (B, C)."""
        return F.linear(features_BD, self.plain_weight())

    def _unit_rows(self) -> Tensor:
        return F.normalize(self.weight.unflatten(1, (self.branches, -1)), dim=2).flatten(1)


def plain_weight(classifier: nn.Linear) -> Tensor:
    """Return the weight (C, D) by which a classifier, cosine or not, multiplies features."""
    return classifier.plain_weight() if isinstance(classifier, CosineClassifier) else classifier.weight


def folded_state(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's state with each cosine classifier folded into a plain linear one: a weight and a bias of 0."""
    state = dict(network.state_dict())
    for name, module in network.named_modules():
        if isinstance(module, CosineClassifier):
            weight_CD = module.plain_weight().detach()
            state |= {f"{name}.weight": weight_CD, f"{name}.bias": weight_CD.new_zeros(len(weight_CD))}
    return state
