"""How long the classifiers of a second stage train: together, as train/afg.py does, and one after the other.

    together    `train.features.passes`: those that see the same features share every step
    alone       as AFG did at first: each draws its own epochs of features, and meets them by autograd and torch's SGD

Both ways train the same recipes. They draw different numbers, so their figures are equal to noise.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shards.progress import say
from train.engine.objectives import gradual_weight
from train.features.classifiers import logit_adjusted, measure
from train.features.commands import ClassifierOptim, ReferenceOptim
from train.features.mixing import Batches, Mixture, real_epoch
from train.features.passes import Passes, Source
from train.features.recipes import Recipe

BETAS, RATES = (0.0, 0.2, 0.4, 0.6, 0.8), (1.0, 0.25, 4.0)
Bank = tuple[Tensor, Tensor]


def candidates(mixture: Mixture, epochs: int) -> dict[Source, list[Recipe]]:
    """Return what AFG's table needs, by the features that it sees: 5 β, and 3 rates of each baseline.

    Args:
        mixture: the features.
        epochs: of AFG and of the baselines like it; cRT has a quarter, LWS an eighth, as with the settings' defaults.
    """
    o, r = ClassifierOptim(epochs=epochs), ReferenceOptim()
    scaled = Recipe("scaled", epochs, o.lr, o.momentum, o.weight_decay, mixture.unit)
    crt = Recipe("linear", max(1, epochs // 4), r.lr, r.momentum, r.weight_decay, early_cosine=True)
    lws = replace(crt, kind="lws", epochs=max(1, epochs // 8))

    def rated(*recipes: Recipe) -> list[Recipe]:
        return [replace(recipe, lr=recipe.lr * rate) for recipe in recipes for rate in RATES]

    return {
        Source("generated", o.batch_size): [replace(scaled, beta=beta, distill=1.0) for beta in BETAS],
        Source("oversampled", o.batch_size): rated(scaled, crt, lws),
        Source("each-once", o.batch_size): rated(scaled),
    }


def compare_trainings(mixture: Mixture, held_out: Bank, epochs: int, rounds: int) -> dict[str, Any]:
    """Train all candidates both ways, by turns, each round from its own seed.

    Returns:
        CPU seconds by way and source, the ratio of their sums (the median over the rounds), and how far the ways'
        balanced accuracies are apart, beside how far apart two rounds of one way are.
    """
    stage_one = trained_stage_one(mixture)
    by_source = candidates(mixture, epochs)
    seconds: dict[str, list[dict[str, float]]] = {"together": [], "alone": []}
    accuracies: dict[str, list[list[float]]] = {"together": [], "alone": []}
    for seed in range(rounds):
        passes = Passes(stage_one, mixture, seed)
        for way in ("together", "alone"):
            spent: dict[str, float] = {}
            found: list[float] = []
            for source, recipes in by_source.items():
                started = time.process_time()
                if way == "together":
                    linears = [one.linear for one in passes.train(source, recipes)]
                else:
                    linears = [train_alone(stage_one, mixture, source, recipe, seed) for recipe in recipes]
                spent[source.sampling] = time.process_time() - started
                found += [balanced_accuracy(linear, held_out) for linear in linears if linear is not None]
            seconds[way].append(spent)
            accuracies[way].append(found)
            shown = ", ".join(f"{sampling} {one:.1f} s" for sampling, one in spent.items())
            say(f"second stage, round {seed + 1}, {way}: {shown}")
    ratios = [
        sum(alone.values()) / sum(together.values())
        for together, alone in zip(seconds["together"], seconds["alone"], strict=True)
    ]
    together_RF, alone_RF = (np.array(accuracies[way]) for way in ("together", "alone"))
    return {
        "features": len(mixture.labels_N),
        "dimensions": mixture.features_ND.shape[1],
        "classes": len(mixture.targets_C),
        "candidates": sum(map(len, by_source.values())),
        "epochs": epochs,
        "stage_one": balanced_accuracy(stage_one, held_out),
        "cpu_seconds": seconds,
        "balanced_accuracy": {"together": together_RF.mean(0).tolist(), "alone": alone_RF.mean(0).tolist()},
        "times_training_alone": median(ratios),
        "difference_of_ways": float(np.abs((together_RF - alone_RF).mean(0)).max()),
        "difference_of_rounds": mean(np.ptp(way_RF, axis=0).max() for way_RF in (together_RF, alone_RF)),
    }


def take_some_steps(mixture: Mixture, chunks: int) -> None:
    """Train as many classifiers as one pass may, each at its own β, on every sixteenth batch of some chunks."""
    stage_one = nn.Linear(mixture.features_ND.shape[1], len(mixture.targets_C))
    passes = Passes(stage_one, mixture, 0)
    recipe = Recipe("scaled", 1, 0.1, distill=1.0)
    stacks, _ = passes.stacks([replace(recipe, beta=beta) for beta in BETAS[: passes.at_once]])
    batches, steps = passes.epochs(
        Source("generated", ClassifierOptim().batch_size), [s.recipes[0].beta for s in stacks]
    )
    for stack in stacks:
        stack.begin_epoch(1)
    per_chunk = max(1, steps * mixture.chunk // 2 // max(1, int(mixture.targets_C.sum())))
    for number, (views, labels_B) in enumerate(islice(batches(), chunks * per_chunk + 1)):
        if number % 16 == 0:
            for stack, features_BD in zip(stacks, views, strict=True):
                stack.step(features_BD, labels_B)


def trained_stage_one(mixture: Mixture) -> nn.Linear:
    """Return a classifier trained on the real features as they are."""
    fresh = nn.Linear(mixture.features_ND.shape[1], len(mixture.targets_C))
    recipe = Recipe("linear", 10, 5.0, unit=mixture.unit)
    (one,) = Passes(fresh, mixture, 0).train(Source("each-once", 128), [recipe])
    assert one.linear is not None
    return one.linear


def balanced_accuracy(linear: nn.Linear, bank: Bank) -> float:
    """Return the mean over classes of the share that is recognised."""
    total, _ = measure(linear, bank)
    return float((total.correct_C / total.total_C).mean())


class ScaledLinear(nn.Module):
    """s ⊙ (W·f + b), which sees features in units of length and W by its inverse."""

    def __init__(self, stage_one: nn.Linear, recipe: Recipe) -> None:
        super().__init__()
        self.unit = recipe.unit
        self.linear = nn.Linear(stage_one.in_features, stage_one.out_features)
        if recipe.kind != "linear":
            self.linear.load_state_dict(stage_one.state_dict())
            self.linear.weight.data *= recipe.unit
        self.linear.requires_grad_(recipe.kind != "lws")
        self.scales_C = nn.Parameter(torch.ones(stage_one.out_features), requires_grad=recipe.kind != "linear")

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return logits (B, C)."""
        logits_BC: Tensor = self.scales_C * self.linear(features_BD / self.unit)
        return logits_BC

    def folded(self) -> nn.Linear:
        """Return the plain linear layer that gives the same logits."""
        plain = nn.Linear(self.linear.in_features, self.linear.out_features)
        plain.weight.data = self.linear.weight.data * self.scales_C.detach()[:, None] / self.unit
        plain.bias.data = self.linear.bias.data * self.scales_C.detach()
        return plain


def train_alone(stage_one: nn.Linear, mixture: Mixture, source: Source, recipe: Recipe, seed: int) -> nn.Linear:
    """Train one classifier on epochs that are drawn for it alone."""
    torch.manual_seed(seed)
    classifier, generator = ScaledLinear(stage_one, recipe), torch.Generator().manual_seed(seed)
    teacher = logit_adjusted(stage_one, mixture.gaussians.counts_C, recipe.teacher_tau)
    learnable = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learnable, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    for epoch in range(1, recipe.epochs + 1):
        optimizer.param_groups[0]["lr"] = recipe.rate(epoch)
        alpha = gradual_weight(epoch, recipe.epochs, recipe.distill, recipe.distill_base) if recipe.distill else 0.0
        for features_BD, labels_B in _epoch(mixture, source, recipe, generator):
            logits_BC = classifier(features_BD)
            loss = F.cross_entropy(logits_BC, labels_B)
            if alpha > 0:
                head_B = mixture.support.head_C[labels_B]
                with torch.no_grad():
                    teacher_HC = teacher(features_BD[head_B]).log_softmax(1)
                student_HC = logits_BC[head_B].log_softmax(1)
                divergence = F.kl_div(student_HC, teacher_HC, reduction="sum", log_target=True)
                loss = loss + alpha * divergence / len(labels_B)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return classifier.folded()


def _epoch(mixture: Mixture, source: Source, recipe: Recipe, generator: torch.Generator) -> Batches:
    if source.sampling != "generated":
        return real_epoch(mixture, source.sampling, source.batch_size, generator)
    assert recipe.beta is not None
    return _mixed_epoch(mixture, recipe.beta, source.batch_size, generator)


def _mixed_epoch(
    mixture: Mixture, beta: float, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield real features and those generated at one β, shuffled together, each batch gathered from both."""
    generated = mixture.generated(beta, generator)
    order_N = torch.randperm(len(mixture.labels_N), generator=generator)
    chunks = max(1, -(-int(mixture.targets_C.sum()) // mixture.chunk))
    nothing = (mixture.gaussians.features_ND[:0], mixture.labels_N[:0])
    for real_R in order_N.tensor_split(chunks):
        features_MD, labels_M = next(generated, nothing)
        number = len(labels_M) + len(real_R)
        shuffled = torch.randperm(number, generator=generator)
        for rows_B in shuffled.tensor_split(-(-number // batch_size)):
            new_B, old_B = rows_B[rows_B < len(labels_M)], rows_B[rows_B >= len(labels_M)] - len(labels_M)
            real_BD, real_labels_B = mixture.real(real_R[old_B])
            yield torch.cat([features_MD[new_B], real_BD]), torch.cat([labels_M[new_B], real_labels_B])
        del features_MD  # before the next chunk is made
