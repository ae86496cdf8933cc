"""β of AFG: fixed, chosen on the held-out split from a grid, or adapted per class from epoch to epoch."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from shards.errors import UserError
from train.features.candidates import Candidate, Families, Judge, setting_of
from train.features.classifiers import measure
from train.features.commands import BETA_START
from train.features.passes import Passes, Source
from train.features.recipes import Recipe, Trained
from train.features.training import train_together

# Adaptive β: how far a step goes, and the bound.
BETA_STEP, BETA_MOST = 0.05, 0.9


def recipes(settings: Any, families: Families, beta: float) -> list[Recipe]:
    """Return AFG at a β and the first rate, with each teacher that is to be tried: the corrected one first."""
    optim = families.optim
    plain = Recipe(
        settings.classifier, optim.epochs, optim.lr, optim.momentum, optim.weight_decay, families.unit, beta=beta
    )
    if settings.distill == 0:
        return [plain]
    tau = 0.0
    if settings.teacher != "stage-one":
        tau = families.judge.best(families.closed("logit adjustment")).setting["tau"]
    taught = replace(plain, distill=settings.distill, distill_base=settings.distill_base, teacher_tau=tau)
    return [taught, plain] if settings.teacher == "select" else [taught]


@dataclass(frozen=True)
class Choice:
    """What became of β.

    Attributes:
        best: AFG.
        own: the same at β = 0, where it was trained.
        tried: balanced accuracy on the held-out split by β, at the chosen rate and teacher.
        on_held_out: whether that split decided.
        note: what has to be said of it, or None.
    """

    best: Candidate
    own: Candidate | None
    tried: dict[str, float]
    on_held_out: bool
    note: str | None = None


def choose_beta(families: Families, settings: Any) -> Choice:
    """Choose rate and teacher at the first β, where all see the same features, and then β.

    Args:
        families: of classifiers, with the judge.
        settings: of the generator.
    """
    judge, source = families.judge, Source("generated", families.optim.batch_size)
    wanted = settings.beta
    if isinstance(wanted, str) and not judge.chooses:
        families.passes.say(
            f"β is {BETA_START}, where the paper's starts, since nothing can choose it; --method.beta sets another"
        )
        wanted = BETA_START
    grid = {"select": settings.beta_grid, "adaptive": [0.0]}[wanted] if isinstance(wanted, str) else [wanted]
    found = families.search(source, {"AFG": recipes(settings, families, grid[0])})["AFG"]
    first = judge.best(found)
    assert first.trained is not None
    recipe = first.trained.recipe
    rest = [beta for beta in grid[1:] if beta != grid[0]]
    if settings.baselines and wanted != "adaptive" and 0.0 not in grid:
        rest.append(0.0)
    at_beta = {grid[0]: first}
    if rest:
        trained = families.passes.train(source, [replace(recipe, beta=beta) for beta in rest])
        at_beta |= {beta: scored(judge, one) for beta, one in zip(rest, trained, strict=True) if one.linear is not None}
    if wanted == "adaptive":
        adaptive = train_adaptive(families.passes, source, recipe, judge)
        note = None
        if adaptive.score[0] < first.score[0]:
            note = (
                f"adaptive β ends below β = 0: {100 * adaptive.score[0]:.1f} % balanced accuracy on val, against"
                f" {100 * first.score[0]:.1f} %; --method.beta select takes the better one"
            )
        return Choice(adaptive, first, {}, on_held_out=True, note=note)
    best = judge.best([at_beta[beta] for beta in grid if beta in at_beta])
    tried = {f"{beta:g}": at_beta[beta].score[0] for beta in grid if beta in at_beta} if judge.chooses else {}
    return Choice(best, at_beta.get(0.0), tried, on_held_out=judge.chooses and len(grid) > 1)


def scored(judge: Judge, one: Trained) -> Candidate:
    """Return a trained classifier with its score."""
    assert one.linear is not None
    return judge.scored(Candidate(setting_of(one.recipe), one.linear, one))


def train_adaptive(passes: Passes, source: Source, recipe: Recipe, judge: Judge) -> Candidate:
    """Train with a β per class, beside a control with β = 0 on the same noise, which it follows after each epoch.

    After the last one it stays, so that β in the end is the one that was trained with.

    Args:
        passes: trains.
        source: generated features.
        recipe: of both, with β = 0.
        judge: its held-out split is looked at after each epoch.
    """
    assert judge.watched is not None
    watched, head_C = judge.watched, passes.mixture.support.head_C
    beta_C = torch.full(head_C.shape, BETA_START, device=head_C.device).masked_fill(head_C, 0)
    stacks, _ = passes.stacks([recipe, replace(recipe, beta=BETA_START)])
    betas = []

    def mean() -> float:
        return round(beta_C[~head_C].mean().item(), 6) if not head_C.all() else 0.0

    def follow(epoch: int) -> None:
        betas.append(mean())
        if epoch == recipe.epochs:
            return
        control, adaptive = (measure(stack.linear(0), watched)[0] for stack in stacks)
        better_C = torch.from_numpy(adaptive.correct_C - control.correct_C).sign().to(beta_C)
        beta_C.add_(BETA_STEP * better_C).clamp_(0, BETA_MOST).masked_fill_(head_C, 0)

    batches, steps = passes.epochs(source, [0.0, beta_C])
    _, (adaptive,) = train_together(
        stacks, batches, steps, "adaptive β and its control", passes.average, follow, passes.silent
    )
    if adaptive.linear is None:
        raise UserError(f"the loss is not finite at optim.lr={recipe.lr:g}; lower optim.lr")
    for row, beta in zip(adaptive.rows, betas, strict=True):
        row["beta"] = beta
    adaptive.beta_C = beta_C
    candidate = scored(judge, adaptive)
    candidate.setting["beta"] = betas[-1]
    return candidate
