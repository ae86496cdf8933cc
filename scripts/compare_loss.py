"""Whether two runs trained alike: the losses of their epochs side by side.

    .venv/bin/python scripts/compare_loss.py runs/before runs/after [--tolerance 0.01]

Each of the two is a run's folder or its metrics.jsonl. Exits with 1 where a loss differs by more than the tolerance, or
where one run has epochs that the other lacks.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

from shards.cli import run_commands
from shards.errors import UserError


def compare(a: Path, b: Path, tolerance: float = 0.01) -> None:
    """Print the losses of two runs and how far they are apart.

    Args:
        a: one run.
        b: the other.
        tolerance: the largest relative difference of a loss that counts as alike.
    """
    ours, theirs = losses(a), losses(b)
    print(f"{'epoch':>5}  {'A':>10}  {'B':>10}  {'apart':>9}")
    for epoch in sorted(ours.keys() & theirs.keys()):
        apart = difference(ours[epoch], theirs[epoch])
        mark = "" if apart <= tolerance else "  <--"  # nan is apart, too
        print(f"{epoch:>5}  {ours[epoch]:>10.6f}  {theirs[epoch]:>10.6f}  {apart:>9.2e}{mark}")
    lacking = sorted(ours.keys() ^ theirs.keys())
    if lacking:
        print(f"only one of them has the epochs {', '.join(map(str, lacking))}")
    if not alike(ours, theirs, tolerance):
        sys.exit(1)
    print(f"alike: no loss differs by more than {tolerance:g} of itself")


def losses(path: Path) -> dict[int, float]:
    """Return a run's losses by epoch."""
    if path.is_dir():
        path = path / "metrics.jsonl"
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines]
        with suppress(ValueError):  # what a kill left of a line is no epoch
            rows.append(json.loads(last))
        found = {int(row["epoch"]): float(row["loss"]) for row in rows}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a run's folder or its metrics.jsonl") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no losses by epoch ({error}); name a run's folder or its metrics.jsonl"
        ) from None
    if not found:
        raise UserError(f"{path} holds no epoch; name a run that was trained in epochs")
    return found


def alike(ours: dict[int, float], theirs: dict[int, float], tolerance: float) -> bool:
    """Return whether both have the same epochs, and losses within the relative tolerance."""
    return ours.keys() == theirs.keys() and all(difference(ours[epoch], theirs[epoch]) <= tolerance for epoch in ours)


def difference(one: float, other: float) -> float:
    """Return the relative difference of two losses."""
    return abs(one - other) / max(abs(one), abs(other), 1e-12)


if __name__ == "__main__":
    run_commands("scripts/compare_loss.py", compare)
