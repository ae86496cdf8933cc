"""AFG: a second stage that generates features for the tail and trains the classifier on them.

    tailstream train afg [--from runs/digits-bbn-1] [--method.beta 0.4]

The Adaptive Feature Generator of GLAG (Zhang and Xiang, "Long-Tailed Classification with Gradual Balanced Loss and
Adaptive Feature Generation", section 4.2) on the frozen network of a finished run, the newest one by default:

    bank of real features ──> Gaussian per class, in Tukey space ──> calibrated samples, n_max − n_c per class
              │                                                             │
              └─────────────────> shuffled together, new each epoch  <──────┘
                                      │
                        scales ⊙ (W·f + b), from stage one's W and b
                        loss = CE + α(t)·KL(teacher ‖ now) on head classes

Beside it, on the same features, it trains and prints what is simpler (train/features/candidates.py). Where the val
split has images enough, rates, teacher and β are chosen on it, and so is the classifier that is kept as the selected
model (train/features/selection.py). `--variant paper` has the paper's teacher, and β where the paper's starts.

Figures of its earlier form, which distilled from stage one as it is: analysis/results/glag.md.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from shards.errors import UserError
from shards.groups import MANY_ABOVE
from train.features.commands import BETA_START, RATES, Program, Work, stage_parser
from train.features.launch import run_stage

if TYPE_CHECKING:  # torch comes with the run: see train/engine/launch.py
    from train.features.stage_two import Stage

# For every dataset; a preset may hold further ones.
VARIANTS = {"paper": {"method": {"beta": BETA_START, "teacher": "stage-one", "rates": [1.0]}}}


@dataclass
class Settings:
    """The generator and the classifier. The paper leaves some of these open: the defaults say what is done.

    Attributes:
        beta: β, the trust in what larger classes lend; or select: the value of `beta_grid` that does best on the
            val split (balanced accuracy, then loss); or adaptive: one per class, which starts from the paper's 0.6 and
            after each epoch rises by 0.05, up to 0.9, where the class is recognised better on the val split than with
            β = 0 at that time, and falls where it is worse. Without a val split large enough both are 0.6.
        beta_grid: what select tries; 0 keeps to the class's own Gaussian.
        lam: Tukey's λ; 0 is the logarithm. Features with negative values, as a layer norm leaves them, take 1.
        k: K, the larger classes that a feature borrows from.
        gamma: γ: γ·I is added to the covariance.
        chunk: features generated at a time; each takes 4 bytes per dimension.
        head_above: classes with more training images are head: sampled from their own Gaussian, and distilled.
            Where no class is that large, the largest ones are head.
        classifier: scaled (learnable scales and weights, from stage one's), lws (scales only), or linear (fresh).
        distill: s of α(t) = s·(c^(t/T) − 1), the weight of distillation; 0 switches it off.
        distill_base: c.
        teacher: what is distilled: corrected: stage one less τ·log prior, τ chosen on the val split (1 without one);
            stage-one: stage one as it is, the paper's; select: corrected or nothing, whichever does better on the val
            split.
        rates: factors of optim.lr and reference.lr that the val split chooses from, at the first β; extended while the
            largest or the smallest wins. The first is taken without a val split, and a single one is kept.
        baselines: whether to train and show what AFG is compared with (see `train.features.candidates`).
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
    teacher: Literal["select", "corrected", "stage-one"] = "select"
    rates: list[PositiveFloat] = field(default_factory=lambda: list(RATES))
    baselines: bool = True


def title(settings: Settings, used: float | None = None) -> str:
    """Return what tables call the stage: AFG, and where β, teacher or head are not the default's, how.

    Args:
        settings: of the generator.
        used: β, where the val split did not decide.
    """
    chosen = {"select": "", "adaptive": ", adaptive β"}.get(str(settings.beta), f", β={settings.beta}")
    beta = chosen if used is None else f", β={used:g}"
    teacher = {"select": "", "corrected": ", corrected teacher", "stage-one": ", teacher stage one"}[settings.teacher]
    distillation = ", no distillation" if settings.distill == 0 else teacher
    head = f", head above {settings.head_above}" if settings.head_above != MANY_ABOVE else ""
    return f"AFG{beta}{distillation}{head}"


def _in_title(config: Any) -> list[str]:
    """Return the settings that `title` says."""
    names = ["beta", "teacher", "head_above", *["distill"] * (config.method.distill == 0)]
    return [f"method.{name}" for name in names]


def run(argv: list[str] | None = None) -> None:
    """Run the stage from its command line; exits with 2 for a user's mistake, reported in one line."""
    parser = stage_parser("afg", (__doc__ or "").split("\n")[0], Settings)
    parser.add_argument(
        "--export",
        type=Path | None,
        help="write an epoch's generated features and labels, too: FILE.safetensors, or FILE.npy and FILE.labels.npy",
    )
    run_stage(Program("afg", "AFG", parser, _check, _work, variants=VARIANTS, in_title=_in_title), train, argv)


def _work(config: Any, chooses: bool) -> Work:
    settings = config.method
    teachers = 2 if settings.teacher == "select" and settings.distill else 1
    betas = len(settings.beta_grid) - 1 if settings.beta == "select" else 1
    ours = len(settings.rates) * teachers + betas if chooses else 1
    baselines = 4 * (len(settings.rates) if chooses else 1) if settings.baselines else 0
    return Work(ours + baselines, config.optim.epochs, config.optim.batch_size, generates=True)


def _check(config: Any) -> None:
    if not config.method.beta_grid:
        raise UserError("method.beta_grid is empty; give at least one β, such as [0.0, 0.4]")
    if not config.method.rates:
        raise UserError("method.rates is empty; give at least one factor, such as [1.0]")
    if config.method.distill and config.method.distill_base <= 1:
        raise UserError(
            f"method.distill_base={config.method.distill_base:g} must be above 1, or nothing is distilled;"
            " --method.distill 0 says so"
        )
    if config.export:
        from train.features.files import check_feature_file

        check_feature_file(config.export)


def train(stage: "Stage") -> None:
    """Fit the Gaussians, train the classifiers, and leave a finished run folder."""
    import torch

    from train.features.beta import choose_beta
    from train.features.candidates import table
    from train.features.files import write_features
    from train.features.results import close_stage
    from train.features.sample import write_sample
    from train.features.selection import select
    from train.features.stage_two import make_families

    settings, accelerator, judge = stage.config.method, stage.accelerator, stage.judge
    families = make_families(
        stage,
        lam=settings.lam,
        k=settings.k,
        gamma=settings.gamma,
        chunk=settings.chunk,
        head_above=settings.head_above,
        kind=settings.classifier,
        rates=settings.rates,
    )
    mixture = families.mixture
    accelerator.print(
        f"{len(stage.labels_N):,} features of {stage.features_ND.shape[1]} dimensions,"
        f" {int(mixture.targets_C.sum()):,} to generate each epoch"
    )
    if mixture.gaussians.lam != settings.lam:
        accelerator.print(
            f"features have negative values, where Tukey's λ={settings.lam:g} is not defined: they are taken as they"
            " are (λ=1)"
        )
    choice = choose_beta(families, settings)
    best = choice.best
    if choice.note:
        accelerator.print(choice.note)

    shown, selected, winner, chosen = [], None, None, {}
    if settings.baselines:
        # From simple to complex: the order in which a selection prefers them.
        closed = ("stage one", "logit adjustment", "tau-normalized")
        trained = ("LWS", "cRT", "no generation", "oversampling")
        rivals = {name: judge.best(families.closed(name)) for name in closed}
        rivals |= {name: judge.best(candidates) for name, candidates in families.on_real_features(*trained).items()}
        if choice.own is not None:
            rivals["own Gaussian"] = choice.own
        shown = [{"name": n, "setting": c.setting, **judge.report(c.linear)} for n, c in rivals.items()]
        accelerator.print(table([*shown, {"name": "AFG", "setting": best.setting, **judge.report(best.linear)}]))
        if judge.chooses and judge.watched is not None:
            rivals["AFG"] = best
            names = list(rivals)
            chosen_one = select([one.linear for one in rivals.values()], judge.watched)
            name, one = list(rivals.items())[chosen_one.index]
            winner = one.linear
            selected = {"name": name, "setting": one.setting, "epoch": len(one.trained.rows) if one.trained else 0}
            chosen = {"best": names[chosen_one.best], "rows": chosen_one.rows(names)}
            accelerator.print(
                f"selected on val: {name}, the likeliest within a standard error of the best there ({chosen['best']})"
            )

    def export() -> None:
        alone, rows = replace(mixture, rank=0, world_size=1), int(mixture.targets_C.sum())
        chunks = alone.generated(beta, torch.Generator().manual_seed(stage.config.loop.seed))
        write_features(stage.config.export, chunks, rows, stage.features_ND.shape[1])
        print(f"wrote {rows:,} generated features to {stage.config.export}")

    beta = best.setting["beta"] if best.trained is None or best.trained.beta_C is None else best.trained.beta_C
    if accelerator.is_main_process:
        write_sample(stage.run_folder, mixture, beta, stage.config.loop.seed)
    close_stage(
        stage,
        title(settings, None if choice.on_held_out else best.setting["beta"]),
        best,
        selected,
        winner,
        export=export if stage.config.export else None,
        beta_C=beta.masked_fill(mixture.support.head_C, torch.nan).cpu() if isinstance(beta, torch.Tensor) else None,
        beta={
            "used": best.setting["beta"],
            "tried": choice.tried,
            "selected_on": stage.watched if choice.on_held_out else None,
            "note": choice.note,
        },
        setting=best.setting,
        baselines={"selected_on": stage.watched, "rows": shown},
        selection=chosen or None,
    )


if __name__ == "__main__":
    run()
