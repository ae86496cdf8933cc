"""Training linear classifiers that see the same features together, in one pass over them.

    features of a step ──┬── view 0 (real features, or β = 0) ──> Stack: K classifiers side by side
    (one noise for all)  ├── view 1 (β = 0.2) ─────────────────> Stack
                         └── …                                   one product forward, one backward per stack

A comparison of such classifiers is paired: they differ in their recipes, and in nothing that is drawn. And it is
cheaper: features are generated once, and a product over K classifiers takes less than K products.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from train.engine.objectives import gradual_weight
from train.engine.weights import class_weights, make_weighting
from train.features.classifiers import logit_adjusted
from train.features.recipes import Recipe, Trained

# Of an epoch's batches: the features of every view, one after the other, perhaps in the same memory; and the labels.
Views = Iterator[tuple[Iterable[Tensor], Tensor]]
# Numbers that the stacks of one pass may hold: weights, momentum and gradients of its classifiers. A bound on memory.
PASS_VALUES = 2**27


@dataclass
class Lesson:
    """What teachers say of a step's samples of head classes: alike in every view, since these borrow nothing.

    Attributes:
        head_H: the rows of these samples.
        likely_HC: by a teacher's τ, its probabilities.
        entropy: by τ, Σ p·log p over all of them.
    """

    head_H: Tensor
    likely_HC: dict[float, Tensor] = field(default_factory=dict)
    entropy: dict[float, Tensor] = field(default_factory=dict)


class Stack:
    """Classifiers side by side on one view of the features, their logits (B, K, C) from one product.

    Gradients are written out: they are few, and autograd would keep every step's tensors for each classifier.
    """

    def __init__(
        self, stage_one: nn.Linear, recipes: Sequence[Recipe], counts_C: Tensor, head_C: Tensor, seed: int
    ) -> None:
        """Start all classifiers.

        Args:
            stage_one: where scaled and lws start, and the teacher.
            recipes: at least one; all of one momentum, and all lws or none: lws shares one frozen W.
            counts_C: training images per class, for priors.
            head_C: bool, the classes whose samples are distilled.
            seed: of fresh classifiers.
        """
        assert len({(recipe.momentum, recipe.kind == "lws") for recipe in recipes}) == 1, recipes
        # Those that train longest come first, so that those still in training are a prefix.
        self.order = sorted(range(len(recipes)), key=lambda k: -recipes[k].epochs)
        self.recipes = [recipes[k] for k in self.order]
        self._stage_one, self._head_C = stage_one, head_C
        self._frozen = recipes[0].kind == "lws"
        self._scales = any(recipe.kind != "linear" for recipe in recipes)
        device = stage_one.weight.device
        begun = [_start(stage_one, recipe, seed) for recipe in (self.recipes[:1] if self._frozen else self.recipes)]
        weights, biases = zip(*begun, strict=True)
        self.weights_KCD, self.biases_KC = torch.stack(weights), torch.stack(biases)  # K = 1 where they are frozen
        self.scales_KC = torch.ones(len(recipes), len(counts_C), device=device)
        learnt = [self.scales_KC] if self._frozen else [self.scales_KC, self.biases_KC, self.weights_KCD]
        self._moved = [torch.zeros_like(part) for part in learnt]

        def column(values: Iterable[float]) -> Tensor:
            return torch.tensor(list(values), device=device)[:, None]

        self._decays_K1 = column(recipe.weight_decay for recipe in self.recipes)
        self._shares_K1 = column(recipe.weight_rate for recipe in self.recipes)
        self._scaled_K1 = column(float(recipe.kind != "linear") for recipe in self.recipes)
        self._teachers = {
            tau: logit_adjusted(stage_one, counts_C, tau)
            for tau in {recipe.teacher_tau for recipe in self.recipes if recipe.distill > 0}
        }
        self._smoothing_KC = torch.stack([_smoothing(recipe.smoothing, counts_C) for recipe in self.recipes]).to(device)
        self._smooths = bool(self._smoothing_KC.any())
        self._weights_KC = torch.stack([_weights(recipe.weights, counts_C) for recipe in self.recipes]).to(device)
        self._weighs = any(recipe.weights != "none" for recipe in self.recipes)
        self._rows: list[list[dict[str, Any]]] = [[] for _ in self.recipes]
        self._step = 0

    def begin_epoch(self, epoch: int) -> None:
        """Set rates and the weight of distillation."""
        self._epoch = epoch
        self._active = sum(recipe.epochs >= epoch for recipe in self.recipes)
        active = self.recipes[: self._active]
        device = self.scales_KC.device
        self._rates = [recipe.rate(epoch) for recipe in active]
        self._rates_K1 = torch.tensor(self._rates, device=device)[:, None]
        self._alphas = [
            gradual_weight(epoch, r.epochs, r.distill, r.distill_base) if r.distill > 0 else 0.0 for r in active
        ]
        self._loss_K, self._mass_K = torch.zeros((2, self._active), device=device)
        self._seen = 0
        self._started = time.perf_counter()

    @torch.no_grad()
    def step(
        self,
        features_BD: Tensor,
        labels_B: Tensor,
        average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        lesson: Lesson | None = None,
    ) -> Lesson | None:
        """Take one step of SGD with every classifier that is still in training.

        Args:
            features_BD: the features.
            labels_B: their classes.
            average: gives the mean of a tensor over all ranks.
            lesson: what a stack on another view of the same step returned.

        Returns:
            What teachers say, for stacks on other views; None where nothing is distilled.
        """
        k, (batch, classes) = self._active, (len(labels_B), self.scales_KC.shape[1])
        if not k:
            return lesson
        own = 1 if self._frozen else k  # products that differ
        scales_KC, weights_PD = self.scales_KC[:k], self.weights_KCD[:own].flatten(0, 1)
        raw_BKC = torch.addmm(self.biases_KC[:own].flatten(), features_BD, weights_PD.T).view(batch, own, classes)
        logs_BKC = (raw_BKC * scales_KC if self._scales else raw_BKC).log_softmax(2)
        # Where the true classes lie among all B·K·C numbers.
        true_BK = torch.arange(0, batch * k * classes, classes, device=labels_B.device).view(batch, k)
        true_BK += labels_B[:, None]
        loss_BK = -logs_BKC.take(true_BK)
        if self._smooths:
            epsilon_BK = self._smoothing_KC[:k].T[labels_B]
            loss_BK = (1 - epsilon_BK) * loss_BK - epsilon_BK * logs_BKC.mean(2)
        if self._weighs:
            weights_BK = self._weights_KC[:k].T[labels_B]
            loss_BK *= weights_BK
            self._mass_K += weights_BK.sum(0)
        else:
            self._mass_K += batch
        self._loss_K += loss_BK.sum(0)
        # From here on the gradient by the logits: what is predicted less what is true, and α times the same of the
        # teacher on head classes.
        if any(self._alphas):
            lesson = self._heard(lesson, features_BD, labels_B)
            errors_BKC = self._distilled(logs_BKC, lesson)
        else:
            errors_BKC = logs_BKC.exp_()
        if self._smooths:
            errors_BKC.put_(true_BK, epsilon_BK - 1, accumulate=True)
            errors_BKC -= epsilon_BK[..., None] / classes
        else:
            errors_BKC.put_(true_BK, errors_BKC.new_full((batch, k), -1.0), accumulate=True)
        mean = 1 / batch
        if self._weighs:
            # All ranks' weights together, so that the mean of the gradients is that of the whole batch.
            errors_BKC *= (weights_BK / average(weights_BK.sum(0)))[..., None]
            mean = 1.0
        momentum, moved_scales_KC = self.recipes[0].momentum, self._moved[0][:k]
        if self._scales:
            moved_scales_KC.mul_(momentum).add_((errors_BKC * raw_BKC).sum(0), alpha=mean)
        if not self._frozen:
            if self._scales:
                errors_BKC *= scales_KC
            moved_KC, moved_KCD = (part[:k] for part in self._moved[1:])
            moved_KC.mul_(momentum).add_(errors_BKC.sum(0), alpha=mean)
            self._follow(self.biases_KC[:k], moved_KC, self._shares_K1[:k], average)
            moved_PD = moved_KCD.view(weights_PD.shape)
            torch.addmm(moved_PD, errors_BKC.view(batch, -1).T, features_BD, beta=momentum, alpha=mean, out=moved_PD)
            # Before the step the momentum is alike on every rank, so that its mean holds the mean of the gradients.
            moved_PD.copy_(average(moved_PD))
            for i, (recipe, rate) in enumerate(zip(self.recipes[:k], self._rates, strict=True)):
                # ∂/∂W of what sees features in units, carried over to W on plain features: the unit counts twice. The
                # momentum is kept without this factor. One classifier at a time: it stays in the cache.
                gain = recipe.unit**-2
                moved_KCD[i].add_(self.weights_KCD[i], alpha=recipe.weight_decay / gain)
                self.weights_KCD[i].add_(moved_KCD[i], alpha=-rate * recipe.weight_rate * gain)
        if self._scales:
            self._follow(scales_KC, moved_scales_KC, self._scaled_K1[:k], average)
        self._seen, self._step = self._seen + batch, self._step + 1
        return lesson

    def _follow(
        self, values_KC: Tensor, moved_KC: Tensor, shares_K1: Tensor, average: Callable[[Tensor], Tensor]
    ) -> None:
        """Move values by a momentum that has the step's gradient already."""
        k = len(values_KC)
        moved_KC.copy_(average(moved_KC))
        moved_KC += self._decays_K1[:k] * values_KC
        values_KC -= self._rates_K1 * shares_K1 * moved_KC

    def _heard(self, lesson: Lesson | None, features_BD: Tensor, labels_B: Tensor) -> Lesson:
        """Return what this stack's teachers say too."""
        lesson = lesson or Lesson(self._head_C[labels_B].nonzero().flatten())
        for tau, teacher in self._teachers.items():
            if tau not in lesson.likely_HC:
                logs_HC = teacher(features_BD[lesson.head_H]).log_softmax(1)
                lesson.likely_HC[tau] = logs_HC.exp()
                lesson.entropy[tau] = (lesson.likely_HC[tau] * logs_HC).sum()
        return lesson

    def _distilled(self, logs_BKC: Tensor, lesson: Lesson) -> Tensor:
        """Return the softmax, plus α·(softmax − teacher) in rows of head classes; add α·KL(teacher ‖ now) to the loss.

        The divergence is summed over samples of head classes and divided by all B, at temperature 1 (GLAG Eq. 11).
        """
        logs_HKC = logs_BKC[lesson.head_H]
        errors_BKC = logs_BKC.exp_()
        for k, alpha in enumerate(self._alphas):
            if alpha > 0:
                tau, student_HC = self.recipes[k].teacher_tau, logs_HKC[:, k]
                likely_HC = lesson.likely_HC[tau]
                self._loss_K[k] += alpha * (lesson.entropy[tau] - (likely_HC * student_HC).sum())
                errors_BKC[lesson.head_H, k] += alpha * (student_HC.exp() - likely_HC)
        return errors_BKC

    def end_epoch(self, average: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Keep a row of numbers per classifier, alike on every rank: whether a loss is finite decides what follows."""
        self._loss_K, self._mass_K = average(torch.stack([self._loss_K, self._mass_K]))
        seconds = max(1e-9, time.perf_counter() - self._started)
        for k, loss in enumerate((self._loss_K / self._mass_K.clamp(min=1e-12)).tolist()):
            row = {"epoch": self._epoch, "step": self._step, "loss": loss, "lr": self._rates[k]}
            row |= {"distillation": self._alphas[k], "images_per_second": self._seen / seconds}
            if self.recipes[k].beta is not None:
                row["beta"] = self.recipes[k].beta
            self._rows[k].append(row)

    def linear(self, k: int) -> nn.Linear:
        """Return the plain layer that gives the k-th classifier's logits, in the stack's order."""
        classes, dim = self.weights_KCD.shape[1:]
        plain = nn.utils.skip_init(nn.Linear, dim, classes, device=self.scales_KC.device)
        own = 0 if self._frozen else k
        plain.weight.data = self.weights_KCD[own] * self.scales_KC[k, :, None]
        plain.bias.data = self.biases_KC[own] * self.scales_KC[k]
        return plain

    def trained(self) -> list[Trained]:
        """Return the classifiers in the order of the recipes that were given."""
        found: list[Trained | None] = [None] * len(self.recipes)
        for k, place in enumerate(self.order):
            whole = all(math.isfinite(row["loss"]) for row in self._rows[k])
            found[place] = Trained(self.recipes[k], self.linear(k) if whole else None, self._rows[k])
        return [one for one in found if one is not None]


def _start(stage_one: nn.Linear, recipe: Recipe, seed: int) -> tuple[Tensor, Tensor]:
    if recipe.kind != "linear":
        return stage_one.weight.detach().float(), stage_one.bias.detach().float()
    torch.manual_seed(seed)
    fresh = nn.Linear(stage_one.in_features, stage_one.out_features).to(stage_one.weight.device)
    return fresh.weight.detach() / recipe.unit, fresh.bias.detach()


def _weights(weights: str, counts_C: Tensor) -> Tensor:
    """Return w per class, with a mean of 1."""
    weighting = make_weighting(weights)
    return torch.ones(len(counts_C)) if weighting is None else class_weights(weighting, counts_C.cpu().numpy())


def _smoothing(smoothing: tuple[float, float], counts_C: Tensor) -> Tensor:
    """Return ε per class: the concave form of MiSLAS's Eq. 3."""
    largest, smallest = smoothing
    least, most = counts_C.min(), counts_C.max()
    place_C = (counts_C - least) / (most - least).clamp(min=1)
    return smallest + (largest - smallest) * (place_C * math.pi / 2).sin()


def train_together(
    stacks: Sequence[Stack],
    batches: Callable[[], Views],
    steps: int,
    title: str,
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    after_epoch: Callable[[int], None] = lambda epoch: None,
    silent: bool = True,
) -> list[list[Trained]]:
    """Train all classifiers of all stacks in one pass.

    Args:
        stacks: one per view.
        batches: gives an epoch's batches at each call.
        steps: batches of an epoch, for the progress bar.
        title: of the bar.
        average: gives the mean of a tensor over all ranks.
        after_epoch: called with the number of the epoch, from 1.
        silent: no bar.

    Returns:
        Per stack, its classifiers.
    """
    epochs = max(recipe.epochs for stack in stacks for recipe in stack.recipes)
    with tqdm(total=epochs * steps, desc=title, unit="step", leave=False, disable=silent or None) as bar:
        for epoch in range(1, epochs + 1):
            for stack in stacks:
                stack.begin_epoch(epoch)
            for views, labels_B in batches():
                lesson = None
                for stack, features_BD in zip(stacks, views, strict=True):
                    lesson = stack.step(features_BD, labels_B, average, lesson)
                bar.update()
            for stack in stacks:
                stack.end_epoch(average)
            after_epoch(epoch)
    return [stack.trained() for stack in stacks]
