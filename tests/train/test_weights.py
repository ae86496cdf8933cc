"""Class weights by hand, and the mean of a step, which parts and ranks do not change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.batch import Batch
from shards.errors import UserError
from train.engine.weights import class_weights, make_weighting, mean_loss

COUNTS = np.array([500, 90, 0, 12, 1])


@pytest.mark.parametrize(
    ("text", "by_hand"),
    [
        ("inverse", lambda n: 1 / n),
        ("effective", lambda n: (1 - 0.9999) / (1 - 0.9999**n)),
        ("effective(beta=0.9)", lambda n: (1 - 0.9) / (1 - 0.9**n)),
        ("effective(beta=0)", lambda n: 1.0),
        ("effective(beta=1)", lambda n: 1 / n),
    ],
)
def test_weights_are_the_formulas_with_a_mean_of_one(text, by_hand):
    made = class_weights(make_weighting(text), COUNTS)
    raw = [by_hand(n) if n else 0 for n in COUNTS.tolist()]
    np.testing.assert_allclose(made, np.array(raw) * 4 / sum(raw), rtol=1e-5)


@pytest.mark.parametrize("text", ["inverse", "effective", "effective(beta=0.999999999)"])
@pytest.mark.parametrize("counts", [[3], [0, 4], [1, 1], [1_000_000_000, 1]], ids=str)
def test_edges_of_the_counts(text, counts):
    made = class_weights(make_weighting(text), np.array(counts))
    assert made.isfinite().all()
    assert made.mean() * len(counts) == pytest.approx(sum(n > 0 for n in counts))
    assert (made > 0).tolist() == [n > 0 for n in counts]


def test_between_nothing_and_the_inverse():
    assert make_weighting("none") is None
    spread = [class_weights(make_weighting(f"effective(beta={b})"), COUNTS)[-1].item() for b in (0, 0.9, 0.999, 1)]
    assert spread == sorted(spread)


def whole_batch(mixed: bool) -> tuple[torch.Tensor, Batch]:
    generator = torch.Generator().manual_seed(0)
    z_BC = torch.randn(16, 5, generator=generator)
    labels_B, partners_B = torch.tensor([0] * 12 + [1, 3, 4, 4]), torch.tensor([4, 0] * 8)
    shares_B = torch.rand(16, generator=generator)
    counts_C = torch.bincount(labels_B, minlength=5).float()
    if mixed:
        counts_C = torch.zeros(5).index_add(0, labels_B, shares_B).index_add(0, partners_B, 1 - shares_B)
    batch = Batch(torch.zeros(16, 1), labels_B, np.arange(16), step_counts_C=counts_C)
    return z_BC, replace(batch, partners_B=partners_B, shares_B=shares_B) if mixed else batch


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_the_mean_is_that_of_the_whole_batch_in_any_number_of_parts(parts, weighted, mixed):
    z_BC, batch = whole_batch(mixed)
    weights_C = class_weights(make_weighting("inverse"), COUNTS) if weighted else None
    by_hand = [0.0, 0.0]
    for row in range(16):
        labels = [(batch.labels_B[row], 1.0)]
        if mixed:
            share = batch.shares_B[row].item()
            labels = [(batch.labels_B[row], share), (batch.partners_B[row], 1 - share)]
        for label, share in labels:
            weight = share * (weights_C[label].item() if weighted else 1.0)
            by_hand[0] += weight * F.cross_entropy(z_BC[row], label).item()
            by_hand[1] += weight
    size, means = 16 // parts, []
    for first in range(0, 16, size):
        part = slice(first, first + size)
        z_PC = z_BC[part]
        means.append(
            mean_loss(
                lambda labels_B, z_PC=z_PC: F.cross_entropy(z_PC, labels_B, reduction="none"),
                batch.part(part),
                weights_C,
            )
        )
    assert torch.stack(means).mean().item() == pytest.approx(by_hand[0] / by_hand[1], rel=1e-5)


def test_half_precision_leaves_the_mean_as_it_is():
    _, batch = whole_batch(mixed=False)
    weights_C = class_weights(make_weighting("inverse"), COUNTS)

    def mean() -> float:
        return mean_loss(lambda labels_B: torch.linspace(1, 2, len(labels_B)), batch, weights_C).item()

    exact = mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mean() == exact


def test_one_image_has_its_own_loss_whatever_its_class_weighs():
    batch = Batch(torch.zeros(1, 1), torch.tensor([4]), np.arange(1), step_counts_C=torch.eye(5)[4])
    weights_C = class_weights(make_weighting("inverse"), COUNTS)
    assert mean_loss(lambda labels_B: torch.tensor([2.5]), batch, weights_C).item() == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "inverted",
            "method.weights=inverted is unknown; choose one of: none, inverse, effective",
        ),
        ("effective(beta=1.5)", "method.weights=effective(beta=1.5): "),
        ("inverse(power=2)", "method.weights=inverse(power=2): inverse has no setting 'power'; it has no settings"),
        ("effective(0.9)", "is not understood; write it as effective or effective(beta=0.999)"),
    ],
)
def test_wrong_weightings_are_named(text, message):
    with pytest.raises(UserError) as raised:
        make_weighting(text)
    assert message in str(raised.value)
