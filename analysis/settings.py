"""Which settings make an experiment, and how titles distinguish several experiments.

Runs are seeds of one experiment where dataset, title, classes and their counts, the split that they were evaluated on
and the resolved configurations agree, apart from what `NOT_THE_RESULT` lists; for a second stage, that of its stage one
counts too. An unknown setting counts.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from analysis.runs import Run
from shards.groups import imbalance_factor

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
_LONGEST_VALUE = 32

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
        replicate: the seed of each stage, and what its images come down to; of a stage one that is gone, its folder's
            name.
        gone: the folder of a stage one that is not beside the run, whose settings are therefore unknown.
    """

    dataset: str
    title: str
    settings: dict[Key, Hashable]
    changed: frozenset[Key] | None
    counts: tuple[int, ...]
    classes: tuple[str, ...]
    evaluated_on: str
    replicate: tuple[Hashable, ...]
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
    """Read off a run's folder, and off that of its stage one where it lies beside it, what experiment it is."""
    settings: dict[Key, Hashable] = {}
    changed: set[Key] | None = set()
    replicate: list[Hashable] = []
    stage, config, origin = run.summary["stage"], _parse(run.config), run.summary["from"]
    seed: Hashable = run.summary["seed"]
    if stage > 1:  # which weights of stage one; none said so before there was a choice
        settings[stage, "from.weights"] = _hashable(run.summary.get("from_weights", "last"))
    folder, gone = run.path.resolve(), None
    while True:
        mine = _flat(config, stage)
        settings |= mine
        replicate.append(seed)
        about = config.get("about")
        if isinstance(about, dict) and about.get("fingerprint") is not None:
            replicate.append(str(about["fingerprint"]))
        named = about.get("changed") if isinstance(about, dict) else None
        if changed is not None and isinstance(named, list):
            changed |= mine.keys() & {(stage, str(name)) for name in named}
        else:
            changed = None
        if origin is None or stage <= 1:
            break
        folder = folder.parent / Path(str(origin)).name
        try:
            config = _parse((folder / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            config = {}
        if not config:
            gone = folder.name
            replicate.append(gone)
            break
        about = config.get("about")
        origin = about.get("from") if isinstance(about, dict) else None
        seed = _hashable(config["loop"].get("seed")) if isinstance(config.get("loop"), dict) else None
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
        gone=gone,
    )


def fingerprint(run: Run) -> str | None:
    """Return what the images that a run was trained on come down to; None where it does not say."""
    about = _parse(run.config).get("about")
    found = about.get("fingerprint") if isinstance(about, dict) else None
    return None if found is None else str(found)


def unknown_stage_ones(runs: Sequence[Run]) -> list[str]:
    """Say which runs are compared without the settings of their stage one."""
    gone = [(run.name, found) for run in runs if (found := experiment(run).gone) is not None]
    return [
        f"{name} was trained on {found}, which is not beside it: the settings of stage one are not compared"
        for name, found in gone
    ]


def _parse(text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, AttributeError):  # the latter of PyYAML's constructors
        return {}
    return config if isinstance(config, dict) else {}


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
    input, method = (part if isinstance(part := config.get(name), dict) else {} for name in ("input", "method"))
    asked = input.get("shift_batch_norm")
    return bool(method.get("classifier") == "mislas" if asked is None else asked)


def _hashable(value: Any) -> Hashable:
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return value if isinstance(value, Hashable) else str(value)


def distinct_titles(experiments: Sequence[Experiment]) -> list[str]:
    """Return a title for each experiment, unlike the others' on its dataset: training's, and what sets it apart.

    Where experiments share a title, the settings in which they differ are appended, such as "BBN, adaptor=linear_decay"
    and "BBN, resnet50". Where a run says which settings are not its preset's, only these are, and these also beside
    experiments of other titles, unless all on the dataset share them.
    """
    titles = [_title(one, experiments, sparing=True) for one in experiments]
    taken = Counter(zip((one.dataset for one in experiments), titles, strict=True))
    titles = [
        title if taken[one.dataset, title] == 1 else _title(one, experiments, sparing=False)
        for title, one in zip(titles, experiments, strict=True)
    ]
    seen: Counter[tuple[str, str]] = Counter()
    for i, one in enumerate(experiments):  # shortened values may look alike
        seen[one.dataset, titles[i]] += 1
        if (count := seen[one.dataset, titles[i]]) > 1:
            titles[i] += f" ({count})"
    return titles


def _title(one: Experiment, experiments: Sequence[Experiment], sparing: bool) -> str:
    parts = [
        _data(one, experiments),
        _stage_one(one, experiments),
        _split(one, experiments),
        *_settings(one, experiments, sparing),
    ]
    said = one.title.split(", ")
    return ", ".join([one.title, *(part for part in parts if part and part not in said)])


def _settings(one: Experiment, experiments: Sequence[Experiment], sparing: bool) -> list[str]:
    """Name the settings that set an experiment apart; sparing leaves out those that it has from its preset."""
    beside = [other for other in experiments if other.dataset == one.dataset]
    differing = _differing([other for other in beside if other.title == one.title])
    if sparing and one.changed is not None:
        apart = {
            key
            for key in one.changed
            # Only experiments that have such a stage at all can share its settings.
            if any(other.settings.get(key) != one.settings[key] for other in beside if _has_stage(other, key[0]))
        }
        chosen = (differing & one.changed) | apart
    else:
        chosen = differing
    names = {key[1] for other in beside for key in other.settings}
    own = max(stage for stage, _ in one.settings) if one.settings else 1
    return [
        ("" if stage == own else "stage-one ") + _setting(name, one.settings[stage, name], names)
        for stage, name in one.settings
        if (stage, name) in chosen
    ]


def _has_stage(one: Experiment, stage: int) -> bool:
    return any(found == stage for found, _ in one.settings)


def _differing(experiments: Sequence[Experiment]) -> set[Key]:
    absent = object()
    differing = set()
    for key in {key for one in experiments for key in one.settings}:
        # Of a stage that is gone nothing is known.
        found = {one.settings.get(key, absent) for one in experiments if _has_stage(one, key[0])}
        if len(found) > 1:
            differing.add(key)
    return differing


def _setting(name: str, value: Hashable, names: set[str]) -> str:
    """Write one setting: "q=0", or "input.size=8" where another section has a setting of that name."""
    text = _value(value)
    if name == "model.backbone":
        return text
    if name == "model.weights":
        text = _value(Path(text).name)  # of a file or a run, not where it lies
    last = name.rsplit(".", 1)[-1]
    alone = sum(other.rsplit(".", 1)[-1] == last for other in names) == 1
    return f"{last if alone else name}={text}"


def _value(value: Hashable) -> str:
    match value:
        case None:
            text = "none"
        case bool():
            text = str(value).lower()
        case float():
            text = format(value, ".12g")
        case tuple():
            text = f"[{', '.join(map(_value, value))}]"
        case _:
            text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST_VALUE else f"…{text[1 - _LONGEST_VALUE :]}"


def _stage_one(one: Experiment, experiments: Sequence[Experiment]) -> str:
    """Say that stage one is gone, where another experiment of the same title has it."""
    beside = [other for other in experiments if (other.dataset, other.title) == (one.dataset, one.title)]
    return "stage one unknown" if one.gone and any(other.gone is None for other in beside) else ""


def _split(one: Experiment, experiments: Sequence[Experiment]) -> str:
    """Say on which split an experiment was evaluated, where those on its dataset differ in that."""
    splits = {other.evaluated_on for other in experiments if other.dataset == one.dataset}
    return f"on {one.evaluated_on}" if len(splits) > 1 else ""


def _data(one: Experiment, experiments: Sequence[Experiment]) -> str:
    """Say what sets the dataset of an experiment apart from those of the same name; empty where there are none."""
    all_counts = list(dict.fromkeys(other.counts for other in experiments if other.dataset == one.dataset))
    if len(all_counts) == 1:
        return ""
    factors = [f"{imbalance_factor(counts):.4g}" for counts in all_counts]
    sums = [sum(counts) for counts in all_counts]
    i = all_counts.index(one.counts)
    if len(set(factors)) == len(factors):
        return f"imbalance factor {factors[i]}"
    if len(set(sums)) == len(sums):
        return f"{sums[i]:,} training images"
    return f"class counts {i + 1}"
