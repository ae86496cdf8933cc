"""AFG: a second stage that generates features for the tail and trains the classifier on them.

    accelerate launch train/afg.py [--from runs/digits-bbn-1] [--method.beta 0.4]

The Adaptive Feature Generator of GLAG (Zhang and Xiang, "Long-Tailed Classification with Gradual Balanced Loss and
Adaptive Feature Generation", section 4.2) on the frozen network of a finished run, the newest one by default:

    bank of real features ──> Gaussian per class, in Tukey space ──> calibrated samples, n_max − n_c per class
              │                                                             │
              └─────────────────> shuffled together, each epoch anew <──────┘
                                      │
                        scales ⊙ (W·f + b), from stage one's W and b
                        loss = CE + α(t)·KL(stage one ‖ now) on head classes

Beside it, on the same features, it trains and prints what is simpler (train/features/candidates.py).

Measured on BBN's digits, three seeds: 94.0 ± 1.1 overall, 87.6 ± 2.6 on few-shot classes, against BBN's 93.6 and 88.5:
136 validation images, all recognised, cannot choose β. CIFAR-10-LT after 20 epochs, three seeds: 60.6 ± 2.6 after CE
(49.0), where oversampling does better, and 61.7 ± 1.3 after GraLoss (60.9): analysis/results/glag.md. Seconds to two
minutes on one core of an AMD EPYC.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from analysis.metrics import summarize
from shards.errors import UserError, user_errors_exit_2
from shards.groups import MANY_ABOVE
from train.engine.evaluation import epoch_line
from train.features.candidates import Judge, baselines, table
from train.features.classifiers import ClassifierOptim, Distillation, ScaledLinear, measure, train_classifier
from train.features.files import check_feature_file, write_features
from train.features.gaussians import find_support, fit, head_classes
from train.features.mixing import Batches, Mixture, mixed_epoch
from train.features.stage_two import Stage, close_stage, open_stage, stage_parser

# Adaptive β: where it starts, how far a step goes, and the bound.
BETA_START, BETA_STEP, BETA_MOST = 0.6, 0.05, 0.9


@dataclass
class Settings:
    """The generator and the classifier. The paper leaves some of these open: the defaults say what is done.

    Attributes:
        beta: β, the trust in what larger classes lend; or select: the value of `beta_grid` that does best on the
            val split (balanced accuracy, then loss); or adaptive: one per class, which starts from the paper's 0.6 and
            after each epoch rises by 0.05, up to 0.9, where the class is recognised better on the val split than with
            β = 0 at that time, and falls where it is worse.
        beta_grid: what select tries; 0 keeps to the class's own Gaussian.
        lam: Tukey's λ; 0 is the logarithm.
        k: K, the larger classes that a feature borrows from.
        gamma: γ: γ·I is added to the covariance.
        chunk: features generated at a time; each takes 4 bytes per dimension.
        head_above: classes with more training images are head: sampled from their own Gaussian, and distilled.
            Where no class is that large, the largest ones are head.
        classifier: scaled (learnable scales and weights, from stage one's), lws (scales only), or linear (fresh).
        distill: s of α(t) = s·(c^(t/T) − 1), the weight of distillation; 0 switches it off.
        distill_base: c.
        baselines: whether to train and show what AFG is compared with (see `train.features.candidates`), which takes
            about as long as AFG itself.
    """

    beta: ClosedUnitInterval | Literal["select", "adaptive"] = "select"
    beta_grid: list[ClosedUnitInterval] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8])
    lam: NonNegativeFloat = 0.5
    k: PositiveInt = 2
    gamma: NonNegativeFloat = 0.0
    chunk: PositiveInt = 65536
    head_above: NonNegativeInt = MANY_ABOVE
    classifier: Literal["scaled", "lws", "linear"] = "scaled"
    distill: NonNegativeFloat = 1.0
    distill_base: PositiveFloat = 2.0
    baselines: bool = True


@dataclass(frozen=True)
class Trained:
    """A classifier trained on generated features.

    Attributes:
        linear: the plain layer.
        beta_C: β at the end; 0 for head classes.
        rows: a row of numbers per epoch; β in it is the mean over the classes that borrow.
        recalls_EC: per epoch, each class's accuracy on the held-out split; empty where it was not asked for.
    """

    linear: nn.Linear
    beta_C: Tensor
    rows: list[dict[str, Any]]
    recalls_EC: list[Tensor]


def train_afg(
    stage_one: nn.Linear,
    mixture: Mixture,
    judge: Judge,
    settings: Settings,
    optim: ClassifierOptim,
    beta: float,
    seed: int,
    control: Trained | None = None,
    record: bool = False,
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Trained:
    """Train a classifier on real and generated features.

    Args:
        stage_one: its classifier, where the new one starts, and the teacher.
        mixture: the features.
        judge: its held-out split is looked at only for adaptive β and where `record` asks for it.
        settings: of the generator and the classifier.
        optim: of the classifier.
        beta: β; with a control only where it starts.
        seed: of everything random.
        control: the same with β = 0, recorded: makes β adaptive.
        record: whether to keep each epoch's recalls.
        average: see `train_classifier`.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of a fresh classifier
    head_C = mixture.support.head_C
    beta_C = torch.full(head_C.shape, float(beta), device=head_C.device).masked_fill(head_C, 0)
    recalls_EC: list[Tensor] = []
    betas_E: list[float] = []

    def epoch() -> Batches:
        betas_E.append(round(beta_C[~head_C].mean().item(), 6) if not head_C.all() else 0.0)
        return mixed_epoch(mixture, beta_C, max(1, optim.batch_size // mixture.world_size), generator)

    def after_epoch(linear: nn.Linear) -> None:
        if judge.watched is None or not (control or record):
            return
        total, _ = measure(linear, judge.watched)
        recalls_EC.append(torch.from_numpy(total.correct_C / total.total_C.clip(min=1)))
        if control:
            better_C = (recalls_EC[-1] - control.recalls_EC[len(recalls_EC) - 1]).sign().to(beta_C)
            beta_C.add_(BETA_STEP * better_C).clamp_(0, BETA_MOST).masked_fill_(head_C, 0)

    linear, rows = train_classifier(
        ScaledLinear(stage_one, settings.classifier, unit_of(mixture)),
        epoch,
        optim,
        Distillation(stage_one, head_C, settings.distill, settings.distill_base),
        after_epoch,
        average,
    )
    rows = [{**row, "beta": beta} for row, beta in zip(rows, betas_E, strict=True)]
    return Trained(linear, beta_C, rows, recalls_EC)


def unit_of(mixture: Mixture) -> float:
    """Return the root mean square length of the real features: the classifier's unit."""
    rows = torch.arange(len(mixture.labels_N), device=mixture.labels_N.device)
    squares = sum(mixture.real(rows_B)[0].square().sum().item() for rows_B in rows.split(16384))
    return max(1e-6, (squares / len(rows)) ** 0.5)


def title(settings: Settings) -> str:
    """Return what tables call the stage: AFG, and where β, distillation or the head are not the default's, how."""
    beta = {"select": "", "adaptive": ", adaptive β"}.get(str(settings.beta), f", β={settings.beta}")
    distillation = ", no distillation" if settings.distill == 0 else ""
    head = f", head above {settings.head_above}" if settings.head_above != MANY_ABOVE else ""
    return f"AFG{beta}{distillation}{head}"


@dataclass(frozen=True)
class Choice:
    """What became of β.

    Attributes:
        best: the classifier at the β that is used.
        own: the one at β = 0, where it was trained.
        tried: balanced accuracy on the held-out split by β.
        on_held_out: whether that split decided.
    """

    best: Trained
    own: Trained | None
    tried: dict[str, float]
    on_held_out: bool


def choose_beta(afg: Callable[..., Trained], settings: Settings, judge: Judge, say: Callable[[str], None]) -> Choice:
    """Train at the given β, at each of the grid, or at an adaptive one beside its control; and at 0 for comparison.

    Args:
        afg: `train_afg` with all but `beta`, `record` and `control` given.
        settings: of the generator.
        judge: its held-out split selects and adapts; without one β is the paper's.
        say: takes the lines that people see.
    """

    def trained(name: str, **options: Any) -> Trained:
        result = afg(**options)
        row = result.rows[-1]
        if judge.watched is not None:
            total, _ = measure(result.linear, judge.watched)
            row["eval"] = {"split": "val", **summarize(total, judge.train_counts_C)}
        say(f"β={name}  " + epoch_line(row, len(result.rows)))
        return result

    wanted = settings.beta
    if isinstance(wanted, str) and judge.watched is None:
        doing = {"select": "select", "adaptive": "adapt"}[wanted]
        say(f"there is no val split to {doing} β on: taking the paper's {BETA_START} (or --method.beta)")
        wanted = BETA_START
    if wanted == "adaptive":
        control = trained("0", beta=0.0, record=True)
        return Choice(trained("adaptive", beta=BETA_START, control=control), control, {}, on_held_out=True)
    grid = settings.beta_grid if wanted == "select" else [wanted]
    at_beta = {beta: trained(f"{beta:g}", beta=beta) for beta in grid}
    scores = {beta: judge.score(result.linear) for beta, result in at_beta.items()}
    own = at_beta.get(0.0) or (trained("0", beta=0.0) if settings.baselines else None)
    return Choice(
        at_beta[max(scores, key=lambda beta: scores[beta])],
        own,
        {} if judge.watched is None else {f"{beta:g}": accuracy for beta, (accuracy, _) in scores.items()},
        on_held_out=len(grid) > 1,
    )


def run(argv: list[str] | None = None) -> None:
    """Run the stage from its command line; exits with 2 for a user's mistake, told in one line."""
    with user_errors_exit_2("train/afg.py"):
        parser = stage_parser("afg", (__doc__ or "").split("\n")[0], Settings)
        parser.add_argument(
            "--export",
            type=Path | None,
            help="write an epoch's generated features and labels, too: FILE.safetensors, or FILE.npy and"
            " FILE.labels.npy",
        )
        train(open_stage("afg", "AFG", parser, argv, _check))


def _check(config: Any) -> None:
    if not config.method.beta_grid:
        raise UserError("method.beta_grid is empty; give at least one β, such as [0.0, 0.4]")
    if config.export:
        check_feature_file(config.export)


def train(stage: Stage) -> None:
    """Fit the Gaussians, train the classifiers, and leave a finished run folder."""
    settings, optim, seed, accelerator = (
        stage.config.method,
        stage.config.optim,
        stage.config.loop.seed,
        stage.accelerator,
    )
    stage_one, judge = stage.network.classifier, stage.judge
    gaussians = fit(stage.features_ND, stage.labels_N, num_classes=len(stage.dataset.classes), lam=settings.lam)
    # By images: several views of one make no class larger.
    images_C = torch.from_numpy(stage.dataset.train_counts).to(stage.labels_N.device)
    support = find_support(gaussians, settings.k, head_classes(images_C, settings.head_above))
    mixture = Mixture(
        stage.features_ND,
        stage.labels_N,
        gaussians,
        support,
        gaussians.counts_C.max() - gaussians.counts_C,
        gamma=settings.gamma,
        chunk=settings.chunk,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    accelerator.print(
        f"{len(stage.labels_N):,} features of {stage.features_ND.shape[1]} dimensions,"
        f" {int(mixture.targets_C.sum()):,} to generate each epoch"
    )
    afg = partial(train_afg, stage_one, mixture, judge, settings, optim, seed=seed, average=stage.average)
    choice = choose_beta(afg, settings, judge, accelerator.print)
    best, used = choice.best, choice.best.rows[-1]["beta"]

    shown: list[dict[str, Any]] = []
    if choice.own is not None and settings.baselines:
        unit = unit_of(mixture)
        others = baselines(stage_one, mixture, judge, optim, settings.classifier, unit, seed, stage.average)
        shown = [{"name": n, "setting": c.setting, **judge.report(c.linear)} for n, c in others]
        shown.insert(2, {"name": "own Gaussian", "setting": {"beta": 0.0}, **judge.report(choice.own.linear)})
        accelerator.print(table([*shown, {"name": "AFG", "setting": {"beta": used}, **judge.report(best.linear)}]))
    close_stage(
        stage,
        title(settings),
        best.linear,
        best.rows,
        beta={"used": used, "tried": choice.tried, "selected_on": stage.watched if choice.on_held_out else None},
        baselines={"selected_on": stage.watched, "rows": shown},
    )
    if stage.config.export and accelerator.is_main_process:
        alone = replace(mixture, rank=0, world_size=1)
        rows = int(mixture.targets_C.sum())
        chunks = alone.generated(best.beta_C, torch.Generator().manual_seed(seed))
        write_features(stage.config.export, chunks, rows, stage.features_ND.shape[1])
        print(f"wrote {rows:,} generated features to {stage.config.export}")


if __name__ == "__main__":
    run()
