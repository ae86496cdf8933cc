"""Every objective against a slow formula of its own, values and gradients, and at its edges."""

import math

import numpy as np
import pytest
import torch

from shards.errors import UserError
from train.engine.method import Progress
from train.engine.objectives import OBJECTIVES, gradual_weight, make_objective

COUNTS = np.array([500, 90, 0, 12, 1])
PROGRESS = Progress(epoch=3, epochs=8, step=0, seed=0)


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    total = sum(math.exp(value - top) for value in z)
    return [math.exp(value - top) / total for value in z]


def cross_entropy(z, y, counts):
    return -math.log(softmax(z)[y])


def adjusted(tau):
    def loss(z, y, counts):
        present = [k for k in range(len(z)) if counts[k] > 0]
        weighed = {k: math.exp(z[k]) * (counts[k] / sum(counts)) ** tau for k in present}
        return -math.log(weighed[y] / sum(weighed.values()))

    return loss


def focal(gamma):
    def loss(z, y, counts):
        p = softmax(z)[y]
        return -((1 - p) ** gamma) * math.log(p)

    return loss


def ldam(largest, scale):
    def loss(z, y, counts):
        rarest = min(n for n in counts if n > 0)
        margin = largest * (rarest / counts[y]) ** 0.25
        cosines = [value / scale for value in z]
        cosines[y] -= margin
        return cross_entropy([scale * c for c in cosines], y, counts)

    return loss


def smoothed(head, tail, form):
    def loss(z, y, counts):
        few, many = min(n for n in counts if n > 0), max(counts)
        x = (counts[y] - few) / (many - few)
        if form == "concave":
            x = math.sin(x * math.pi / 2)
        elif form == "convex":
            x = 1 + math.sin(1.5 * math.pi + x * math.pi / 2)
        epsilon, p = tail + (head - tail) * x, softmax(z)
        target = [epsilon / len(z) + (1 - epsilon) * (k == y) for k in range(len(z))]
        return -sum(t * math.log(q) for t, q in zip(target, p, strict=True))

    return loss


BY_HAND = {
    "ce": cross_entropy,
    "adjusted(tau=0.7)": adjusted(0.7),
    "gradual": adjusted(2 ** (3 / 8) - 1),
    "gradual(form='linear', base=4, scale=0.5)": adjusted(0.5 * 3 * 3 / 8),
    "gradual(form='concave')": adjusted(2 - 2 ** (5 / 8)),
    "focal": focal(2),
    "focal(gamma=0.5)": focal(0.5),
    "focal(gamma=0)": cross_entropy,
    "ldam": ldam(0.5, 30),
    "ldam(max_margin=0.2, scale=8)": ldam(0.2, 8),
    "smoothed": smoothed(0.3, 0.0, "concave"),
    "smoothed(head=0.4, tail=0.1, form='linear')": smoothed(0.4, 0.1, "linear"),
    "smoothed(form='convex')": smoothed(0.3, 0.0, "convex"),
    "hard": cross_entropy,  # before the first epoch has ended
}


@pytest.mark.parametrize("text", BY_HAND)
def test_values_and_gradients_are_those_of_the_formula(text):
    z_BC = (3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).requires_grad_()
    labels_B = torch.tensor([0, 1, 3, 4, 4, 0, 3, 1])
    losses_B = make_objective(text, COUNTS).losses(z_BC, labels_B, PROGRESS)
    losses_B.sum().backward()
    for row, (z, y) in enumerate(zip(z_BC.tolist(), labels_B.tolist(), strict=True)):
        assert losses_B[row].item() == pytest.approx(BY_HAND[text](z, y, COUNTS.tolist()), rel=1e-5), (text, row)
        for k in range(5):
            up, down = ([value + sign * 1e-5 * (j == k) for j, value in enumerate(z)] for sign in (1, -1))
            slope = (BY_HAND[text](up, y, COUNTS.tolist()) - BY_HAND[text](down, y, COUNTS.tolist())) / 2e-5
            assert z_BC.grad[row, k].item() == pytest.approx(slope, rel=1e-4, abs=1e-6), (text, row, k)


def test_no_objective_is_left_out():
    assert {text.split("(")[0] for text in BY_HAND} == OBJECTIVES.keys()


@pytest.mark.parametrize("counts", [[7], [1, 1], [5, 5, 5], [10, 0], [1_000_000_000, 1]], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_edges_of_the_counts(name, counts):
    """One class, one image, equal classes, a class without images, an extreme imbalance."""
    objective = make_objective(name, np.array(counts))
    labels_B = torch.tensor([0, len(counts) - 1 if counts[-1] else 0])
    z_BC = torch.randn(2, len(counts), generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses_B = objective.losses(z_BC, labels_B, PROGRESS)
    losses_B.sum().backward()
    assert losses_B.shape == (2,)
    assert losses_B.isfinite().all()
    assert z_BC.grad.isfinite().all()
    if len(counts) == 1:
        assert (losses_B == 0).all()


@pytest.mark.parametrize("text", [*OBJECTIVES, "focal(gamma=0.5)"])
def test_logits_at_the_ends_of_fp16(text):
    """Logits come in float32; those of an fp16 network reach ±65504. Certainty, right or wrong, stays finite."""
    z_BC = torch.tensor([[65504.0, -65504, 0, 0, 0], [-65504, 65504, 0, 0, 0], [0, 0, 0, 0, 0]], requires_grad=True)
    losses_B = make_objective(text, COUNTS).losses(z_BC, torch.tensor([0, 0, 1]), PROGRESS)
    losses_B.sum().backward()
    assert losses_B.isfinite().all()
    assert z_BC.grad.isfinite().all()
    assert losses_B[1] > losses_B[2] >= 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_empty_batch_has_no_losses(name):
    assert make_objective(name, COUNTS).losses(
        torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), PROGRESS
    ).shape == (0,)


def test_the_forms_of_graloss_begin_and_end_alike():
    for form in ("convex", "linear", "concave"):
        assert gradual_weight(8, 8, 0.5, 3.0, form) == pytest.approx(1.0)
        assert gradual_weight(0, 8, 0.5, 3.0, form) == 0
    middle = [gradual_weight(4, 8, 1, 2, form) for form in ("convex", "linear", "concave")]
    assert middle == sorted(middle)
    assert middle[0] < middle[1] < middle[2]
    # The concave form is Eq. 3 too, with 1/c for c and −s·c for s.
    assert gradual_weight(3, 8, 0.7, 3.0, "concave") == pytest.approx(gradual_weight(3, 8, -0.7 * 3, 1 / 3))


def test_margins_are_the_papers():
    """n^(−1/4), the rarest class's being 0.5; a class without images has none."""
    margins = make_objective("ldam", np.array([10_000, 625, 16, 1, 0]))._margins_C
    torch.testing.assert_close(margins, torch.tensor([0.05, 0.1, 0.25, 0.5, 0.0]))


def test_hard_classes_weigh_more_after_each_epoch_and_a_resumed_run_knows_it():
    objective = make_objective("hard(momentum=0.5, least=0.2)", np.array([9, 9, 9, 9]))
    z_BC, labels_B = torch.eye(4)[[0, 0, 1, 3, 3]], torch.tensor([0, 0, 0, 1, 3])
    sums = {name: value.double() for name, value in objective.sums(z_BC, labels_B, PROGRESS).items()}
    assert sums["hits"].tolist() == [2, 0, 0, 1]
    assert sums["seen"].tolist() == [3, 1, 0, 1]
    logged = objective.end_of_epoch(sums, PROGRESS)
    # From 1 / (1 − m) = 2: 0.5·2 + 1/acc, with accuracies of 2/3, 0 (counted as 0.2) and 1; the third was not seen.
    expected = [2.5, 6.0, 2.0, 2.0]
    assert objective.weights_C.tolist() == pytest.approx(expected)
    assert logged == {"hardest": pytest.approx(6 / (12.5 / 4))}
    objective.end_of_epoch(sums, PROGRESS)
    expected = [2.75, 8.0, 2.0, 2.0]
    assert objective.weights_C.tolist() == pytest.approx(expected)
    losses = torch.nn.functional.cross_entropy(z_BC, labels_B, reduction="none")
    weights = torch.tensor(expected) / np.mean(expected)
    torch.testing.assert_close(objective.losses(z_BC, labels_B, PROGRESS), weights[labels_B] * losses)

    resumed = make_objective("hard(momentum=0.5, least=0.2)", np.array([9, 9, 9, 9]))
    resumed.load_state_dict(objective.state_dict())
    torch.testing.assert_close(resumed.weights_C, objective.weights_C)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hard(momentum=1)", "momentum=1 never forgets; it must be below 1"),
        ("focal(gamma=-1)", "gamma"),
        ("ldam(scale=0)", "scale"),
        ("smoothed(head=1.5)", "head"),
        ("gradual(form='round')", "form"),
    ],
)
def test_impossible_settings_are_named(text, message):
    with pytest.raises(UserError) as raised:
        make_objective(text, COUNTS)
    assert str(raised.value).startswith(f"method.objective={text}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
