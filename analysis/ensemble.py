"""Several runs as one classifier: the mean of their probabilities (BBN's supplement, Table 6)."""

from collections.abc import Sequence

import numpy as np

from analysis.metrics import percent, summarize, tally
from analysis.predictions import read_predictions
from analysis.runs import METRICS, Run
from analysis.tables import plain
from shards.errors import UserError


def ensemble(runs: Sequence[Run]) -> dict[str, float | None]:
    """Return the figures (see `METRICS`) of the mean of the runs' probabilities on the images that they were tested on.

    Raises:
        UserError: fewer than two runs, runs of other classes or images, or runs that kept only the likeliest of their
            classes' probabilities.
    """
    if len(runs) < 2:
        raise UserError(f"an ensemble takes at least two runs, got {len(runs)}; name another")
    first, total_NC = runs[0], None
    for run in runs:
        if run.classes != first.classes:
            raise UserError(f"{run.name} and {first.name} have different classes; an ensemble needs the same ones")
        found = read_predictions(run)
        if found is None:
            raise UserError(f"{run.name} holds no predictions.npz; train it again, or leave it out")
        if found.topk_labels_NK.shape[1] < len(run.classes):
            raise UserError(
                f"{run.name} kept {found.topk_labels_NK.shape[1]} of {len(run.classes)} classes' probabilities; average"
                " the networks themselves: tailstream predict --run RUN --run RUN …"
            )
        if total_NC is None:
            ids_N, labels_N = found.ids_N, found.labels_N
            total_NC = np.zeros((len(ids_N), len(run.classes)))
        if not (np.array_equal(found.ids_N, ids_N) and np.array_equal(found.labels_N, labels_N)):
            raise UserError(f"{run.name} and {first.name} were tested on different images; evaluate them on the same")
        rows_N1 = np.arange(len(ids_N))[:, None]
        total_NC[rows_N1, found.topk_labels_NK] += found.topk_scores_NK
    assert total_NC is not None
    # Their logarithms are logits of these probabilities; 0 has none.
    logits_NC = np.log(np.maximum(total_NC / len(runs), 1e-30))
    return summarize(tally(logits_NC, labels_N), first.train_counts_C)


def ensemble_table(runs: Sequence[Run]) -> str:
    """Return the figures of each run and of all together as aligned text, in percent."""
    rows = [("", list(METRICS.values()))]
    rows += [(plain(f"{run.name} ({run.title})"), [percent(run.last[key]) for key in METRICS]) for run in runs]
    together = ensemble(runs)
    rows.append(("all together", [percent(together[key]) for key in METRICS]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells) for name, cells in rows)
