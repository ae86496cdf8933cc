"""Linear classifiers on features: those that are trained, and those that stage one's weights give at once.

    scaled    s ⊙ (W·f + b), scales and weights learnt, from stage one's W and b
    lws       the same with W and b frozen: learnable weight scaling (Kang et al., ICLR 2020, section 4.2)
    linear    a fresh W·f + b

All end as a plain `nn.Linear`.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from analysis.metrics import Tally, tally
from shards.errors import UserError
from train.engine.objectives import gradual_weight
from train.features.mixing import Batches

Kind = Literal["scaled", "lws", "linear"]
# Features that are evaluated at once: a bound on memory.
FEATURES_PER_BLOCK = 16384


@dataclass
class ClassifierOptim:
    """SGD with a cosine from `lr` to 0.

    Attributes:
        epochs: generation epochs; each draws new features.
        batch_size: features per step, over all processes.
        lr: the learning rate at the start.
        momentum: of SGD.
        weight_decay: L2.
    """

    epochs: PositiveInt = 40
    batch_size: PositiveInt = 512
    lr: PositiveFloat = 0.1
    momentum: ClosedUnitInterval = 0.9
    weight_decay: NonNegativeFloat = 5e-4


class ScaledLinear(nn.Module):
    """A linear classifier whose every logit has a scale: s ⊙ (W·f + b), s from 1.

    It sees features in the given unit of length and W by its inverse: the same logits, and a learning rate that suits
    any network.
    """

    def __init__(self, linear: nn.Linear, kind: Kind = "scaled", unit: float = 1.0) -> None:
        super().__init__()
        self.unit = unit
        self.linear = copy.deepcopy(linear).requires_grad_(kind != "lws")
        if kind == "linear":
            self.linear.reset_parameters()
        else:
            self.linear.weight.data *= unit
        scales_C = torch.ones(linear.out_features, device=linear.weight.device)
        self.scales_C = nn.Parameter(scales_C, requires_grad=kind != "linear")

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return logits (B, C)."""
        return self.scales_C * self.linear(features_BD / self.unit)

    def folded(self) -> nn.Linear:
        """Return the plain linear layer that gives the same logits."""
        plain = copy.deepcopy(self.linear).requires_grad_(True)
        plain.weight.data *= self.scales_C.detach()[:, None] / self.unit
        plain.bias.data *= self.scales_C.detach()
        return plain


@dataclass(frozen=True)
class Distillation:
    """Head classes are held to a teacher: α(t)·KL(teacher ‖ student), at temperature 1 (GLAG Eq. 11).

    Attributes:
        teacher: features (B, D) -> logits (B, C): stage one's classifier.
        head_C: bool, the classes whose samples are distilled.
        scale, base: s and c of α(t).
    """

    teacher: Callable[[Tensor], Tensor]
    head_C: Tensor
    scale: float
    base: float

    def weight(self, epoch: int, epochs: int) -> float:
        """Return α(t), which "shares the same form as Eq. 3" (GLAG, section 4.2)."""
        return gradual_weight(epoch, epochs, self.scale, self.base)

    def loss(self, features_BD: Tensor, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Return the divergence summed over samples of head classes and divided by all B, a scalar."""
        head_B = self.head_C[labels_B]
        with torch.no_grad():
            teacher_HC = self.teacher(features_BD[head_B]).log_softmax(1)
        student_HC = logits_BC[head_B].log_softmax(1)
        return F.kl_div(student_HC, teacher_HC, reduction="sum", log_target=True) / len(labels_B)


def train_classifier(
    classifier: ScaledLinear,
    batches: Callable[[], Batches],
    optim: ClassifierOptim,
    distillation: Distillation | None = None,
    after_epoch: Callable[[nn.Linear], None] = lambda linear: None,
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> tuple[nn.Linear, list[dict[str, Any]]]:
    """Train a classifier by cross-entropy.

    Args:
        classifier: what is trained, in place.
        batches: gives an epoch of (features_BD, labels_B) at each call.
        optim: the optimiser's settings.
        distillation: None: none.
        after_epoch: called with the folded classifier.
        average: gives the mean of a gradient over all ranks.

    Returns:
        The folded linear layer, and a row of numbers per epoch.

    Raises:
        UserError: the loss is not finite.
    """
    learnable = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learnable, optim.lr, optim.momentum, weight_decay=optim.weight_decay)
    rows, step = [], 0
    for epoch in range(1, optim.epochs + 1):
        lr = optim.lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / optim.epochs))
        optimizer.param_groups[0]["lr"] = lr
        alpha = distillation.weight(epoch, optim.epochs) if distillation else 0.0
        started, loss_sum, seen = time.perf_counter(), torch.zeros((), device=classifier.scales_C.device), 0
        for features_BD, labels_B in batches():
            logits_BC = classifier(features_BD)
            loss = F.cross_entropy(logits_BC, labels_B)
            if distillation and alpha > 0:
                loss = loss + alpha * distillation.loss(features_BD, logits_BC, labels_B)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for parameter in learnable:
                if parameter.grad is not None:
                    parameter.grad = average(parameter.grad)
            optimizer.step()
            loss_sum += loss.detach() * len(labels_B)
            seen, step = seen + len(labels_B), step + 1
        row = {"epoch": epoch, "step": step, "loss": loss_sum.item() / max(1, seen), "lr": lr, "distillation": alpha}
        row["images_per_second"] = seen / (time.perf_counter() - started)
        if not math.isfinite(row["loss"]):
            raise UserError(f"the loss is {row['loss']} in epoch {epoch} (optim.lr={lr:g}); lower optim.lr")
        rows.append(row)
        after_epoch(classifier.folded())
    return classifier.folded(), rows


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
