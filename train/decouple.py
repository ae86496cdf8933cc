"""Second-stage classifiers, each as a run of its own: the decoupling of representation and classifier.

    accelerate launch train/decouple.py --classifier crt [--from runs/birds-erm-1]

Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition" (ICLR 2020), section 4, and what
came after it, on the frozen network of a finished run:

    crt            a fresh classifier, classes in balance
    lws            learnable weight scaling: W and b frozen, a scale per logit
    tau            rows of W divided by their norm's power τ
    ncm            the nearest class mean, by angle or by distance
    mislas         scales and weights on balanced draws with label-aware smoothing (Zhong et al., CVPR 2021), without
                   its shifted batch norm: features are those of the network as it was trained
    adjusted       stage one less τ·log prior (Menon et al., ICLR 2021)
    oversampling   scales and weights on the real features, every class n_max times
    plain          the same on the real features as they are

Rates, τ and the like are chosen on the val split where it has images enough. The code is that of the table which
train/afg.py prints (train/features/candidates.py). Seconds on a CPU for features of some thousand images.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import PositiveFloat

from shards.errors import UserError
from train.features.commands import RATES, Program, Work, stage_parser
from train.features.launch import run_stage

if TYPE_CHECKING:  # torch comes with the run: see train/engine/launch.py
    from train.features.stage_two import Stage

# What tables call each, and its family of train/features/candidates.py.
TITLES = {
    "crt": ("cRT", "cRT"),
    "lws": ("LWS", "LWS"),
    "tau": ("tau-normalized", "tau-normalized"),
    "ncm": ("NCM", "NCM"),
    "mislas": ("label-aware smoothing", "MiSLAS"),
    "adjusted": ("logit adjustment", "logit adjustment"),
    "oversampling": ("oversampling", "oversampling"),
    "plain": ("no generation", "no generation"),
}
CLOSED = ("tau", "ncm", "adjusted")


@dataclass
class Settings:
    """Which classifier.

    Attributes:
        classifier: see above; `--classifier` for short.
        rates: factors of the learning rate that the val split chooses from; extended while the largest or the smallest
            wins. The first is taken without a val split, and a single one is kept.
    """

    classifier: Literal["crt", "lws", "tau", "ncm", "mislas", "adjusted", "oversampling", "plain"] = "crt"
    rates: list[PositiveFloat] = field(default_factory=lambda: list(RATES))


def run(argv: list[str] | None = None) -> None:
    """Run the stage from its command line; exits with 2 for a user's mistake, told in one line."""
    parser = stage_parser("decouple", (__doc__ or "").split("\n")[0], Settings)
    parser.add_argument("--classifier", type=Literal[tuple(TITLES)] | None, help="short for --method.classifier")
    run_stage(Program("decouple", "a second-stage classifier", parser, _check, _work), train, argv)


def _work(config: Any, chooses: bool) -> Work:
    classifier, reference = config.method.classifier, config.reference
    tried = 0 if classifier in CLOSED else len(config.method.rates) if chooses else 1
    if classifier in ("crt", "lws", "mislas"):
        return Work(tried, reference.lws_epochs if classifier == "lws" else reference.crt_epochs, reference.batch_size)
    return Work(tried, config.optim.epochs, config.optim.batch_size)


def _check(config: Any) -> None:
    if config.classifier:
        config.method.classifier = config.classifier
    if not config.method.rates:
        raise UserError("method.rates is empty; give at least one factor, such as [1.0]")


def train(stage: "Stage") -> None:
    """Make the candidates of the family, choose one, and leave a finished run folder."""
    from train.features.stage_two import close_stage, make_families

    settings = stage.config.method
    title, family = TITLES[settings.classifier]
    families = make_families(stage, rates=settings.rates)
    closed = settings.classifier in CLOSED
    best = stage.judge.best(families.closed(family) if closed else families.on_real_features(family)[family])
    chosen = ", ".join(f"{name} {value}" for name, value in best.setting.items())
    stage.accelerator.print(f"{title}: {chosen}" + (" chosen on val" if stage.watched else ""))
    close_stage(stage, title, best, setting=best.setting, setting_selected_on=stage.watched)


if __name__ == "__main__":
    run()
