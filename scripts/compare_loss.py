"""Two finished runs' training losses side by side, epoch by epoch.

    .venv/bin/python scripts/compare_loss.py runs/digits-bbn-1 runs/digits-bbn-2 [--tolerance 0.01]

Exits with 1 where the largest difference is above the tolerance, or one run has epochs that the other lacks.
"""

import sys
from pathlib import Path

from jsonargparse.typing import NonNegativeFloat

from analysis.runs import read_run
from shards.cli import run_commands
from shards.errors import UserError


def compare(run_a: Path, run_b: Path, tolerance: NonNegativeFloat = 0.0) -> None:
    """Print the losses and the largest difference.

    Args:
        run_a: a run's folder.
        run_b: another.
        tolerance: how far losses may lie apart, as a share of the larger one; 0 wants the same numbers.
    """
    losses_a, losses_b = ({row["epoch"]: row["loss"] for row in read_run(path).epochs} for path in (run_a, run_b))
    both = sorted(losses_a.keys() & losses_b.keys())
    if not both:
        raise UserError(f"{run_a} and {run_b} have no epoch in common; compare runs that trained")
    apart = {epoch: difference(losses_a[epoch], losses_b[epoch]) for epoch in both}
    print(f"epoch  {run_a.name:>14}  {run_b.name:>14}  difference")
    for epoch in both:
        print(f"{epoch:>5}  {losses_a[epoch]:>14.6f}  {losses_b[epoch]:>14.6f}  {apart[epoch]:>10.2e}")
    worst = max(both, key=lambda epoch: apart[epoch])
    print(f"largest difference: {apart[worst]:.2e}, in epoch {worst}; tolerance {tolerance:g}")
    lonely = sorted(losses_a.keys() ^ losses_b.keys())
    if lonely:
        print(f"in one run only: epochs {', '.join(map(str, lonely))}")
    if lonely or apart[worst] > tolerance:
        sys.exit(1)


def difference(one: float, other: float) -> float:
    """Return how far two losses lie apart, as a share of the larger one."""
    return abs(one - other) / max(abs(one), abs(other)) if one != other else 0.0


if __name__ == "__main__":
    run_commands("scripts/compare_loss.py", compare)
