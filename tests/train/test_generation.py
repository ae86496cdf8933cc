"""The sampler against explicit Gaussians, its ranks, and generation from plain arrays."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shards.errors import UserError
from train.features import generation
from train.features.gaussians import ClassGaussians, find_support, fit, head_classes, inverse_tukey
from train.features.generation import combine, generate, generate_chunks, generate_parts, noise_length

SIZES = [(dim, count) for dim in (64, 512) for count in (1, 2, dim - 1, dim + 1, 10 * dim)]


def skewed(counts: list[int], dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features like a network's: >= 0, skewed, correlated; and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.repeat_interleave(torch.tensor(counts))
    mixing_DD = torch.eye(dim) + 0.3 * torch.randn(dim, dim, generator=generator) / dim**0.5
    centres_CD = torch.rand(len(counts), dim, generator=generator)
    noise_ND = torch.randn(len(labels_N), dim, generator=generator) @ mixing_DD
    return (centres_CD[labels_N] + 0.4 * noise_ND).square(), labels_N


def covariance(features_nD: Tensor) -> Tensor:
    """Explicitly, in float64; zero for a single feature."""
    features_nD = features_nD.double()
    return features_nD.T.cov() if len(features_nD) > 1 else torch.zeros(features_nD.shape[1:] * 2).double()


def of_class(gaussians: ClassGaussians, c: int) -> Tensor:
    return gaussians.features_ND[gaussians.labels_N == c]


@pytest.mark.parametrize(("dim", "count"), SIZES)
def test_the_implied_covariance_is_the_classes(dim, count):
    """White noise times a factor A has covariance AᵀA: unit vectors as noise show A itself."""
    gaussians = fit(*skewed([count], dim), num_classes=1)
    length = noise_length(gaussians, 0)
    assert length == min(count, dim)
    ones, zeros = torch.ones(length, 1), torch.zeros(length, 1)
    factor = combine(gaussians, 0, torch.eye(length), ones * gaussians.noise_scales_C[0], zeros).double()
    expected_DD = covariance(of_class(gaussians, 0))
    assert (factor.T @ factor - expected_DD).norm() <= 1e-5 * expected_DD.norm()


@pytest.mark.parametrize(("dim", "count"), SIZES)
def test_means_are_exact_without_noise(dim, count):
    gaussians = fit(*skewed([count], dim), num_classes=1)
    noise = torch.zeros(2, noise_length(gaussians, 0))
    mean = torch.tensor([[1.0], [0.25]])
    found = combine(gaussians, 0, noise, torch.ones(2, 1), mean / count).double()
    torch.testing.assert_close(found, mean.double() * of_class(gaussians, 0).double().mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", [[12, 9, 5, 1], [40, 30, 12, 9]])
@pytest.mark.parametrize("beta", [0.2, 0.4, 0.9])
def test_samples_are_the_parts_put_together_at_a_beta(counts, beta):
    """One noise for every β: with the same generator the sample at β is (1−β)·own + β·lent."""
    gaussians = fit(*skewed(counts, 10), num_classes=4)  # classes with and without a factor
    support = find_support(gaussians, 2, head_classes(gaussians.counts_C, counts[0] - 1))
    targets, seeded = torch.tensor([6, 20, 30, 30]), lambda: torch.Generator().manual_seed(5)
    ((own, lent, labels),) = generate_parts(gaussians, support, targets, seeded(), gamma=0.1)
    assert torch.equal((lent != own).any(1), labels > 0)  # the largest is head
    ((samples, same_labels),) = generate_chunks(gaussians, support, targets, beta, seeded(), gamma=0.1)
    assert torch.equal(labels, same_labels)
    torch.testing.assert_close(inverse_tukey((1 - beta) * own + beta * lent), samples)


@pytest.mark.parametrize(("dim", "count"), SIZES)
def test_calibrated_moments_within_four_standard_errors(dim, count, in_tukey_space):
    """Eq. 8 and 9 over all parents of a class: a mixture of Gaussians whose mean and covariance are known."""
    beta, gamma = 0.4, 0.01
    gaussians = fit(*skewed([count, count + 30, count + 60], dim), num_classes=3)
    support = find_support(gaussians, k=2)
    number = count * -(-20_000 // count)  # every parent equally often
    targets = torch.tensor([number, 0, 0])
    chunks = generate_chunks(gaussians, support, targets, beta, torch.Generator().manual_seed(1), gamma=gamma)
    samples_MD = torch.cat([features for features, _ in chunks]).double()

    own_nD, weights_nK, classes_nK = of_class(gaussians, 0), support.weights_NK[:count], support.classes_NK[:count]
    share_nC = torch.zeros(count, 3).scatter_add_(1, classes_nK, weights_nK)
    means_nD = ((1 - beta) * own_nD + beta * share_nC @ gaussians.means_CD).double()
    expected_DD = (1 - beta) ** 2 * covariance(own_nD) + gamma * torch.eye(dim)
    for c in (1, 2):
        expected_DD = expected_DD + beta**2 * share_nC[:, c].mean() * covariance(of_class(gaussians, c))
    centred_nD = means_nD - means_nD.mean(0)
    expected_DD = expected_DD + centred_nD.T @ centred_nD / count

    # Along directions, in which four standard errors hold for every one of 40 figures: the axes of largest
    # and of smallest variance, and random ones.
    axes = torch.linalg.eigh(expected_DD).eigenvectors
    random = torch.randn(dim, 10, generator=torch.Generator().manual_seed(2)).double()
    directions_DU = torch.cat([axes[:, -5:], axes[:, :5], random / random.norm(dim=0)], dim=1)
    variance_U = (directions_DU * (expected_DD @ directions_DU)).sum(0)
    along_MU = samples_MD @ directions_DU
    assert ((along_MU.mean(0) - means_nD.mean(0) @ directions_DU).abs() <= 4 * (variance_U / number).sqrt()).all()
    assert ((along_MU.var(0) - variance_U).abs() <= 4 * variance_U * (2 / number) ** 0.5).all()
    # Of all D² entries the normal law itself puts 6 in 100,000 beyond four standard errors.
    variance_D = expected_DD.diagonal()
    error_DD = ((variance_D[:, None] * variance_D + expected_DD.square()) / number).sqrt()
    beyond = ((samples_MD.T.cov() - expected_DD).abs() > 4 * error_DD).double().mean()
    assert beyond <= 4 / dim**2 + 2e-4


def test_a_large_class_that_is_not_head_keeps_its_parents(in_tukey_space):
    gaussians = fit(*skewed([40, 50], 4), num_classes=2)
    assert set(gaussians.factors) == {0, 1}
    support = find_support(gaussians, k=1)
    targets, seeded = torch.tensor([80, 0]), torch.Generator().manual_seed(0)
    ((samples_MD, _),) = generate_chunks(gaussians, support, targets, 1e-6, seeded)
    spread = samples_MD.var(0) / of_class(gaussians, 0).var(0)
    assert (spread > 1.3).all()  # the parents' spread and as much of their own around each


def ranks(world_size: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    gaussians = fit(*skewed([40, 9, 2, 1], 6), num_classes=4)
    support = find_support(gaussians, 2, head_classes(gaussians.counts_C, 20))
    shares, states = [], []
    for rank in range(world_size):
        generator = torch.Generator().manual_seed(seed)
        chunks = generate_chunks(
            gaussians,
            support,
            torch.tensor([0, 31, 38, 39]),
            0.4,
            generator,
            chunk=16,
            rank=rank,
            world_size=world_size,
        )
        features, labels = zip(*chunks, strict=True)
        shares.append((torch.cat(features), torch.cat(labels)))
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)  # the next epoch starts alike everywhere
    return shares


def test_each_rank_generates_its_own_share():
    shares, again = ranks(3), ranks(3)
    assert [len(labels) for _, labels in shares] == [36] * 3  # 108 samples
    assert torch.bincount(torch.cat([labels for _, labels in shares])).tolist() == [0, 31, 38, 39]
    for (features, labels), (features_again, labels_again) in zip(shares, again, strict=True):
        assert torch.equal(features, features_again)
        assert torch.equal(labels, labels_again)
    rows = torch.cat([features for features, _ in shares])
    assert len(rows.unique(dim=0)) == len(rows)  # no rank repeats another's noise


def test_ranks_are_even_where_samples_are_not():
    assert [len(labels) for _, labels in ranks(5)] == [21] * 5


def test_too_little_memory_for_a_chunk_is_reported(monkeypatch):
    gaussians = fit(*skewed([40, 9], 6), num_classes=2)
    monkeypatch.setattr(generation, "_free_memory", lambda device: 500)
    message = (
        r"a chunk of 31 features of 6 dimensions needs 0\.0 GB of memory, and 0\.0 GB are free; lower method\.chunk"
    )
    with pytest.raises(UserError, match=message):
        generate_chunks(gaussians, find_support(gaussians), torch.tensor([0, 31]), 0.4, torch.Generator())


def test_plain_arrays_in_plain_arrays_out():
    features, labels = (part.numpy() for part in skewed([30, 4, 1], 5))
    made, made_labels = generate(features, labels, seed=3)
    assert isinstance(made, np.ndarray)
    assert made.dtype == np.float32
    assert np.bincount(made_labels).tolist() == [0, 26, 29]
    assert (made >= 0).all()
    again, _ = generate(torch.from_numpy(features), torch.from_numpy(labels), seed=3)
    assert isinstance(again, Tensor)
    assert np.array_equal(made, again.numpy())
    none, no_labels = generate(features, labels, targets_C=np.zeros(3, int))
    assert (none.shape, no_labels.shape) == ((0, 5), (0,))


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1], {}, r"features must have shape \(N, D\) and labels \(N,\), got \(3, 2\) and \(2,\)"),
        ([0, 1, -1], {}, "labels must be integers from 0 on, .* with least -1"),
        ([0.0, 1.0, 1.0], {}, "labels must be integers from 0 on, .* got torch.float64"),
        ([0, 0, 2], {}, "class 1 has no features"),
        ([0, 0, 1], {"targets_C": [1]}, r"targets must be 2 integers >= 0, one per class, got \[1\]"),
        ([0, 0, 1], {"targets_C": [1, -1]}, "targets must be 2 integers >= 0"),
        ([0, 0, 1], {"k": 0}, "must be at least 1, got 0"),
        ([0, 0, 1], {"beta": -0.5}, r"β must lie in \[0, 1\], got -0\.5"),
        ([0, 0, 1], {"lam": -1.0}, "λ must be finite and >= 0, got -1"),
    ],
)
def test_plain_arrays_that_do_not_fit(labels, options, message):
    with pytest.raises(UserError, match=message):
        generate(np.ones((3, 2)), np.array(labels), **options)


def test_memory_that_is_held_is_not_asked_for_again(monkeypatch):
    gaussians = fit(*skewed([40, 9], 6), num_classes=2)
    support, targets, memory = find_support(gaussians), torch.tensor([0, 31]), torch.empty(31, 6)
    monkeypatch.setattr(generation, "_free_memory", lambda device: 0)
    assert len(list(generate_chunks(gaussians, support, targets, 0.4, torch.Generator(), memory=memory))) == 1
    with pytest.raises(UserError, match=r"lower method\.chunk"):
        generate_chunks(gaussians, support, targets, 0.4, torch.Generator())


def test_processes_share_what_is_free(monkeypatch):
    gaussians = fit(*skewed([40, 9], 6), num_classes=2)
    monkeypatch.setattr(generation, "free_memory", lambda device: 3 * 4 * 31 * 6)
    arguments = (gaussians, find_support(gaussians), torch.tensor([0, 31]), 0.4, torch.Generator())
    assert len(list(generate_chunks(*arguments))) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"lower method\.chunk"):
        generate_chunks(*arguments)


def test_features_that_a_network_gave_with_gradients_are_taken():
    features, labels = skewed([9, 4], 3)
    made, _ = generate(features.requires_grad_(), labels)
    assert not made.requires_grad


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32])
def test_integers_of_any_kind_are_labels(dtype):
    features, labels = (part.numpy() for part in skewed([9, 4], 3))
    _, made_labels = generate(features, labels.astype(dtype), targets_C=np.array([0, 5], dtype))
    assert made_labels.tolist() == [1] * 5
