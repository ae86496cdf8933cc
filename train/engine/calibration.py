"""Calibration: probabilities that can be believed, and where a prediction had better be left out.

With logits z, a temperature T and an adjustment τ, fitted to val (whose class shares are p_val):

    log p(c|x) = z_c / T − τ · log(n_c / n) + const

T is Guo et al.'s ("On Calibration of Modern Neural Networks", ICML 2017), τ Menon et al.'s ("Long-Tail Learning via
Logit Adjustment", ICLR 2021). Where the classes have other shares p*, Bayes' rule multiplies by p*_c over those that
the probabilities were made for: p_val after calibration, else the training images' n_c / n.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from shards.atomic import write_json
from shards.errors import UserError
from train.engine.runs import CALIBRATION as FILE

FORMAT = 1
# Logits that are worked on at a time, of millions.
BLOCK_VALUES = 1 << 22


@dataclass(frozen=True)
class Calibration:
    """How a network's logits become probabilities.

    Attributes:
        temperature: T > 0.
        tau: τ.
        prior_C: the class shares that the probabilities are made for; sum 1, all > 0.
        reject_below: predictions of a lower probability are left out; 0: none.
        reject_below_C: the same per predicted class; None: the same for all.
    """

    temperature: float
    tau: float
    prior_C: list[float]
    reject_below: float = 0.0
    reject_below_C: list[float] | None = None

    @classmethod
    def none(cls, train_counts_C: ArrayLike) -> "Calibration":
        """Return the calibration that leaves logits as they are: made for the training images' class shares."""
        return cls(1.0, 0.0, shares(train_counts_C).tolist())

    def offsets(self, train_counts_C: ArrayLike, target_C: ArrayLike | None = None) -> NDArray[np.float64]:
        """Return what is added to z / T, shape (C,): log-probabilities are its log-softmax.

        Args:
            train_counts_C: n_j.
            target_C: the class shares p* where the model is used, each >= 0; None: as calibrated.
        """
        offsets_C = -self.tau * np.log(shares(train_counts_C))
        if target_C is not None:
            with np.errstate(divide="ignore"):  # a class that does not occur has a probability of 0
                offsets_C = offsets_C + np.log(np.asarray(target_C, np.float64)) - np.log(self.prior_C)
        return offsets_C

    def thresholds(self) -> NDArray[np.float64]:
        """Return the lowest probability at which each class may be predicted, shape (C,)."""
        return (
            np.full(len(self.prior_C), self.reject_below)
            if self.reject_below_C is None
            else np.array(self.reject_below_C)
        )


def shares(counts_C: ArrayLike) -> NDArray[np.float64]:
    """Return each class's share of some images; one image more is counted in each where a class has none."""
    seen_C = np.asarray(counts_C, np.float64)
    seen_C = seen_C + (seen_C.min() == 0)
    return np.asarray(seen_C / seen_C.sum())


def fit(logits_NC: ArrayLike, labels_N: ArrayLike, train_counts_C: ArrayLike) -> Calibration:
    """Fit T and τ by the likelihood of held-out labels (Guo et al., section 4.2), and a prior for small splits.

    1/T and τ are normally distributed about 1 and 0, where nothing changes, with a standard deviation of 1, and most
    probable given the labels is

        argmin over 1/T and τ of  −Σ log p(label) + ((1/T − 1)² + τ²) / 2

    which is strictly convex: one minimum, also where no label is predicted wrongly and the likelihood alone would have
    T fall to 0. A thousand images outweigh the prior; ten without a mistake leave the probabilities about as they are.
    Platt's remedy (targets of (N + 1) / (N + 2), "Probabilistic Outputs for Support Vector Machines", 1999, section
    2.2) instead flattens what was right. On drawn labels of ten classes, with T of 1, 2 and 4, τ of 0 and 1 and three
    degrees of difficulty, the mean calibration error after 30 images was 0.076 as it is, 0.048 by his targets, 0.024 by
    the likelihood alone and 0.020 so; after 1,000 images 0.013, 0.012 and 0.012.

    Args:
        logits_NC: finite; N >= 1.
        labels_N: 0 … C − 1.
        train_counts_C: n_j.
    """
    logits_NC, labels_N = np.asarray(logits_NC), np.asarray(labels_N)
    log_prior_C = np.log(shares(train_counts_C))
    spreads = [np.abs(logits_BC - logits_BC.mean(1, keepdims=True)).sum() for _, logits_BC in _blocks(logits_NC)]
    scale = max(float(sum(spreads)) / logits_NC.size, 1e-12)
    usual, spread = np.array([scale, 0.0]), np.array([scale, 1.0])

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        moved = (parameters - usual) / spread
        total, slope = (moved**2).sum() / 2, moved / spread
        for rows, logits_BC in _blocks(logits_NC):
            logits_BC /= scale
            log_p_BC = log_softmax(parameters[0] * logits_BC - parameters[1] * log_prior_C, axis=1)
            true = np.arange(len(log_p_BC)), labels_N[rows]
            total -= log_p_BC[true].sum()
            wrong_BC = np.exp(log_p_BC, out=log_p_BC)
            wrong_BC[true] -= 1
            slope += np.einsum("bc,bc->", wrong_BC, logits_BC), -(wrong_BC.sum(0) @ log_prior_C)
        return float(total) / len(labels_N), slope / len(labels_N)

    # Where nothing is recognised the best T is infinite, or negative: it has a bound.
    found = minimize(loss, usual, jac=True, method="L-BFGS-B", bounds=[(0.02 * scale, None), (None, None)])
    inverse, tau = found.x
    prior_C = shares(np.bincount(labels_N, minlength=logits_NC.shape[1]))
    return Calibration(float(scale / inverse), float(tau), prior_C.tolist())


def probabilities(
    logits_NC: ArrayLike, calibration: Calibration, train_counts_C: ArrayLike, target_C: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Return calibrated probabilities, shape (N, C), of logits."""
    scaled_NC = np.asarray(logits_NC, np.float64) / calibration.temperature
    return np.asarray(np.exp(log_softmax(scaled_NC + calibration.offsets(train_counts_C, target_C), axis=1)))


def likeliest(
    logits_NC: NDArray[Any], calibration: Calibration, train_counts_C: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return each image's highest probability, and its class, both of shape (N,)."""
    scores_N, predicted_N = np.empty(len(logits_NC)), np.empty(len(logits_NC), np.int64)
    for rows, logits_BC in _blocks(logits_NC):
        p_BC = probabilities(logits_BC, calibration, train_counts_C)
        scores_N[rows], predicted_N[rows] = p_BC.max(1), p_BC.argmax(1)
    return scores_N, predicted_N


def _blocks(logits_NC: NDArray[Any]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield rows of logits, some at a time: all in float64, with thousands of classes, would take gigabytes."""
    rows = max(1, BLOCK_VALUES // logits_NC.shape[1])
    for start in range(0, len(logits_NC), rows):
        part = slice(start, start + rows)
        yield part, logits_NC[part].astype(np.float64)


def reject_threshold(scores_N: NDArray[np.float64], right_N: NDArray[np.bool_], accuracy: float) -> float:
    """Return the lowest score from which on at least this share of the predictions is right.

    Just above 1 where there is none, so that nothing reaches it.
    Equal scores stand or fall together. No predictions at all need no threshold: 0.
    """
    if not len(scores_N):
        return 0.0
    order = np.argsort(-scores_N, kind="stable")
    scores, kept = scores_N[order], np.arange(1, len(order) + 1)
    enough = np.cumsum(right_N[order]) >= accuracy * kept
    last_of_equals = np.append(scores[1:] != scores[:-1], True)
    passed = np.flatnonzero(enough & last_of_equals)
    if not passed.size:
        return float(np.nextafter(1.0, 2.0))  # above every probability
    return 0.0 if passed[-1] == len(order) - 1 else float(scores[passed[-1]])


def write_calibration(run_folder: Path, calibrations: dict[str, tuple[Calibration, dict[str, Any]]]) -> None:
    """Write calibration.json: per kind of weights a calibration, and what else is to be known about it."""
    content = {name: asdict(calibration) | about for name, (calibration, about) in calibrations.items()}
    write_json(run_folder / FILE, {"format": FORMAT, **content})


def read_calibration(run_folder: Path, weights: str, num_classes: int) -> Calibration | None:
    """Return the calibration of a run's weights, "last" or "selected", or None where there is none.

    Raises:
        UserError: the file is damaged, of a newer format, or of another model.
    """
    path = run_folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(f"{path} is of format {content['format']!r}, this version reads {FORMAT}; calibrate again")
        if weights not in content:
            return None
        found = Calibration(**{field.name: content[weights][field.name] for field in fields(Calibration)})
        fits = len(found.prior_C) == num_classes and len(found.thresholds()) == num_classes
        numbers = [found.temperature, found.tau, *found.prior_C, *found.thresholds()]
        if not fits or not np.isfinite(numbers).all() or min(found.temperature, *found.prior_C) <= 0:
            raise ValueError(f"it does not fit {num_classes} classes")
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); calibrate the run again, or remove the file") from None
    return found
