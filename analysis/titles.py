"""What tables call experiments: the titles that training wrote, with what sets each apart from the others."""

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

from analysis.settings import FROM_WEIGHTS, Experiment, Key
from shards.groups import imbalance_factor

# What a comparison of methods rests on: named where runs differ in it, also where presets chose it, by the machine or
# by what could be downloaded.
_DECISIVE: frozenset[Key] = frozenset(
    [(1, "model.backbone"), (1, "model.weights"), (1, "input.image_size"), (1, "optim.epochs"), (2, FROM_WEIGHTS)]
)
_LONGEST_VALUE = 32


def distinct_titles(experiments: Sequence[Experiment]) -> list[str]:
    """Return a title for each experiment, unlike the others' on its dataset: training's, and what sets it apart.

    Where experiments share a title, the settings in which they differ are appended, such as "BBN, adaptor=linear_decay"
    and "BBN, resnet50". Where a run says which settings are not its preset's, only these are, and these also beside
    experiments of other titles, unless all on the dataset share them. So are the network, its weights and the like
    where presets differ in them.
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
    chosen |= {key for key in _DECISIVE & one.settings.keys() if _presets_differ(key, beside)}
    names = {key[1] for other in beside for key in other.settings}
    own = max(stage for stage, _ in one.settings) if one.settings else 1
    return [
        ("" if stage == own else "stage-one ") + _setting(name, one.settings[stage, name], names)
        for stage, name in one.settings
        if (stage, name) in chosen
    ]


def _presets_differ(key: Key, experiments: Sequence[Experiment]) -> bool:
    """Whether experiments differ in a setting that they were not given."""
    own = [one for one in experiments if key in one.settings and key not in (one.changed or ())]
    return len({one.settings[key] for one in own}) > 1


def _has_stage(one: Experiment, stage: int) -> bool:
    return any(found == stage and name != FROM_WEIGHTS for found, name in one.settings)


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
