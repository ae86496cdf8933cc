"""What a run is configured with, and where each value comes from.

    code defaults  <  preset of the dataset (train/presets)  <  --config FILE  <  --section.key flags

A resumed run takes the `config.yaml` of its folder in the preset's place. The resolved configuration is saved there.
"""

import difflib
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_string_type,
)

from pipeline.kinds import ChosenLoader, Decode, LoaderKind
from shards.cli import at_home, wrong_value
from shards.errors import UserError
from shards.index import Dataset, open_dataset
from train.engine.calls import check_given
from train.engine.model import Model
from train.engine.optimisers import Optim

if TYPE_CHECKING:  # a command line is read without torch, which takes seconds: see train/engine/launch.py
    import torch
    from accelerate import Accelerator

    from pipeline.batch import Loader
    from pipeline.plan import Plan

PRESETS = Path(__file__).parents[1] / "presets"
DATA = Path("data")


Tracker = Literal["none", "tensorboard", "wandb", "mlflow", "trackio"]
Duration: TypeAlias = str
if not TYPE_CHECKING:
    Duration = restricted_string_type("Duration", r"(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", docstring="such as 1h30m")


@dataclass
class Input:
    """What the network sees.

    Attributes:
        image_size: height and width in pixels.
        batch_size: images per stream in the global batch.
        loader: resident (images are decoded once and kept in memory), dali, torch, or auto: resident where the images
            fit, else DALI where it is installed.
        augment: the recipe of the training streams: a crop (none, shift, cifar, imagenet, eval) and what follows it,
            such as imagenet+rand(2,9) or cifar+autoaugment+cutout(16).
        eval_augment: the recipe of evaluation: none (the largest centre square), eval (a centre square of 7/8 of the
            shorter side), or centre(share).
        threads: decoding threads per stream, or the torch loader's worker processes.
        decode: what DALI decodes of an image: the window that is shown, the whole, or auto: the window on a CPU, the
            whole on a GPU, where decoding windows has crashed with some versions of nvImageCodec.
        resident_gb: how many gigabytes decoded images may take in each process; by default a quarter of what is free.
        fault_limit: how many images of a split may fail to decode before the run ends; by default 10, or a thousandth
            of the split if that is more.
        shard_window: how many shards an epoch of the data as it is reads at a time, for storage with slow random
            reads; 0 shuffles over all of them. By default 16 for a remote dataset of which no stream draws with
            replacement, else 0.
    """

    image_size: PositiveInt = 32
    batch_size: PositiveInt = 128
    loader: LoaderKind = "auto"
    augment: str = "cifar"
    eval_augment: str = "none"
    threads: PositiveInt = 2
    decode: Decode = "auto"
    resident_gb: NonNegativeFloat | None = None
    fault_limit: NonNegativeInt | None = None
    shard_window: NonNegativeInt | None = None

    def settle_loader(self, dataset: Dataset, accelerator: "Accelerator", before: ChosenLoader | None = None) -> None:
        """Decide what the loader `auto` is, once for all splits and all processes, and say so.

        Where it can be it is the one `before`, with which a run that is resumed began.
        """
        from accelerate.utils import gather_object

        from pipeline.loader import choose_loader, keep_resident

        if self.loader == "resident":
            keep_resident(dataset.splits.values(), accelerator.device, self.resident_gb)
        if self.loader != "auto":
            return

        def agree(mine: ChosenLoader) -> ChosenLoader:
            return min(gather_object([mine]), key=("torch", "dali", "resident").index)  # what all of them can

        self.loader, why = choose_loader(dataset.splits.values(), accelerator.device, self.resident_gb, agree, before)
        accelerator.print(f"loader: {self.loader} ({why})")
        if before not in (None, self.loader):
            accelerator.print(f"note: the run began with the loader {before}, whose pictures differ by rounding")

    def open_loader(self, plan: "Plan", device: "torch.device", start_step: int = 0) -> "Loader":
        """Open a loader for a plan as configured."""
        from pipeline.loader import open_loader

        return open_loader(
            plan, self.loader, device, self.threads, start_step, self.resident_gb, self.fault_limit, self.decode
        )


@dataclass
class Loop:
    """How the run goes about it.

    Attributes:
        seed: of everything random.
        device: cpu, cuda, or auto (GPUs where there are any).
        precision: no (float32), bf16, fp16, or auto (accelerate's setting).
        threads: CPU threads that each process computes with; by default OMP_NUM_THREADS where it is set, else the cores
            divided among the processes of this machine.
        channels_last: whether pixels are laid out channels last, which most GPUs and CPUs compute faster.
        compile: whether torch.compile makes the network's kernels; the first steps take a minute longer then.
        grad_checkpointing: whether only what the trunk's blocks take is kept for the backward pass, which computes the
            rest again: much less memory for a third more time.
        sync_batch_norm: whether batch norm's statistics are those of all processes' images.
        eval_every: evaluate after every so many epochs, and after the last.
        select: keep the weights of the epoch that did best on the val split, where the dataset has one of at least
            100 images, and a test split beside it.
        checkpoint_every: write a checkpoint after every so many epochs, and after the last.
        checkpoint_steps: also after every so many steps.
        checkpoint_minutes: also after so many minutes without one.
        keep_checkpoints: how many to keep; from two on, a damaged one is skipped for the one before.
        stall_minutes: how long to wait for a batch before the run ends with a message.
        track: where curves can be watched: tensorboard, wandb, mlflow, trackio, or none.
        budget: the longest that the run may take, such as 15m or 1h30m: it lowers optim.epochs, and the schedule with
            them. A resumed run keeps its epochs.
        estimate: whether to say before the first step what the run takes, measured on a few, and to refuse what does
            not fit the memory.
    """

    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    threads: PositiveInt | None = None
    channels_last: bool = True
    compile: bool = False
    grad_checkpointing: bool = False
    sync_batch_norm: bool = False
    eval_every: PositiveInt = 1
    select: bool = True
    checkpoint_every: PositiveInt = 1
    checkpoint_steps: PositiveInt | None = None
    checkpoint_minutes: PositiveFloat = 15.0
    keep_checkpoints: PositiveInt = 2
    stall_minutes: PositiveFloat = 10.0
    track: Tracker = "none"
    budget: Duration | None = None
    estimate: bool = True


@dataclass
class Config:
    """A training run's settings; `method` is the method's own Settings."""

    input: Input
    model: Model
    method: Any
    optim: Optim
    loop: Loop

    def network(self) -> dict[str, Any]:
        """Return what `build_network` takes besides the kind, the classes and the classifier."""
        return {**self.model.network(), "image_size": self.input.image_size}


class _ConfigFile(ActionConfigFile):
    """--config whose errors name the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            super().__call__(parser, cfg, values, option_string)
            check_given(parser, cfg)
        except (ArgumentError, TypeError, ValueError) as error:
            raise TypeError(error if str(values) in str(error) else f"{values}: {error}") from error


class _Parser(ArgumentParser):
    """One whose flags come over its --config, wherever they stand."""

    def parse_args(self, args: Any = None, *arguments: Any, **options: Any) -> Any:
        files, others = split_config(at_home(sys.argv[1:] if args is None else args))
        return super().parse_args(files + others, *arguments, **options)


def split_config(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command line's --config, each with its file, and the other words."""
    files: list[str] = []
    others: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--config":
            files += [word, *islice(left, 1)]
        else:
            (files if word.startswith("--config=") else others).append(word)
    return files, others


def make_parser(program: str, description: str, **sections: type) -> ArgumentParser:
    """Make the parser of a launchable file: what all of them share, and the sections named."""
    parser = _Parser(
        prog=program,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print_config",
    )
    parser.add_argument("--config", action=_ConfigFile, help="a YAML file with any of these settings")
    parser.add_argument("--data", type=str | None, help="the dataset's folder (default: the only one under data/)")
    parser.add_argument("--run", type=str | None, help="the run's folder (default: a new one under runs/)")
    for name, section in sections.items():
        parser.add_class_arguments(section, name)
    return parser


def find_dataset(data: str | None) -> Dataset:
    """Open the dataset that is named, or the only one under data/."""
    if data is not None:
        return open_dataset(data)
    found = sorted(path.parent for path in DATA.glob("*/dataset.json"))
    if len(found) == 1:
        return open_dataset(found[0])
    if not found:
        raise UserError("there is no dataset under data/; build one: tailstream build digits")
    raise UserError(f"several datasets lie under data/; choose one: --data {' | '.join(map(str, found))}")


def find_dataset_of(run: Path, about: dict[str, Any], data: str | None) -> Dataset:
    """Open the dataset that a run was trained on, which may lie elsewhere now: `data` says where."""
    try:
        return find_dataset(data or about["data"])
    except UserError as error:
        if data:
            raise
        raise UserError(f"{error}; {run} was trained on it: if it has moved, name its new place with --data") from None


def preset(dataset: Dataset, *parts: str, variant: str | None = None) -> dict[str, Any]:
    """Return the dataset's preset: the named parts of its file, later ones over earlier ones, as nested dicts.

    Args:
        dataset: whose manifest names the preset.
        parts: such as "training" and then a method's name.
        variant: of the file, such as "2x": each of its parts comes over the file's own.
    """
    name = dataset.manifest["preset"]
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise UserError(f"{dataset.root}/dataset.json names the preset {name!r}; there are: {known}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    variants = content.get("variants", {})
    if variant is not None and variant not in variants:
        known = ", ".join(variants) or "none"
        raise UserError(f"--variant {variant}: the preset {name} has no such variant; it has: {known}")
    merged: dict[str, Any] = {}
    for part in parts:
        for source in (content, variants.get(variant, {})):
            for section, values in source.get(part, {}).items():
                merged[section] = merged.get(section, {}) | values
    return merged


def parse(parser: ArgumentParser, argv: list[str] | None, defaults: dict[str, Any]) -> Namespace:
    """Parse with other defaults, given as a nested dict: {section: {key: value}}."""
    flat = {f"{section}.{key}": value for section, values in defaults.items() for key, value in values.items()}
    before: dict[str, Any] = {}
    try:
        before = {key: parser.get_default(key) for key in flat}
        parser.set_defaults(flat)
        return check_given(parser, parser.parse_args(argv))
    except (ArgumentError, KeyError, TypeError) as error:
        raise _one_line(error, parser) from None
    finally:
        parser.set_defaults(before)  # the next parse may be with others


def peek(parser: ArgumentParser, argv: list[str] | None) -> Namespace:
    """Parse only to learn --data, --run and the like, on which the defaults of the real parse depend."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return parser.parse_args([a for a in arguments if not a.startswith("--print_config")])
    except ArgumentError as error:
        raise _one_line(error, parser) from None


def check_seed(seed: int) -> None:
    """Refuse a seed that not all generators can have."""
    if seed >= 2**32:
        raise UserError(f"loop.seed={seed} must be below 2**32, NumPy's limit")


def changed_settings(
    parser: ArgumentParser, sections: dict[str, Any], defaults: dict[str, Any], spoken: Collection[str] = ()
) -> list[str]:
    """Return the dotted names of the settings that differ from the defaults, by which tables distinguish runs.

    Args:
        parser: that of the run.
        sections: the run's settings, from `plain_sections`.
        defaults: the preset, from `preset`.
        spoken: settings that the title says already.
    """
    usual = plain_sections(parser, parse(parser, [], defaults))
    return [
        f"{section}.{name}"
        for section, values in sections.items()
        for name, value in values.items()
        if value != usual.get(section, {}).get(name) and f"{section}.{name}" not in spoken
    ]


def plain_sections(parser: ArgumentParser, settings: Namespace) -> dict[str, Any]:
    """Return the sections of parsed settings as plain data, ready for YAML."""
    everything = yaml.safe_load(parser.dump(settings, skip_unset=False))
    return {name: value for name, value in everything.items() if isinstance(value, dict)}


def _one_line(error: Exception, parser: ArgumentParser) -> UserError:
    said = " ".join(str(error).split())
    flag = re.search(r"unrecognized arguments: --([\w.-]+)", said)
    key = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", said)  # of a YAML file
    lone = re.search(r"Option '([\w.]+)' is not accepted", said)  # of one, in no section that there is
    unknown = flag[1] if flag else ".".join(key.groups()) if key else lone[1] if lone else None
    near = [f"{'--' * bool(flag)}{name}" for name in _near(unknown, parser)] if unknown else []
    guess = f"; did you mean {' or '.join(near)}?" if near else ""
    if lone and lone[1].startswith("about."):
        guess = "; the section about is what a run says of itself: leave it out"
    if wrong := wrong_value(said):
        said = f"{said[: said.find('Parser key')]}--{wrong[0]} {wrong[1]}"  # behind the name of a file
    return UserError(f"{said}{guess} (--help lists every setting)")


def _near(unknown: str, parser: ArgumentParser) -> list[str]:
    """Return the settings that an unknown one may be meant for: of that name in another section, or spelt alike."""
    wanted = unknown.replace("-", "_")
    by_name: dict[str, list[str]] = {}
    for key in parser.get_defaults().keys():  # noqa: SIM118 (the Namespace iterates over sections)
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    name = wanted.rpartition(".")[2]
    if name in by_name:
        return by_name[name]
    whole = difflib.get_close_matches(wanted, [key for keys in by_name.values() for key in keys], 1, 0.8)
    return whole or [key for close in difflib.get_close_matches(name, by_name, 1, 0.65) for key in by_name[close]]
