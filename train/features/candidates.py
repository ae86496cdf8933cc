"""What AFG is held against: other classifiers on the same features, each with its setting chosen on the held-out split.

    stage one           its own classifier
    no generation       AFG's classifier on the real features alone
    own Gaussian        AFG with β = 0: nothing is borrowed
    oversampling        AFG's classifier on real features, every class n_max times
    cRT                 a fresh classifier, classes equally likely, 10 epochs  (Kang et al., ICLR 2020, section 4.1)
    LWS                 learnable weight scaling, likewise, 5 epochs           (section 4.2)
    tau-normalized      rows of W divided by their norm's power τ, no bias     (section 4.2)
    logit adjustment    τ·log prior taken off stage one's logits               (Menon et al., ICLR 2021)

Nothing is distilled in those that are trained, except in own Gaussian, which differs from AFG in β alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from analysis.metrics import percent, summarize
from train.features.classifiers import (
    ClassifierOptim,
    Kind,
    ScaledLinear,
    logit_adjusted,
    measure,
    tau_normalized,
    train_classifier,
)
from train.features.mixing import Mixture, Sampling, real_epoch

Bank = tuple[Tensor, Tensor]
# Factors of optim.lr, and τ: what the held-out split chooses from. The first is taken where there is none.
RATES = (1.0, 0.25, 4.0)
TAUS = (1.0, *(t / 10 for t in range(21) if t != 10))


@dataclass(frozen=True)
class Candidate:
    """A classifier at one value of its setting."""

    setting: dict[str, float]
    linear: nn.Linear


@dataclass(frozen=True)
class Judge:
    """Chooses on the held-out split, and reports on the test split. The two never meet.

    Attributes:
        watched: the held-out split's features and labels, or None.
        test: the test split's.
        train_counts_C: n_j, which decide many, medium and few.
    """

    watched: Bank | None
    test: Bank
    train_counts_C: Any

    def score(self, linear: nn.Linear) -> tuple[float, float]:
        """Return balanced accuracy and minus the loss: small held-out splits tie often, then the loss decides."""
        if self.watched is None:
            return 0.0, 0.0
        total, loss = measure(linear, self.watched)
        return summarize(total, self.train_counts_C)["balanced_accuracy"] or 0.0, -loss

    def best(self, candidates: Iterator[Candidate]) -> Candidate:
        """Return the candidate of the highest score; the first without a held-out split."""
        if self.watched is None:
            return next(candidates)
        return max(candidates, key=lambda candidate: self.score(candidate.linear))

    def report(self, linear: nn.Linear) -> dict[str, float | None]:
        """Return the figures on the test split."""
        return summarize(measure(linear, self.test)[0], self.train_counts_C)


def baselines(
    stage_one: nn.Linear,
    mixture: Mixture,
    judge: Judge,
    optim: ClassifierOptim,
    kind: Kind,
    unit: float,
    seed: int,
    average: Callable[[Tensor], Tensor],
) -> Iterator[tuple[str, Candidate]]:
    """Yield each baseline but own Gaussian, by name, at the setting that the held-out split chose.

    Args:
        stage_one: its classifier.
        mixture: the real features, in stage one's space.
        judge: chooses.
        optim: AFG's; its rate is the middle of what is tried.
        kind: AFG's classifier.
        unit: AFG's unit of length.
        seed: of everything random.
        average: see `train_classifier`.
    """
    share = max(1, optim.batch_size // mixture.world_size)

    def trained(kind: Kind, sampling: Sampling, epochs: int) -> Iterator[Candidate]:
        for rate in RATES:
            tried = replace(optim, lr=optim.lr * rate, epochs=epochs)
            torch.manual_seed(seed)  # of a fresh classifier
            classifier = ScaledLinear(stage_one, kind, unit)
            generator = torch.Generator().manual_seed(seed)
            batches = partial(real_epoch, mixture, sampling, share, generator)
            yield Candidate({"lr": tried.lr}, train_classifier(classifier, batches, tried, average=average)[0])

    counts_C = mixture.gaussians.counts_C
    yield "stage one", Candidate({}, stage_one)
    yield "no generation", judge.best(trained(kind, "each-once", optim.epochs))
    yield "oversampling", judge.best(trained(kind, "oversampled", optim.epochs))
    yield "cRT", judge.best(trained("linear", "class-balanced", 10))
    yield "LWS", judge.best(trained("lws", "class-balanced", 5))
    yield "tau-normalized", judge.best(Candidate({"tau": t}, tau_normalized(stage_one, t)) for t in TAUS)
    yield "logit adjustment", judge.best(Candidate({"tau": t}, logit_adjusted(stage_one, counts_C, t)) for t in TAUS)


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows of `name`, `setting` and figures as aligned text, in percent."""
    columns = ("top1", "balanced_accuracy", "many", "medium", "few")
    cells = [["classifier", "chosen", "overall", "balanced", *columns[2:]]]
    for row in rows:
        chosen = ", ".join(f"{name} {value:g}" for name, value in row["setting"].items())
        cells.append([row["name"], chosen, *(percent(row[column]) for column in columns)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = []
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]))
    return "\n".join(lines)
