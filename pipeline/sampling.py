"""Which images a step sees: pure functions of class counts, seed, epoch and step.

One family covers the samplers of the papers. With n_j training images of class j,

    P(class j) = n_j^q / sum_k n_k^q,    then an image uniformly inside the class

    q = 1    instance-balanced (BBN's "uniform" sampler; here an exact permutation per epoch)
    q = 1/2  square-root
    q = 0    class-balanced
    q = -1   reversed (BBN, Zhou et al. 2020, Eq. 4: w_i = N_max / N_i)

and progressively-balanced sampling (Kang et al. 2020, Eq. 3) moves from q = 1 to q = 0 over the epochs. Any other
P(class j) can be given outright.

Every function here is about the *global* batch; ranks take slices of it afterwards, so the images of a step
do not depend on the number of ranks, and a resumed run needs nothing but the step number.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.errors import UserError

Exponent = float | Literal["progressive"]


def epochs_before(share: float, epochs: int) -> int:
    """Return how many of a run's epochs lie before a share of them is gone by: 160 for 0.8 of 200.

    What is deferred to that share applies from the next epoch on; with a share below 1 at least to the last.
    """
    return math.floor(share * epochs + 1e-9)  # against products such as 0.29 · 100, just below 29


def class_probabilities(counts_C: ArrayLike, q: Exponent, progress: float = 0.0) -> NDArray[np.float64]:
    """Return the probability of drawing each class.

    Args:
        counts_C: n_j, images of class j, shape (C,), integers >= 0. A class without images gets probability 0.
        q: the exponent of P(j) ∝ n_j^q, or "progressive".
        progress: t in [0, 1], the share of the epochs gone by; used by "progressive" only:
            P(j) = (1 - t) n_j / N + t / C.

    Returns:
        Shape (C,), float64, sums to 1.

    Raises:
        UserError: no class has an image, or q is neither "progressive" nor a number that can be computed with.
    """
    counts_C = np.asarray(counts_C, dtype=np.float64)
    present_C = counts_C > 0
    if not present_C.any():
        raise UserError("no class has a training image, so there is nothing to sample")
    if q == "progressive":
        assert 0.0 <= progress <= 1.0, progress
        instance_C, balanced_C = class_probabilities(counts_C, 1.0), class_probabilities(counts_C, 0.0)
        return (1.0 - progress) * instance_C + progress * balanced_C
    if isinstance(q, str) or not np.isfinite(q):
        raise UserError(f"sampling exponent {q!r} is neither a finite number nor 'progressive'")
    # Relative to the likeliest class, so that no weight overflows.
    weights_C = np.zeros_like(counts_C)
    log_ratio = np.log(counts_C[present_C] / counts_C.max())
    with np.errstate(over="ignore"):
        log_weight = q * log_ratio
    if not np.isfinite(log_weight).all():
        raise UserError(f"sampling exponent {q:g} is too far from 0 for classes of such different sizes")
    weights_C[present_C] = np.exp(log_weight - log_weight.max())
    return weights_C / weights_C.sum()


def random_generator(seed: int, *where: int | str) -> np.random.Generator:
    """Return a generator that belongs to (seed, where…) alone, such as (seed, "reversed", "ids", epoch, step)."""
    words = [zlib.crc32(word.encode()) if isinstance(word, str) else word for word in where]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words])))


def checked_probabilities(counts_C: ArrayLike, probabilities_C: ArrayLike) -> NDArray[np.float64]:
    """Return explicit class probabilities, shape (C,), float64, once they fit the classes.

    Raises:
        UserError: not one for each class, negative or not finite, a sum that is not 1 (within 1e-6), or one above
            zero for a class without images.
    """
    counts_C, probabilities_C = np.asarray(counts_C), np.asarray(probabilities_C, dtype=np.float64)
    if probabilities_C.shape != counts_C.shape:
        raise UserError(f"{probabilities_C.size} class probabilities for {counts_C.size} classes; give one for each")
    if not (np.isfinite(probabilities_C).all() and (probabilities_C >= 0).all()):
        raise UserError("class probabilities must be finite and at least 0")
    total = probabilities_C.sum()
    if abs(total - 1) > 1e-6:
        raise UserError(f"class probabilities add up to {total:g} and must add up to 1; divide them by their sum")
    impossible = np.flatnonzero((counts_C == 0) & (probabilities_C > 0))
    if impossible.size:
        raise UserError(f"class {impossible[0]} has no training image, so its probability must be 0")
    return probabilities_C


def epoch_order(
    seed: int, stream: str, epoch: int, shard_sizes: Sequence[int], shard_window: int | None = None
) -> NDArray[np.int64]:
    """Return the order in which an instance-balanced stream visits all ids 0 … N - 1 in one epoch, each once.

    Args:
        seed, stream, epoch: what the order belongs to.
        shard_sizes: samples in each shard; ids follow the shards.
        shard_window: None shuffles everything. A number shuffles the shards, and then the ids inside each window of
            that many shards: no more shards are read at a time, and each in its one window only.

            shards     3 0 | 5 1 | 2 4         shard_window = 2
            ids       mixed|mixed|mixed

    Returns:
        Shape (N,), int64.
    """
    generator = random_generator(seed, stream, "permutation", epoch)
    if shard_window is None:
        return generator.permutation(sum(shard_sizes))
    ends = np.cumsum(shard_sizes)
    shards = generator.permutation(len(ends)).tolist()
    order = []
    for first in range(0, len(shards), shard_window):
        ids = np.concatenate(
            [np.arange(ends[s] - shard_sizes[s], ends[s]) for s in shards[first : first + shard_window]]
        )
        generator.shuffle(ids)
        order.append(ids)
    return np.concatenate(order)


def draw_ids(
    seed: int,
    stream: str,
    epoch: int,
    step: int,
    size: int,
    cumulative_C: NDArray[np.float64],
    class_starts: NDArray[np.int64],
    by_class: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Draw the ids of one global batch with replacement: first a class, then an image uniformly inside it.

    Args:
        seed, stream, epoch, step: what the draw belongs to.
        size: images in the global batch.
        cumulative_C: cumulative sum of `class_probabilities`, shape (C,), last entry 1.
        class_starts: shape (C + 1,), where each class begins in `by_class`.
        by_class: shape (N,), sample ids sorted by class.

    Returns:
        Shape (size,), int64 sample ids.
    """
    uniform_2B = random_generator(seed, stream, "ids", epoch, step).random((2, size))
    # side="right" skips classes of probability zero; the scaling guards the last entry against rounding below 1.
    classes_B = np.searchsorted(cumulative_C, uniform_2B[0] * cumulative_C[-1], side="right")
    counts_B = class_starts[classes_B + 1] - class_starts[classes_B]
    return by_class[class_starts[classes_B] + (uniform_2B[1] * counts_B).astype(np.int64)]
