"""Feature generation, against covariances formed explicitly."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shards.errors import UserError
from train.features import gaussians as module
from train.features import generation
from train.features.gaussians import ClassGaussians, Support, find_support, fit, fitting_lambda, inverse_tukey, tukey
from train.features.generation import generate_chunks


def make(counts: list[int], dim: int, lam: float = 0.5, seed: int = 0) -> tuple[ClassGaussians, list[Tensor]]:
    """Fit shuffled skewed features; also return the Tukey'd features per class, in bank order."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.repeat_interleave(torch.tensor(counts))
    labels_N = labels_N[torch.randperm(len(labels_N), generator=generator)]
    features_ND = (torch.randn(len(labels_N), dim, generator=generator) + 0.5 * labels_N[:, None]).square()
    gaussians = fit(features_ND, labels_N, len(counts), lam)
    return gaussians, [tukey(features_ND[labels_N == c], lam) for c in range(len(counts))]


def collect(*args, **kwargs) -> tuple[Tensor, Tensor]:
    chunks = list(generate_chunks(*args, **kwargs))
    return torch.cat([features for features, _ in chunks]), torch.cat([labels for _, labels in chunks])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_moments(samples_MD: Tensor, mean_D: Tensor, covariance_DD: Tensor) -> None:
    """Mean and covariance within 4 standard errors of the ones given (Gaussian samples)."""
    number = len(samples_MD)
    variance_D = covariance_DD.diagonal()
    mean_error_D = (variance_D / number).sqrt()
    assert ((samples_MD.mean(0) - mean_D).abs() <= 4 * mean_error_D + 1e-5).all()
    error_DD = ((variance_D[:, None] * variance_D + covariance_DD.square()) / number).sqrt()
    assert ((samples_MD.T.cov() - covariance_DD).abs() <= 4 * error_DD + 1e-5).all()


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0, 2.0])
def test_tukey_round_trip(lam):
    features = torch.tensor([0.0, 1e-4, 0.5, 1.0, 30.0])
    torch.testing.assert_close(inverse_tukey(tukey(features, lam), lam), features, rtol=1e-4, atol=1e-6)


def test_tukey_values():
    torch.testing.assert_close(tukey(torch.tensor([4.0, 9.0])), torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(tukey(torch.tensor([0.0, 1.0]), 0), torch.tensor([np.log(1e-6), 1e-6]).float())
    torch.testing.assert_close(inverse_tukey(torch.tensor([-1.0, 3.0])), torch.tensor([0.0, 9.0]))
    assert inverse_tukey(torch.tensor([-50.0]), 0).item() == 0
    assert tukey(torch.ones(2, dtype=torch.float16)).dtype == torch.float32


def test_lambda_1_keeps_negative_features():
    features = torch.tensor([-2.0, 3.0])
    assert torch.equal(inverse_tukey(tukey(features, 1), 1), features)


@pytest.mark.parametrize("lam", [-0.5, float("nan"), float("inf")])
def test_lambda_out_of_range(lam):
    with pytest.raises(UserError, match=rf"λ must be finite and >= 0, got {lam}"):
        tukey(torch.ones(1), lam)
    with pytest.raises(UserError, match="λ must be finite"):
        inverse_tukey(torch.ones(1), lam)


@pytest.mark.parametrize("lam", [0, 0.5, 2])
def test_negative_features(lam):
    with pytest.raises(UserError, match=rf"negative values \(least: -0\.25\), for which Tukey's λ={lam} is"):
        tukey(torch.tensor([1.0, -0.25]), lam)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_not_finite(value):
    with pytest.raises(UserError, match="features hold nan or inf"):
        tukey(torch.tensor([1.0, value]), 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_negative_features_take_lambda_1(dtype, monkeypatch):
    monkeypatch.setattr("train.features.gaussians.FEATURES_PER_BLOCK", 2)
    features_ND = torch.rand(5, 3).to(dtype)
    assert fitting_lambda(features_ND, 0.5) == 0.5
    assert fitting_lambda(features_ND, 0.0) == 0.0
    features_ND[4, 2] = -1e-3
    assert (
        fitting_lambda(features_ND, 0.5) == fitting_lambda(features_ND, 0.0) == fitting_lambda(features_ND, 1.0) == 1.0
    )


def test_the_power_that_keeps_signs_would_make_two_humps():
    """The reason that the module gives: its density at 0 is 0, and the kurtosis falls far below a Gaussian's 3."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    y = x.sign() * x.abs() ** 0.5
    kurtosis = [((v - v.mean()) ** 4).mean() / v.var() ** 2 for v in (x, y)]
    assert kurtosis[0] == pytest.approx(3, abs=0.1)
    assert kurtosis[1] < 1.8
    near = ((y.abs() < 0.05).sum() / (x.abs() < 0.05).sum()).item()
    assert near < 0.1


def test_fit_sorts_by_class():
    gaussians, by_class = make([3, 1, 5], dim=2)
    assert gaussians.counts_C.tolist() == [3, 1, 5]
    assert gaussians.starts_C.tolist() == [0, 3, 4]
    assert gaussians.labels_N.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert torch.equal(gaussians.features_ND, torch.cat(by_class))
    torch.testing.assert_close(gaussians.means_CD, torch.stack([features.mean(0) for features in by_class]))


def test_fit_in_blocks_of_half_precision_is_the_same(monkeypatch):
    monkeypatch.setattr(module, "FEATURES_PER_BLOCK", 4)
    features_ND = torch.rand(9, 2, generator=seeded()).half()
    labels_N = torch.tensor([2, 0, 2, 1, 0, 2, 2, 0, 2])
    gaussians = fit(features_ND, labels_N, 3)
    assert gaussians.features_ND.dtype == torch.float32
    assert torch.equal(gaussians.features_ND, features_ND[labels_N.sort(stable=True).indices].float().sqrt())


def test_only_classes_with_more_samples_than_dimensions_have_a_factor():
    gaussians, by_class = make([4, 3, 2], dim=3)
    assert list(gaussians.factors) == [0]
    torch.testing.assert_close(gaussians.factors[0].T @ gaussians.factors[0], by_class[0].T.cov())


def test_fit_names_the_class_without_features():
    with pytest.raises(UserError, match=r"class 1 has no features \(2 such classes\)"):
        fit(torch.ones(2, 3), torch.tensor([0, 2]), 4)
    with pytest.raises(UserError, match="class 0 has no features"):
        fit(torch.ones(0, 3), torch.zeros(0, dtype=torch.int64), 1)


def test_features_that_nothing_is_drawn_from_are_held_as_they_are():
    features_ND, labels_N = torch.rand(5, 3).half() - 0.5, torch.tensor([0, 0, 1, 2, 2])
    held = module.held(features_ND, labels_N, 3)
    assert held.features_ND is features_ND
    assert (held.counts_C.tolist(), held.starts_C.tolist(), held.factors) == ([2, 1, 2], [0, 2, 3], {})
    with pytest.raises(UserError, match=r"class 3 has no features \(1 such classes\)"):
        module.held(features_ND, labels_N, 4)


def test_support_matches_the_paper_by_hand():
    # Class means on a line at 0, 1, 3, 10; the parent of class 3 stands at 2.5 (λ=1 keeps the numbers plain).
    positions = [0.0] * 4 + [1.0] * 3 + [3.0] * 2 + [2.5]
    labels_N = torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [3])
    gaussians = fit(torch.tensor(positions)[:, None], labels_N, 4, lam=1)
    support = find_support(gaussians, k=2)
    assert support.classes_NK[-1].tolist() == [2, 1]  # d = 0.5 and 1.5
    omega = torch.tensor([2 / 0.5, 3 / 1.5])
    torch.testing.assert_close(support.weights_NK[-1], omega / omega.sum())
    # The parents of class 2 (n=2) see classes 1 and 0, those of class 1 only class 0, those of class 0 none.
    assert support.classes_NK[7].tolist() == [1, 0]
    torch.testing.assert_close(support.weights_NK[4:7], torch.tensor([[1.0, 0.0]] * 3))
    assert not support.weights_NK[:4].any()


def test_support_is_strictly_larger():
    gaussians, _ = make([5, 5, 2, 2], dim=3)
    support = find_support(gaussians, k=3)
    assert not support.weights_NK[:10].any()
    assert (support.weights_NK[10:] > 0).sum(1).tolist() == [2] * 4  # K=3, yet only two are larger
    assert set(support.classes_NK[10:, :2].flatten().tolist()) == {0, 1}


def test_support_against_brute_force(monkeypatch):
    monkeypatch.setattr(module, "PARENTS_PER_BLOCK", 7)
    monkeypatch.setattr(module, "SHORTLIST", 4)
    counts = torch.randint(1, 9, (30,), generator=seeded(1)).tolist()
    gaussians, _ = make(counts, dim=3)
    support = find_support(gaussians, k=3)
    for i, label in enumerate(gaussians.labels_N.tolist()):
        distances = (gaussians.features_ND[i] - gaussians.means_CD).norm(dim=1)
        larger = [c for c in range(30) if counts[c] > counts[label]]
        expected = sorted(larger, key=lambda c: distances[c].item())[:3]
        found = support.classes_NK[i][support.weights_NK[i] > 0].tolist()
        assert found == expected


def test_many_classes_to_borrow_from_take_no_more_memory(monkeypatch):
    sizes, gather = [], Tensor.gather
    monkeypatch.setattr(Tensor, "gather", lambda self, *of: sizes.append(self.numel()) or gather(self, *of))
    gaussians, _ = make([9, *[8] * 40, *[1] * 40], dim=2)
    monkeypatch.setattr(module, "PARENTS_PER_BLOCK", 16)
    for k in (1, 32):
        find_support(gaussians, k)
    assert max(sizes) <= 16 * module.SHORTLIST


def test_support_on_top_of_a_mean_stays_finite():
    gaussians = fit(torch.tensor([[1.0]] * 3 + [[1.0]]), torch.tensor([0, 0, 0, 1]), 2)
    assert find_support(gaussians, k=1).weights_NK[-1].item() == 1
    collapsed = fit(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]), 2)
    assert torch.isfinite(find_support(collapsed, k=2).weights_NK).all()


def test_nearness_counts_up_to_a_thousandth_of_the_means_length():
    # Means at 2 (n=4) and 4 (n=3); the parent stands on the second, whose distance counts as 1e-3·(2+4+4)/3.
    gaussians = fit(
        torch.tensor([2.0] * 4 + [4.0] * 3 + [4.0])[:, None], torch.tensor([0] * 4 + [1] * 3 + [2]), 3, lam=1
    )
    support = find_support(gaussians, k=2)
    omega = torch.tensor([3 / (1e-3 * 10 / 3), 4 / 2.0])
    assert support.classes_NK[-1].tolist() == [1, 0]
    torch.testing.assert_close(support.weights_NK[-1], omega / omega.sum())


def test_support_skips_head_classes():
    gaussians, _ = make([5, 3, 2], dim=3)
    support = find_support(gaussians, k=1, head_C=torch.tensor([True, True, False]))
    assert not support.weights_NK[:8].any()
    assert support.weights_NK[8:].tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("k", [0, -1])
def test_k_out_of_range(k):
    with pytest.raises(UserError, match=f"must be at least 1, got {k}"):
        find_support(make([3, 2], dim=2)[0], k)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_calibrated_moments(count, beta, in_tukey_space):
    """Eq. 8 and 9 at D=4: n_c = 1, 2, D−1 and D+1, one parent at a time."""
    gaussians, by_class = make([30, 20, count], dim=4)
    support = find_support(gaussians, k=2)
    number = 40_000 * count
    samples_MD, labels_M = collect(gaussians, support, torch.tensor([0, 0, number]), beta, seeded(), gamma=0.02)
    assert (labels_M == 2).all()
    # A mixture over the parents: the mean of their means; own spread plus the spread of their means.
    parents = range(50, 50 + count)
    own_DD = by_class[2].T.cov() if count > 1 else torch.zeros(4, 4)
    means, covariances = [], []
    for i in parents:
        weights_K, classes_K = support.weights_NK[i], support.classes_NK[i]
        borrowed_D = sum(w * gaussians.means_CD[c] for w, c in zip(weights_K, classes_K, strict=True))
        borrowed_DD = sum(w * by_class[c].T.cov() for w, c in zip(weights_K, classes_K, strict=True))
        means.append((1 - beta) * gaussians.features_ND[i] + beta * borrowed_D)
        covariances.append((1 - beta) ** 2 * own_DD + beta**2 * borrowed_DD + 0.02 * torch.eye(4))
    spread_DD = torch.stack(means).T.cov(correction=0) if count > 1 else torch.zeros(4, 4)
    assert_moments(samples_MD, torch.stack(means).mean(0), torch.stack(covariances).mean(0) + spread_DD)


def test_head_is_sampled_from_its_own_gaussian(in_tukey_space):
    gaussians, by_class = make([30, 9], dim=3)
    support = find_support(gaussians, head_C=torch.tensor([True, True]))
    samples_MD, _ = collect(gaussians, support, torch.tensor([0, 50_000]), 0.8, seeded())
    assert_moments(samples_MD, by_class[1].mean(0), by_class[1].T.cov())


def test_single_sample_without_anything_to_borrow_is_copied():
    gaussians, by_class = make([1, 1], dim=3)
    samples_MD, labels_M = collect(gaussians, find_support(gaussians), torch.tensor([2, 3]), 0.6, seeded())
    torch.testing.assert_close(samples_MD, torch.cat(by_class).square()[labels_M])


def test_beta_per_class():
    gaussians, by_class = make([30, 1, 1], dim=3)
    beta_C = torch.tensor([0.0, 0.0, 1.0])
    samples_MD, labels_M = collect(gaussians, find_support(gaussians), torch.tensor([0, 5, 5]), beta_C, seeded())
    torch.testing.assert_close(samples_MD[labels_M == 1], by_class[1].square().expand(5, 3))
    assert samples_MD[labels_M == 2].std(0).min() > 0


def test_targets_chunks_and_order():
    gaussians, _ = make([6, 3, 2], dim=2)
    chunks = list(
        generate_chunks(gaussians, find_support(gaussians), torch.tensor([0, 40, 60]), 0.4, seeded(), chunk=32)
    )
    assert [len(labels) for _, labels in chunks] == [32, 32, 32, 4]
    assert [len(features) for features, _ in chunks] == [32, 32, 32, 4]
    labels = torch.cat([labels for _, labels in chunks])
    assert torch.bincount(labels, minlength=3).tolist() == [0, 40, 60]
    assert all(len(labels.unique()) == 2 for _, labels in chunks[:3])  # shuffled over classes
    assert all((features >= 0).all() for features, _ in chunks)


def test_no_targets_generate_nothing():
    gaussians, _ = make([3, 2], dim=2)
    assert list(generate_chunks(gaussians, find_support(gaussians), torch.tensor([0, 0]), 0.4, seeded())) == []


def test_parents_take_turns_from_a_random_first_one():
    gaussians, _ = make([5, 4], dim=2)
    used = torch.bincount(generation.take_turns(gaussians, torch.tensor([0, 10]), seeded()), minlength=9)
    assert used[:5].sum() == 0
    assert sorted(used[5:].tolist()) == [2, 2, 3, 3]
    firsts = {generation.take_turns(gaussians, torch.tensor([1, 0]), seeded(i)).item() for i in range(40)}
    assert firsts == {0, 1, 2, 3, 4}


def test_seed_decides_everything():
    gaussians, _ = make([6, 3, 2], dim=2)
    args = (gaussians, find_support(gaussians), torch.tensor([1, 9, 9]), 0.4)
    first, again, other = (collect(*args, seeded(seed), gamma=0.1, chunk=8) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_noise_in_blocks_is_the_same_distribution(monkeypatch, in_tukey_space):
    monkeypatch.setattr(generation, "BLOCK_VALUES", 1000)
    gaussians, by_class = make([30], dim=3)
    support = find_support(gaussians, head_C=torch.tensor([True]))
    samples_MD, _ = collect(gaussians, support, torch.tensor([20_000]), 0.0, seeded())
    assert_moments(samples_MD, by_class[0].mean(0), by_class[0].T.cov())


def test_samples_leave_tukeys_space(monkeypatch):
    gaussians, _ = make([6, 3], dim=2)
    args = (gaussians, find_support(gaussians), torch.tensor([0, 50]), 0.4)
    in_feature, _ = collect(*args, seeded())
    monkeypatch.setattr(generation, "inverse_tukey_", lambda samples_MD, lam: samples_MD)
    in_tukey, _ = collect(*args, seeded())
    torch.testing.assert_close(in_feature, in_tukey.clamp(min=0).square())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 1.5}, r"β must lie in \[0, 1\], got 1\.5"),
        ({"beta": torch.tensor([0.5, -0.1])}, r"β must lie in \[0, 1\], got -0\.1"),
        ({"beta": float("nan")}, r"β must lie in \[0, 1\], got nan"),
        ({"gamma": -0.1}, r"γ must be finite and >= 0, got -0\.1"),
        ({"chunk": 0}, "a chunk must have at least 1 row, got 0"),
    ],
)
def test_settings_out_of_range_are_reported_at_once(setting, message):
    gaussians, _ = make([3, 2], dim=2)
    settings = {"beta": 0.5} | setting
    with pytest.raises(UserError, match=message):
        generate_chunks(gaussians, find_support(gaussians), torch.tensor([0, 1]), generator=seeded(), **settings)


def test_support_is_a_plain_value(in_tukey_space):
    # Nothing ties a support to where it came from: a hand-made one is obeyed.
    gaussians, by_class = make([2, 2], dim=2)
    support = Support(torch.tensor([[1]] * 4), torch.tensor([[1.0]] * 2 + [[0.0]] * 2), torch.zeros(2).bool())
    samples_MD, _ = collect(gaussians, support, torch.tensor([20_000, 0]), 1.0, seeded())
    assert_moments(samples_MD, by_class[1].mean(0), by_class[1].T.cov())
