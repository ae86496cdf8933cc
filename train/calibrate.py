"""Make a run's probabilities honest: a temperature and a prior adjustment, fitted on its val split alone.

    tailstream calibrate --run runs/birds-bbn-1 [--reject 0.95] [--per-class]

Writes calibration.json, which predicting and exporting use, for the last weights and for those that val chose.
It reads the val logits that training kept, and nothing of the test split. The equations: train/engine/calibration.py.

    --reject 0.95       predictions of a low probability get no label, so that 95 % of those that are left are right on
                        val; with --per-class by a threshold for each predicted class
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jsonargparse.typing import ClosedUnitInterval
from numpy.typing import NDArray

from shards.cli import Parser, program_name
from shards.errors import UserError, user_errors_exit_2
from train.engine.runs import CALIBRATION
from train.predict import printable

if TYPE_CHECKING:  # a command line is read without torch: see train/engine/launch.py
    from train.engine.calibration import Calibration

BINS = 10
# A class's own threshold needs so many val images that were taken for it; else it has the common one.
LEAST_PREDICTED = 10
# With fewer images than these the prior of the fit weighs as much as they do.
FEW_IMAGES = 100


def reliability(confidence_N: NDArray[np.float64], right_N: NDArray[np.bool_]) -> tuple[list[dict[str, Any]], float]:
    """Compare confidence and accuracy in bins of confidence (k/10, (k + 1)/10].

    Args:
        confidence_N: each prediction's probability.
        right_N: whether it is right.

    Returns:
        A row per bin that has images: `up_to`, `images`, `confidence`, `accuracy`; and the expected calibration error
        over these bins.
    """
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    rows, error = [], 0.0
    for k in np.unique(bin_N).tolist():
        inside = bin_N == k
        row = {"up_to": (k + 1) / BINS, "images": int(inside.sum()), "confidence": float(confidence_N[inside].mean())}
        row["accuracy"] = float(right_N[inside].mean())
        error += row["images"] / len(right_N) * abs(row["confidence"] - row["accuracy"])
        rows.append(row)
    return rows, error


def calibrate(
    logits_NC: NDArray[Any],
    labels_N: NDArray[np.int64],
    train_counts_C: list[int],
    reject: float | None = None,
    per_class: bool = False,
) -> "tuple[Calibration, dict[str, Any]]":
    """Fit a calibration to held-out logits.

    Args:
        logits_NC: N >= 1.
        labels_N: 0 … C − 1.
        train_counts_C: n_j.
        reject: the share of the predictions with a label that is to be right; None: all get a label.
        per_class: whether each predicted class has a threshold of its own.

    Returns:
        The calibration, and what is to be known about it: the number of images and both reliability tables.
    """
    from train.engine.calibration import Calibration, fit, likeliest, reject_threshold

    found = fit(logits_NC, labels_N, train_counts_C)
    before_N, guessed_N = likeliest(logits_NC, Calibration.none(train_counts_C), train_counts_C)
    score_N, predicted_N = likeliest(logits_NC, found, train_counts_C)
    right_N = predicted_N == labels_N
    if reject is not None:
        found = replace(found, reject_below=reject_threshold(score_N, right_N, reject))
        if per_class:
            own_C = [found.reject_below] * len(train_counts_C)
            for c in np.unique(predicted_N).tolist():
                mine = predicted_N == c
                if mine.sum() >= LEAST_PREDICTED:
                    own_C[c] = reject_threshold(score_N[mine], right_N[mine], reject)
            found = replace(found, reject_below_C=own_C)
    about: dict[str, Any] = {"fitted_on": "val", "images": len(labels_N)}
    for name, of in (("before", (before_N, guessed_N == labels_N)), ("after", (score_N, right_N))):
        about[name], about[f"ece_{name}"] = reliability(*of)
    return found, about


def table(calibration: "Calibration", about: dict[str, Any]) -> str:
    """Return what people read: the parameters and both reliability tables."""
    lines = [f"temperature {calibration.temperature:.3f}, prior adjustment tau {calibration.tau:.2f}"]
    if (least_C := calibration.thresholds()).any():
        lines[0] += f", no label below {least_C.min():.3f}"
        lines[0] += f" to {least_C.max():.3f} by class" if calibration.reject_below_C is not None else ""
    lines.append("confidence up to   images  confidence  accuracy     images  confidence  accuracy")
    columns = [{row["up_to"]: row for row in about[name]} for name in ("before", "after")]
    for up_to in sorted({*columns[0], *columns[1]}):
        cells = [
            f"{row['images']:>6,}  {row['confidence']:>10.3f}  {row['accuracy']:>8.3f}" if row else f"{'':28}"
            for row in (column.get(up_to) for column in columns)
        ]
        lines.append(f"{up_to:>16.1f}   {cells[0]}     {cells[1]}".rstrip())
    if share := float((least_C > 1).mean()):
        of = "every class" if share == 1 else f"{int((least_C > 1).sum()):,} of the classes"
        lines.append(f"no threshold reaches what --reject asks for of {of}, which nothing is taken for; ask for less")
    before, after = about["ece_before"], about["ece_after"]
    lines.append(f"calibration error on val: {before:.4f} before, {after:.4f} after, which was fitted to it")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Calibrate as the command line says; a user's mistake exits with status 2."""
    program = program_name("python -m train.calibrate", "calibrate")
    parser = Parser(prog=program, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--reject", type=ClosedUnitInterval | None, help="share of the labels given that is to be right"
    )
    parser.add_argument("--per-class", action="store_true", help="with --reject: a threshold for each class")
    asked = parser.parse_args(argv)
    with user_errors_exit_2(program):
        if asked.per_class and asked.reject is None:
            raise UserError("--per-class needs --reject, the share of the labels given that is to be right")
        _calibrate_run(asked.run, asked.reject, asked.per_class)


def _calibrate_run(run: Path, reject: float | None, per_class: bool) -> None:
    from train.engine.calibration import write_calibration
    from train.engine.inference import open_model
    from train.engine.predictions import kept_arrays, read_val_logits
    from train.networks.model_files import choose_weights

    model = open_model(run, device="cpu")
    kinds = dict.fromkeys(["last", choose_weights(run, None)])
    found = {}
    for weights in kinds:
        if "val_logits" not in kept_arrays(run, weights):
            print(
                f"{printable(run)} has no val split beside the one that it is reported on, so there is nothing to"
                " calibrate on; nothing is done (build the dataset again with --val-fraction 0.1, and train)"
            )
            return
        logits_NC, labels_N = read_val_logits(run, weights, len(model.description.classes))
        found[weights] = calibrate(logits_NC, labels_N, model.description.train_counts, reject, per_class)
    for weights, (calibration, about) in found.items():
        print(f"{weights} weights, {about['images']:,} images of val; before and after:")
        print(table(calibration, about))
    if len(labels_N) < FEW_IMAGES:
        print(
            f"note: {len(labels_N):,} images of val are few to tell a temperature by, which therefore stays near 1; a"
            " dataset built with a larger --val-fraction has more"
        )
    write_calibration(run, found)
    print(f"wrote {printable(run / CALIBRATION)}; tailstream predict and tailstream export use it")


if __name__ == "__main__":
    main()
