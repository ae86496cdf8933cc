"""The sample of features that is kept for a picture."""

import numpy as np
import pytest
import torch

from train.features.gaussians import find_support, fit
from train.features.mixing import Mixture
from train.features.sample import EACH, write_sample


def mixture_of(counts):
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    features_ND = torch.rand(len(labels_N), 5, generator=generator).half()
    gaussians = fit(features_ND, labels_N, num_classes=len(counts))
    targets_C = gaussians.counts_C.max() - gaussians.counts_C
    return Mixture(features_ND, labels_N, gaussians, find_support(gaussians), targets_C, rank=1, world_size=2)


def test_the_largest_and_the_smallest_classes_and_few_features_of_each(tmp_path):
    counts = [100, 90, 80, 70, 30, 20, 9, 5, 2, 1]
    mixture = mixture_of(counts)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_sample(tmp_path / name, mixture, torch.full((10,), 0.5), seed=0)
    with np.load(tmp_path / "a/feature_sample.npz") as kept, np.load(tmp_path / "b/feature_sample.npz") as again:
        features, labels, generated = (kept[name] for name in ("features", "labels", "generated"))
        assert np.array_equal(features, again["features"])
    assert features.dtype == np.float16
    assert features.shape == (len(labels), 5)
    assert sorted(set(labels)) == [0, 1, 2, 3, 6, 7, 8, 9]
    real = np.bincount(labels[~generated], minlength=10)
    assert real.tolist() == [40, 40, 40, 40, 0, 0, 9, 5, 2, 1]
    made = np.bincount(labels[generated], minlength=10)
    assert made.tolist() == [0, 10, 20, 30, 0, 0, *[EACH] * 4]
    of_the_bank = {tuple(row) for row in mixture.features_ND.tolist()}
    assert {tuple(row) for row in features[~generated].astype(float).tolist()} <= of_the_bank


@pytest.mark.parametrize("counts", [[7], [6, 6]])
def test_where_nothing_is_generated_nothing_is_kept(tmp_path, counts):
    write_sample(tmp_path, mixture_of(counts), 0.5, seed=0)
    assert not list(tmp_path.iterdir())


def test_what_half_precision_cannot_hold_is_not_infinite(tmp_path):
    labels_N = torch.repeat_interleave(torch.arange(4), torch.tensor([100, 60, 20, 5]))
    features_ND = torch.randn(185, 16, generator=torch.Generator().manual_seed(0)).clamp(min=0).half()
    gaussians = fit(features_ND, labels_N, num_classes=4, lam=0.0)
    targets_C = gaussians.counts_C.max() - gaussians.counts_C
    mixture = Mixture(features_ND, labels_N, gaussians, find_support(gaussians), targets_C)
    write_sample(tmp_path, mixture, 0.0, seed=0)
    with np.load(tmp_path / "feature_sample.npz") as kept:
        assert np.isfinite(kept["features"]).all()
