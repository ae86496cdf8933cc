"""What a report says in words: who does best, by how much, and how sure that is."""

from collections.abc import Mapping, Sequence

from analysis.compare import Entry
from analysis.metrics import percent
from analysis.predictions import Interval
from analysis.tables import interval_text
from shards.groups import GROUPS

PLACES = {"many": "head", "medium": "middle", "few": "tail"}
_LEVEL = 0.0005  # differences below it are 0.0 points


def best_entry(entries: Sequence[Entry]) -> Entry:
    """Return the entry that does best, counting every class equally; the first where it is level with that."""

    def figure(entry: Entry) -> float:
        return entry.last.mean["balanced_accuracy"] or 0

    best = max(entries, key=figure)
    return entries[0] if figure(best) - figure(entries[0]) < _LEVEL else best


def headline(entries: Sequence[Entry], split: str, versus: Mapping[str, dict[str, Interval]]) -> str:
    """Compare the best entry of a dataset with the first, as a person would say it.

    Args:
        entries: at least one.
        split: what they were evaluated on.
        versus: intervals of the differences from the first, by title; empty where they are not known.
    """
    entries = [entry for entry in entries if entry.last.mean["balanced_accuracy"] is not None]
    if not entries:
        return f"No {split} images were evaluated."
    first = entries[0]
    if len(entries) == 1:
        return _one(first, split)
    best = best_entry(entries)
    # Where the first is the best, the next is what there is to say something about.
    other = best if best is not first else best_entry(entries[1:])
    after, before = (entry.last.mean["balanced_accuracy"] or 0 for entry in (other, first))
    gain = after - before
    one, two = _averaged(other), _averaged(first)
    if len(entries) > 2:
        verdict = (
            f"{one} does best of {len(entries)} methods"
            if best is not first
            else f"{two} does best of {len(entries)} methods. {one} comes next"
        )
    elif abs(gain) < _LEVEL:
        verdict = f"{one} does as well as {two}"
    else:
        verdict = f"{one} does {'better' if gain > 0 else 'worse'} than {two}"
    against = (
        f"as does {first.title}"
        if abs(gain) < _LEVEL
        else f"{_points(gain)} {'more' if gain > 0 else 'fewer'} than {first.title} with {percent(before)} %"
    )
    sentences = [
        f"{verdict}: counting every class equally, it recognises {percent(after)} % of the {split} images, {against}.",
        _by_group(first, other),
        *_cautions(first, other, gain, versus.get(other.title, {})),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _by_group(first: Entry, other: Entry) -> str:
    """Say what became of tail, middle and head: "It gains 5.0 points in the tail (few), but loses 1.0 in the head"."""
    gained: list[str] = []
    lost: list[str] = []
    level: list[str] = []
    for group in reversed(GROUPS):
        old, new = first.last.mean[group], other.last.mean[group]
        if old is None or new is None:
            continue
        place = f"in the {PLACES[group]} ({group})"
        if abs(new - old) < _LEVEL:
            level.append(place)
        else:
            (gained if new > old else lost).append(f"{_points(new - old)} {place}")
    if not gained and not lost:
        return ""
    parts = [f"{verb} {and_join(of)}" for verb, of in (("gains", gained), ("loses", lost)) if of]
    said = f"It {' and '.join(parts) if len(parts) < 2 else ', but '.join(parts)}"
    return f"{said}, and stays level {and_join(level)}." if level else f"{said}."


def _one(entry: Entry, split: str) -> str:
    figures = entry.last.mean
    parts = [f"{percent(figures[g])} % of the {PLACES[g]} ({g})" for g in GROUPS if figures[g] is not None]
    sentences = [
        f"{_averaged(entry)} recognises {percent(figures['top1'])} % of the {split} images.",
        f"Averaged over classes, it recognises {and_join(parts)}.",
    ]
    if len(entry.replicates) == 1:
        sentences.append("This is a single seed.")
    return " ".join(sentences)


def _cautions(first: Entry, other: Entry, gain: float, versus: dict[str, Interval]) -> list[str]:
    """Say how far the difference of two entries can be relied on."""
    level = abs(gain) < _LEVEL
    if level and not _by_group(first, other):
        return []
    cautions = []
    if not level and (interval := versus.get("balanced_accuracy")) is not None:
        may = (
            "is more than the choice of test images explains"
            if interval.is_clear
            else "may be chance: other test images could reverse it"
        )
        cautions.append(f"The difference {may} ({interval_text(interval)} points, 95 % interval).")
    places = {"top1": "overall", "balanced_accuracy": "counting every class equally"}
    places |= {group: f"in the {place}" for group, place in PLACES.items()}
    unsure = {key: place for key, place in places.items() if _within_spread(first, other, key)}
    if "top1" in unsure:  # often the same figure
        unsure.pop("balanced_accuracy", None)
    if unsure:
        cautions.append(f"The difference {and_join(list(unsure.values()))} is within the spread of the seeds.")
    single = [entry.title for entry in (first, other) if len(entry.replicates) == 1]
    if single:
        whose = f"{and_join(single)} {'have' if len(single) == 2 else 'has'}"
        cautions.append(f"{whose} a single seed, and another may turn out differently: train two more to be sure.")
    return cautions


def _within_spread(first: Entry, other: Entry, key: str) -> bool:
    """Whether two means differ visibly, but by less than the larger of their standard deviations."""
    old, new = first.last.mean[key], other.last.mean[key]
    if old is None or new is None:
        return False
    return _LEVEL <= abs(new - old) < max(entry.last.std[key] or 0 for entry in (first, other))


def seeds_text(entry: Entry) -> str:
    """Say over how many seeds an entry is averaged, and over how many runs where seeds repeat; empty for one."""
    runs, seeds = len(entry.runs), len(entry.replicates)
    if runs == seeds:
        return "" if runs == 1 else f"{seeds} seeds"
    return f"{runs} runs of {'one seed' if seeds == 1 else f'{seeds} seeds'}"


def and_join(parts: Sequence[str]) -> str:
    """Write "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def _averaged(entry: Entry) -> str:
    return entry.title + (f" (mean of {seeds_text(entry)})" if len(entry.runs) > 1 else "")


def _points(difference: float) -> str:
    return f"{abs(100 * difference):.1f} points"
