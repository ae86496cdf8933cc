"""The settings of second stages: what all of them share, presets and variants."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.kinds import Decode, LoaderKind
from shards.cli import program_name
from shards.errors import UserError
from shards.index import Dataset
from train.engine.config import make_parser, preset

STALL_MINUTES = 10.0  # as in training
# Factors of a learning rate that the held-out split chooses from. The first is taken where nothing chooses.
RATES = (1.0, 0.25, 4.0)
# ε of the largest and of the smallest class that the held-out split chooses from, for MiSLAS.
SMOOTHINGS = ((0.3, 0.0), (0.1, 0.0), (0.4, 0.1))
# AFG's β in its paper, where the adaptive one starts.
BETA_START = 0.6


@dataclass
class Extraction:
    """How features are taken; size and recipe of the images are stage one's.

    Attributes:
        batch_size: images at a time.
        loader: resident, dali, torch, or auto.
        threads: decoding threads.
        views: how often each training image is taken with stage one's training recipe; 0: once, as in evaluation.
        branch: of a bilateral network: both, or the features of one alone, conventional or rebalancing (BBN, Table 5).
        shift_batch_norm: whether batch norm's running statistics are first taken again, from classes in balance
            (train/features/shift.py); by default for mislas, whose authors do so on CIFAR-100 and ImageNet-LT.
        decode: what DALI decodes of an image: window, whole or auto; by default as in stage one.
        resident_gb: how many gigabytes decoded images may take in each process; by default as in stage one.
        fault_limit: how many images of a split may fail to decode before the run ends; by default as in stage one.
    """

    views: NonNegativeInt = 0
    batch_size: PositiveInt = 256
    loader: LoaderKind = "auto"
    threads: PositiveInt = 2
    branch: Literal["both", "conventional", "rebalancing"] = "both"
    shift_batch_norm: bool | None = None
    decode: Decode | None = None
    resident_gb: NonNegativeFloat | None = None
    fault_limit: NonNegativeInt | None = None


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


@dataclass
class ReferenceOptim:
    """cRT and LWS as their reference trains them (Kang et al., ICLR 2020): a cosine whose last epoch has rate 0.

    Attributes:
        crt_epochs: epochs of cRT; each holds n_max draws of every class.
        lws_epochs: epochs of LWS.
        batch_size: features per step, over all processes.
        lr: the learning rate, on features as they are; the held-out split may choose another.
        momentum: of SGD.
        weight_decay: L2.
    """

    crt_epochs: PositiveInt = 10
    lws_epochs: PositiveInt = 5
    batch_size: PositiveInt = 512
    lr: PositiveFloat = 0.2
    momentum: ClosedUnitInterval = 0.9
    weight_decay: NonNegativeFloat = 5e-4


@dataclass
class Loop:
    """How the run goes about it.

    Attributes:
        seed: of everything random but the views, which all seeds share.
        device: cpu, cuda, or auto (GPUs where there are any).
        precision: of the feature extraction: no (float32), bf16, fp16, or auto (as accelerate is configured).
        threads: CPU threads that each process computes with; by default OMP_NUM_THREADS where it is set, else the cores
            divided among the processes of this machine.
        stall_minutes: how long to wait for a batch of images before the run ends with a message.
    """

    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    threads: PositiveInt | None = None
    stall_minutes: PositiveFloat = STALL_MINUTES


def stage_parser(name: str, description: str, settings: type) -> ArgumentParser:
    """Make the parser of a second stage; `settings` is its own section, `method`."""
    parser = make_parser(
        program_name(f"train/{name}.py", f"train {name}"),
        description,
        input=Extraction,
        method=settings,
        optim=ClassifierOptim,
        reference=ReferenceOptim,
        loop=Loop,
    )
    parser.add_argument("--from", type=str | None, help="the stage-one run (default: the newest finished one)")
    parser.add_argument(
        "--weights",
        type=Literal["last", "selected"] | None,
        help="of that run (default: those of the epoch that val chose, where it chose one)",
    )
    parser.add_argument("--resume", action="store_true", help="resume --run, or the newest unfinished run")
    parser.add_argument("--variant", type=str | None, help="of the settings, such as paper")
    parser.add_argument("--dry-run", action="store_true", help="say what the stage takes, write nothing, and end")
    return parser


class Work(NamedTuple):
    """So many classifiers, as far as that is known beforehand, and the epochs and the batch of the longest.

    An epoch holds every class as often as the largest one, unless it is each feature once. What generates features
    holds a float32 copy of the real ones.
    """

    classifiers: int
    epochs: int
    batch_size: int
    each_once: bool = False
    generates: bool = False


@dataclass
class Program:
    """A launchable second stage.

    Attributes:
        name: the launchable file's name.
        title: what the first line calls the stage.
        parser: from `stage_parser`.
        check: raises UserError for settings that cannot be used together, before anything is made.
        work: what the settings make it train, where the val split chooses among classifiers or not.
        shifts: whether batch norm is shifted where the settings leave it open.
        in_title: the settings that the run's title already says, such as method.beta.
        variants: settings by the name of a variant, for every dataset: {variant: {section: {key: value}}}.
    """

    name: str
    title: str
    parser: ArgumentParser
    check: Callable[[Any], None] = lambda config: None
    work: Callable[[Any, bool], Work] = lambda config, chooses: Work(1, config.optim.epochs, config.optim.batch_size)
    variants: Mapping[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    shifts: Callable[[Any], bool] = lambda config: False
    in_title: Callable[[Any], Collection[str]] = lambda config: ()


def defaults(program: Program, dataset: Dataset, variant: str | None) -> dict[str, Any]:
    """Return the dataset's preset for second stages, with a variant of the program's own over it, or of the preset."""
    own = program.variants.get(variant or "")
    try:
        merged = preset(dataset, "second_stage", program.name, variant=None if own else variant)
    except UserError as error:
        known = ", ".join(program.variants)
        raise UserError(f"{error}; for every dataset there is: {known}" if variant and known else str(error)) from None
    if variant and not own and merged == preset(dataset, "second_stage", program.name):
        raise UserError(f"--variant {variant} changes nothing of train/{program.name}.py here; leave it out")
    for section, values in (own or {}).items():
        merged[section] = merged.get(section, {}) | values
    return merged


def check_resumed(run: Path, asked: Any, about: dict[str, Any]) -> None:
    """Refuse to resume a run from something else than it began with; stage one's folder may have moved.

    Raises:
        UserError: --from, --weights or --variant differ.
    """
    if asked.variant not in (None, about.get("variant")):
        raise UserError(f"--variant {asked.variant} comes too late for {run}, which has its settings; leave it out")
    for key in ("from", "weights"):
        begun, given = about.get(key), asked[key]
        same = begun is None or given is None or given == begun
        if not same and key == "from":
            same = Path(given).resolve() == Path(str(begun)).resolve() or not Path(str(begun)).exists()
        if not same:
            raise UserError(f"{run} began with --{key} {begun}, not {given}; leave --{key} out, or begin another run")
