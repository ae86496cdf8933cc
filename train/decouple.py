"""Second-stage classifiers, each as a run of its own: the decoupling of representation and classifier.

    tailstream train decouple --classifier crt [--from runs/birds-erm-1]

Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition" (ICLR 2020), section 4, and what
came after it, on the frozen network of a finished run:

    crt            a fresh classifier, classes in balance
    lws            learnable weight scaling: W and b frozen, a scale per logit
    tau            rows of W divided by their norm's power τ
    ncm            the nearest class mean, by angle or by distance
    mislas         scales and weights on balanced draws with label-aware smoothing, after batch norm was shifted
                   (Zhong et al., CVPR 2021; train/features/shift.py, --input.shift_batch_norm false for without)
    adjusted       stage one less τ·log prior (Menon et al., ICLR 2021)
    oversampling   scales and weights on the real features, every class n_max times
    plain          the same on the real features as they are

The first two and mislas also on the data as it is (--method.q 1), with class weights or without: how BBN's Figure 2
re-trains classifiers. --input.branch conventional takes one branch of a BBN run (its Table 5).

Rates, τ and the like are chosen on the val split where it has images enough. The code is that of the table which
train/afg.py prints (train/features/candidates.py). Seconds on a CPU for features of some thousand images.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import PositiveFloat

from shards.errors import UserError
from train.features.commands import RATES, SMOOTHINGS, Program, Work, stage_parser
from train.features.launch import run_stage

if TYPE_CHECKING:  # torch comes with the run: see train/engine/launch.py
    from train.features.stage_two import Stage

# What tables call each, and its family of train/features/candidates.py.
TITLES = {
    "crt": ("cRT", "cRT"),
    "lws": ("LWS", "LWS"),
    "tau": ("tau-normalized", "tau-normalized"),
    "ncm": ("NCM", "NCM"),
    "mislas": ("MiSLAS", "MiSLAS"),
    "adjusted": ("logit adjustment", "logit adjustment"),
    "oversampling": ("oversampling", "oversampling"),
    "plain": ("no generation", "no generation"),
}
CLOSED = ("tau", "ncm", "adjusted")
# What `title_of` says, beside the classifier.
IN_TITLE = ("method.classifier", "method.q", "method.weights", "input.branch", "input.shift_batch_norm")
# Those whose sampler and class weights can be chosen.
MANNERS = ("crt", "lws", "mislas")


@dataclass
class Settings:
    """Which classifier.

    Attributes:
        classifier: see above; `--classifier` for short.
        q: the sampler of crt, lws and mislas: 0, classes in balance; or 1, the data as it is, passed over until as many
            images are seen.
        weights: of classes in the loss of these three: none, inverse (of their images) or effective (number of
            samples), such as "effective(beta=0.999)".
        rates: factors of the learning rate that the val split chooses from; extended while the largest or the smallest
            wins. The first is taken without a val split, and a single one is kept.
    """

    classifier: Literal["crt", "lws", "tau", "ncm", "mislas", "adjusted", "oversampling", "plain"] = "crt"
    q: Literal[0, 1] = 0
    weights: str = "none"
    rates: list[PositiveFloat] = field(default_factory=lambda: list(RATES))


def program() -> Program:
    """Return the launchable file's parser and checks."""
    parser = stage_parser("decouple", (__doc__ or "").split("\n")[0], Settings)
    parser.add_argument("--classifier", type=Literal[tuple(TITLES)] | None, help="short for --method.classifier")
    return Program(
        "decouple", "a second-stage classifier", parser, _check, _work, shifts=_shifts, in_title=lambda config: IN_TITLE
    )


def run(argv: list[str] | None = None) -> None:
    """Run the stage from its command line; exits with 2 for a user's mistake, reported in one line."""
    run_stage(program(), train, in_full(sys.argv[1:] if argv is None else argv))


def in_full(words: Sequence[str]) -> list[str]:
    """Return a command line with --classifier written out, so that the run's configuration has it."""
    return [re.sub(r"^--classifier(?==|$)", "--method.classifier", word) for word in words]


def _work(config: Any, chooses: bool) -> Work:
    classifier, reference = config.method.classifier, config.reference
    tried = 0 if classifier in CLOSED else len(config.method.rates) if chooses else 1
    if classifier == "mislas" and chooses:
        tried *= len(SMOOTHINGS)
    if classifier in ("crt", "lws", "mislas"):
        return Work(tried, reference.lws_epochs if classifier == "lws" else reference.crt_epochs, reference.batch_size)
    return Work(tried, config.optim.epochs, config.optim.batch_size, each_once=classifier == "plain")


def _shifts(config: Any) -> bool:
    return bool(config.method.classifier == "mislas")


def _check(config: Any) -> None:
    if config.classifier:  # --classifier has become --method.classifier, so that a file says it
        raise UserError(
            f"classifier={config.classifier} belongs in the section method; write method: {{classifier:"
            f" {config.classifier}}}"
        )
    if not config.method.rates:
        raise UserError("method.rates is empty; give at least one factor, such as [1.0]")
    from train.engine.weights import make_weighting

    weighting = make_weighting(config.method.weights)
    if config.method.classifier not in MANNERS and (config.method.q or weighting):
        named = "method.q=1" if config.method.q else f"method.weights={config.method.weights}"
        raise UserError(
            f"{named} is for classifier crt, lws or mislas, and it is {config.method.classifier}; leave one of them out"
        )


def title_of(settings: Settings, input: Any) -> str:
    """Return what tables say of settings that are not the classifier's usual ones."""
    from train.engine.calls import unusual
    from train.engine.weights import make_weighting

    said = [f"q={settings.q}"] * (settings.q != 0)
    if weighting := make_weighting(settings.weights):
        said += [weighting.title, *unusual(weighting)]
    if input.branch != "both":
        said.append(f"{input.branch} branch")
    shifts = {None: [], True: ["shifted batch norm"], False: ["batch norm as it is"]}[input.shift_batch_norm]
    return "".join(f", {one}" for one in said + shifts)


def train(stage: "Stage") -> None:
    """Make the candidates of the family, choose one, and leave a finished run folder."""
    from train.features.results import close_stage
    from train.features.stage_two import make_families

    settings = stage.config.method
    title, family = TITLES[settings.classifier]
    families = make_families(stage, rates=settings.rates, q=settings.q, weights=settings.weights, generates=False)
    closed = settings.classifier in CLOSED
    tried = None if closed else families.on_real_features(family)[family]
    best = stage.judge.best(families.closed(family) if tried is None else tried)
    chose = stage.watched if tried is None or len(tried) > 1 else None  # a single one is not chosen
    title += title_of(settings, stage.config.input)
    chosen = ", ".join(f"{name} {value}" for name, value in best.setting.items())
    stage.accelerator.print(f"{title}: {chosen}" + (" chosen on val" if chose else ""))
    close_stage(stage, title, best, setting=best.setting, setting_selected_on=chose)


if __name__ == "__main__":
    run()
