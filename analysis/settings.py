"""Which settings make an experiment: what the runs that are its seeds share.

Runs are seeds of one experiment where dataset, title, classes and their counts, the split that they were evaluated on
and the resolved configurations agree, apart from what `NOT_THE_RESULT` lists; for a second stage, that of its stage one
counts too. An unknown setting counts.
"""

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from analysis.runs import Run

# What a run can be set to without becoming another experiment: the seed, where things lie, and how the machine works.
# Whatever else differs, a new setting included, makes another experiment.
NOT_THE_RESULT = frozenset(
    {
        "loop.seed",
        "input.loader",
        "input.threads",
        "input.decode",
        "input.resident_gb",
        "input.fault_limit",
        "loop.device",
        "loop.threads",
        "loop.channels_last",
        "loop.compile",
        "loop.checkpoint_every",
        "loop.checkpoint_steps",
        "loop.checkpoint_minutes",
        "loop.keep_checkpoints",
        "loop.stall_minutes",
        "loop.track",
        "loop.budget",
        "loop.estimate",
        "loop.grad_checkpointing",
        "method.baselines",
        "method.chunk",
    }
)
# Of a second stage only: how many images are passed through the frozen network at a time.
_NOT_THE_RESULT_OF_STAGE_TWO = frozenset({"input.batch_size"})
_SECTIONS_OF_NO_SETTINGS = frozenset({"about"})  # paths, names, and which settings are not the preset's

# Settings that are younger than kept runs, of stage one and of second stages, with the value that says what was done
# before there were any: a run of then and one of now that leaves them alone are the same experiment.
YOUNGER: dict[int, dict[str, Hashable]] = {
    1: {
        "model.adapt": None,
        "model.drop_path": 0.0,
        "optim.optimizer": "sgd",
        "optim.betas": (0.9, 0.999),
        "optim.layer_decay": None,
        "optim.lr_scale_trunk": 1.0,
        "optim.lr_scale_branches": 1.0,
        "optim.lr_scale_classifier": 1.0,
        "optim.freeze": None,
        "optim.warmup_steps": None,
    },
    2: {"input.branch": "both", "input.shift_batch_norm": None},
}

Key = tuple[int, str]  # the stage, and the dotted name of the setting in its configuration

FROM_WEIGHTS = "from.weights"  # those of stage one, which a second stage says in its summary


@dataclass(frozen=True)
class Experiment:
    """What a run shares with its other seeds, and what sets it apart from them.

    Attributes:
        dataset: the dataset's name.
        title: the method's, as training wrote it.
        settings: what can change the result, of each stage; hashable values.
        changed: which of them are not the preset's; None where the run does not say.
        counts: n_j of each class.
        classes: their names.
        evaluated_on: the split that the figures are of.
        replicate: the seed of each stage; of a stage one that is gone, its folder's name.
        images: what those that stage one was trained on come down to; None where no run says.
        gone: the folder of a stage one that is not there, whose settings are therefore unknown.
    """

    dataset: str
    title: str
    settings: dict[Key, Hashable]
    changed: frozenset[Key] | None
    counts: tuple[int, ...]
    classes: tuple[str, ...]
    evaluated_on: str
    replicate: tuple[Hashable, ...]
    images: str | None
    gone: str | None

    @cached_property
    def key(self) -> Hashable:
        """Equal for seeds of one experiment."""
        return (
            self.dataset,
            self.title,
            self.counts,
            self.classes,
            self.evaluated_on,
            frozenset(self.settings.items()),
        )


def experiment(run: Run) -> Experiment:
    """Read off a run's folder, and off that of its stage one where it can be found, what experiment it is."""
    settings: dict[Key, Hashable] = {}
    changed: set[Key] | None = set()
    replicate: list[Hashable] = []
    stage, config, origin = run.summary["stage"], parse_config(run.config), run.summary["from"]
    seed: Hashable = run.summary["seed"]
    if stage > 1:  # which weights of stage one; none said so before there was a choice
        settings[stage, FROM_WEIGHTS] = _hashable(run.summary.get("from_weights", "last"))
    folder, images, gone = run.path.resolve(), None, None
    while True:
        mine, about = _flat(config, stage), _section(config, "about")
        settings |= mine
        replicate.append(seed)
        if about.get("fingerprint") is not None:
            images = str(about["fingerprint"])
        named = about.get("changed")
        if changed is not None and isinstance(named, list):
            changed |= mine.keys() & {(stage, str(name)) for name in named}
        else:
            changed = None
        if origin is None or stage <= 1:
            break
        folder = _found(folder, str(origin), about.get("from"))
        try:
            config = parse_config((folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            config = {}
        if not config:
            gone = folder.name
            replicate.append(gone)
            break
        origin, seed = _section(config, "about").get("from"), _hashable(_section(config, "loop").get("seed"))
        stage -= 1
    return Experiment(
        dataset=run.dataset,
        title=run.title,
        settings=settings,
        changed=None if changed is None else frozenset(changed),
        counts=tuple(run.train_counts_C.tolist()),
        classes=tuple(run.classes),
        evaluated_on=str(run.summary["evaluated_on"]),
        replicate=tuple(replicate),
        images=images,
        gone=gone,
    )


def _found(folder: Path, origin: str, named: object) -> Path:
    """Return where the stage one of a run lies.

    Args:
        folder: the run's.
        origin: the name of stage one's.
        named: what training was given. A whole path comes before a folder of that name beside the run, which may be
            another one; a part of one, which depends on where training was started, after it.
    """
    beside = folder.parent / Path(origin).name
    if not isinstance(named, str) or Path(origin).name != origin:
        return beside
    places = [folder.parent.parent / named, Path(named)]
    # A link may lead elsewhere by now.
    places = [place for place in places if os.path.basename(os.path.realpath(place)) == origin]
    places = [*places, beside] if os.path.isabs(named) else [beside, *places]
    return next((place for place in places if os.path.exists(place / "config.yaml")), beside)


def unknown_stage_ones(runs: Sequence[Run]) -> list[str]:
    """Say which runs are compared without the settings of their stage one."""
    gone = [(run.name, found) for run in runs if (found := experiment(run).gone) is not None]
    return [
        f"{name} was trained on {found}, whose config.yaml cannot be read: the settings of stage one are not compared"
        for name, found in gone
    ]


def parse_config(text: str) -> dict[str, Any]:
    """Return a configuration; empty where it cannot be parsed, or is no mapping."""
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, AttributeError):  # the latter of PyYAML's constructors
        return {}
    return config if isinstance(config, dict) else {}


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    return part if isinstance(part := config.get(name), dict) else {}


def _flat(config: dict[str, Any], stage: int) -> dict[Key, Hashable]:
    """Return a configuration's settings by dotted name, without those that do not change the result."""
    ignored = NOT_THE_RESULT
    if stage > 1 and not _shifts(config):
        ignored |= _NOT_THE_RESULT_OF_STAGE_TWO
    found: dict[Key, Hashable] = {}

    def walk(node: dict[Any, Any], name: str) -> None:
        for key, value in node.items():
            dotted = f"{name}{key}"
            if isinstance(value, dict):
                walk(value, f"{dotted}.")
            elif dotted not in ignored:
                found[stage, dotted] = _hashable(value)

    walk({name: part for name, part in config.items() if isinstance(part, dict)}, "")
    for name, value in YOUNGER.get(stage, {}).items():
        if isinstance(config.get(name.split(".")[0]), dict):
            found.setdefault((stage, name), value)
    return {key: value for key, value in found.items() if key[1].split(".")[0] not in _SECTIONS_OF_NO_SETTINGS}


def _shifts(config: dict[str, Any]) -> bool:
    """Whether a second stage took batch norm's statistics anew, which are those of its batches."""
    asked = _section(config, "input").get("shift_batch_norm")
    return bool(_section(config, "method").get("classifier") == "mislas" if asked is None else asked)


def _hashable(value: Any) -> Hashable:
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return value if isinstance(value, Hashable) else str(value)
