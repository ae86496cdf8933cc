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

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis.metrics import summarize
from pipeline.loader import LoaderKind
from shards.errors import UserError, user_errors_exit_2
from shards.groups import MANY_ABOVE
from shards.index import Dataset
from train.engine import runs
from train.engine.config import Input, find_dataset, make_parser, parse, peek, plain_sections, preset
from train.engine.evaluation import collect_faults, device_name, epoch_line, test_split, write_results
from train.engine.launch import make_accelerator
from train.features.bank import feature_bank
from train.features.candidates import Bank, Judge, baselines, table
from train.features.classifiers import ClassifierOptim, Distillation, ScaledLinear, measure, train_classifier
from train.features.files import check_feature_file, write_features
from train.features.gaussians import find_support, fit, head_classes, inverse_tukey, tukey
from train.features.mixing import Batches, Mixture, mixed_epoch
from train.networks.model_files import load_model, save_model

# Adaptive β: where it starts, how far a step goes, and the bound.
BETA_START, BETA_STEP, BETA_MOST = 0.6, 0.05, 0.9


@dataclass
class Extraction:
    """How features are taken; size and recipe of the images are stage one's.

    Attributes:
        batch_size: images at a time.
        loader: dali, torch, or auto.
        threads: decoding threads.
        views: how often each training image is taken with stage one's training recipe; 0: once, as in evaluation.
    """

    views: NonNegativeInt = 0
    batch_size: PositiveInt = 256
    loader: LoaderKind = "auto"
    threads: PositiveInt = 2


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
        gamma: γ, added to the covariance.
        gamma_kind: isotropic (γ·I) or ones (γ in every entry).
        chunk: features generated at a time; each takes 4 bytes per dimension.
        head_above: classes with more training images are head: sampled from their own Gaussian, and distilled.
            Where no class is that large, the largest ones are head.
        space: where the classifier works: feature, or tukey, which wants classifier linear (and whose result is no
            layer of the network: it is stored beside it).
        classifier: scaled (learnable scales and weights, from stage one's), lws (scales only), or linear (fresh).
        distill: s of α(t) = s·(c^(t/T) − 1), the weight of distillation; 0 switches it off.
        distill_base: c.
        baselines: whether to train and show what AFG is held against (see `train.features.candidates`), which takes about as
            long as AFG itself.
    """

    beta: ClosedUnitInterval | Literal["select", "adaptive"] = "select"
    beta_grid: list[ClosedUnitInterval] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8])
    lam: NonNegativeFloat = 0.5
    k: PositiveInt = 2
    gamma: NonNegativeFloat = 0.0
    gamma_kind: Literal["isotropic", "ones"] = "isotropic"
    chunk: PositiveInt = 65536
    head_above: NonNegativeInt = MANY_ABOVE
    space: Literal["feature", "tukey"] = "feature"
    classifier: Literal["scaled", "lws", "linear"] = "scaled"
    distill: NonNegativeFloat = 1.0
    distill_base: PositiveFloat = 2.0
    baselines: bool = True


@dataclass
class Loop:
    """How the run goes about it.

    Attributes:
        seed: of everything random.
        precision: of the feature extraction: no (float32), bf16, fp16, or auto (what accelerate was told).
    """

    seed: NonNegativeInt = 0
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"


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
        total, _ = measure(linear, judge.watched, judge.see)
        recalls_EC.append(torch.from_numpy(total.correct_C / total.total_C.clip(min=1)))
        if control:
            better_C = (recalls_EC[-1] - control.recalls_EC[len(recalls_EC) - 1]).sign().to(beta_C)
            beta_C.add_(BETA_STEP * better_C).clamp_(0, BETA_MOST).masked_fill_(head_C, 0)

    def teacher(features_BD: Tensor) -> Tensor:
        return stage_one(inverse_tukey(features_BD, settings.lam) if settings.space == "tukey" else features_BD)

    linear, rows = train_classifier(
        ScaledLinear(stage_one, settings.classifier, unit_of(mixture)),
        epoch,
        optim,
        Distillation(teacher, head_C, settings.distill, settings.distill_base),
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
            total, _ = measure(result.linear, judge.watched, judge.see)
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
        _run(argv)


def _run(argv: list[str] | None) -> None:
    parser = make_parser(
        "train/afg.py",
        (__doc__ or "").split("\n")[0],
        input=Extraction,
        method=Settings,
        optim=ClassifierOptim,
        loop=Loop,
    )
    parser.add_argument("--from", type=str | None, help="the stage-one run (default: the newest finished one)")
    parser.add_argument(
        "--export",
        type=Path | None,
        help="write an epoch's generated features and labels, too: FILE.safetensors, or FILE.npy and FILE.labels.npy",
    )
    asked = peek(parser, argv)
    named = asked["from"]
    wanted = find_dataset(asked.data).name if asked.data else None
    stage_one = Path(named) if named else runs.newest_run({1}, dataset=wanted)
    saved = runs.read_config(stage_one)
    if not (stage_one / "summary.json").exists():
        raise UserError(f"{stage_one} is not finished; go on with it: train/{saved['about']['method']}.py --resume")
    about = saved["about"]
    dataset = find_dataset(asked.data or about["data"])
    settings = parse(parser, argv, preset(dataset, "afg"))
    chosen = parser.instantiate(settings)
    if chosen.method.space == "tukey" and chosen.method.classifier != "linear":
        raise UserError(
            f"method.space=tukey cannot start from stage one's weights, as method.classifier={chosen.method.classifier}"
            " does; add --method.classifier linear"
        )
    if not chosen.method.beta_grid:
        raise UserError("method.beta_grid is empty; give at least one β, such as [0.0, 0.4]")
    if chosen.export:
        check_feature_file(chosen.export)

    accelerator = make_accelerator(chosen.loop.precision)
    set_seed(chosen.loop.seed)
    network = load_model(stage_one)
    if network.classifier.out_features != len(dataset.classes):
        raise UserError(
            f"{stage_one} was trained for {network.classifier.out_features} classes, and {dataset.root} has"
            f" {len(dataset.classes)}; name the dataset it was trained on with --data"
        )
    folder: list[Path | None] = [None]
    if accelerator.is_main_process:
        folder = [runs.use_run(Path(asked.run), False) if asked.run else runs.new_run(f"{dataset.name}-afg")]
    (run_folder,) = broadcast_object_list(folder)
    if accelerator.is_main_process:
        told = {"method": "afg", "dataset": dataset.name, "data": dataset.place, "from": str(stage_one)}
        runs.write_config(run_folder, {"about": told, **plain_sections(parser, settings)})
    taken = vars(chosen.input)
    views = taken.pop("views")
    shown = {key: saved["input"][key] for key in ("image_size", "augment", "eval_augment")}
    input = Input(**shown, **taken)
    accelerator.print(f"AFG on {stage_one} ({dataset.name}, {len(dataset.classes):,} classes) -> {run_folder}")
    train(chosen, stage_one, network, dataset, input, views, run_folder, accelerator)


def train(
    config: Any,
    stage_one: Path,
    network: Any,
    dataset: Dataset,
    input: Input,
    views: int,
    run_folder: Path,
    accelerator: Accelerator,
) -> None:
    """Take features, train the classifiers, evaluate, and leave a finished run folder."""
    started = time.perf_counter()
    settings, optim, seed = config.method, config.optim, config.loop.seed
    network.to(accelerator.device)
    test, held_out = test_split(dataset), dataset.splits.get("val")
    watched_name = "val" if held_out and test.name != "val" else None

    def bank(split: str) -> Bank:
        return feature_bank(stage_one, network, dataset, split, input, accelerator, views if split == "train" else 0)

    features_ND, labels_N = bank("train")
    gaussians = fit(features_ND, labels_N, num_classes=len(dataset.classes), lam=settings.lam)
    # By images: several views of one make no class larger.
    images_C = torch.from_numpy(dataset.train_counts).to(labels_N.device)
    support = find_support(gaussians, settings.k, head_classes(images_C, settings.head_above))
    mixture = Mixture(
        features_ND,
        labels_N,
        gaussians,
        support,
        gaussians.counts_C.max() - gaussians.counts_C,
        **{key: getattr(settings, key) for key in ("gamma", "gamma_kind", "space", "chunk")},
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    accelerator.print(
        f"{len(labels_N):,} features of {features_ND.shape[1]} dimensions,"
        f" {int(mixture.targets_C.sum()):,} to generate each epoch"
    )
    plain = Judge(bank(watched_name) if watched_name else None, bank(test.name), dataset.train_counts)
    judge = plain if settings.space == "feature" else replace(plain, see=partial(tukey, lam=settings.lam))
    average = partial(accelerator.reduce, reduction="mean") if accelerator.num_processes > 1 else Tensor.clone
    afg = partial(train_afg, network.classifier, mixture, judge, settings, optim, seed=seed, average=average)

    choice = choose_beta(afg, settings, judge, accelerator.print)
    best, used = choice.best, choice.best.rows[-1]["beta"]

    final, _ = measure(best.linear, judge.test, judge.see)
    last = summarize(final, dataset.train_counts)
    shown: list[dict[str, Any]] = []
    if choice.own is not None and settings.baselines:
        ordinary = replace(mixture, space="feature")
        unit = unit_of(ordinary)
        others = baselines(network.classifier, ordinary, plain, optim, settings.classifier, unit, seed, average)
        shown = [{"name": n, "setting": c.setting, **plain.report(c.linear)} for n, c in others]
        shown.insert(2, {"name": "own Gaussian", "setting": {"beta": 0.0}, **judge.report(choice.own.linear)})
        accelerator.print(table([*shown, {"name": "AFG", "setting": {"beta": used}, **last}]))

    first = runs.read_summary(stage_one)
    seconds = time.perf_counter() - started
    summary = {
        "method": "afg",
        "title": f"{first['title']} + {title(settings)}",
        "stage": 2,
        "from": stage_one.resolve().name,
        "dataset": dataset.name,
        "seed": seed,
        "epochs": optim.epochs,
        "last": last,
        "selected": None,
        "selected_on": None,
        "evaluated_on": test.name,
        "beta": {
            "used": used,
            "tried": choice.tried,
            "selected_on": watched_name if choice.on_held_out else None,
        },
        "baselines": {"selected_on": watched_name, "rows": shown},
        "images_per_second": sum(row["images_per_second"] for row in best.rows) / len(best.rows),
        "seconds": seconds,
        "faults": collect_faults(dataset, accelerator),
        "environment": runs.environment(device_name(accelerator.device), accelerator.num_processes),
        "command": runs.command(),
    }
    if accelerator.is_main_process:
        if settings.space == "feature":
            network.classifier = best.linear
            save_model(network, run_folder)
        else:
            save_file(best.linear.state_dict(), run_folder / "classifier.safetensors")
            print(
                f"wrote {run_folder}/classifier.safetensors, for features to the power of λ, and no model.safetensors:"
                " it is no layer of the network"
            )
        for row in best.rows:
            runs.append_row(run_folder, {**row, "seconds": seconds})
        write_results(run_folder, summary, final, dataset)
    if config.export and accelerator.is_main_process:
        alone = replace(mixture, rank=0, world_size=1)
        rows = int(mixture.targets_C.sum())
        chunks = alone.generated(best.beta_C, torch.Generator().manual_seed(seed))
        write_features(config.export, chunks, rows, features_ND.shape[1])
        print(f"wrote {rows:,} generated features to {config.export}")


if __name__ == "__main__":
    run()
