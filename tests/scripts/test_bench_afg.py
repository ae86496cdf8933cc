"""The benchmark of the feature generator, made small: it measures what it says."""

import json

import pytest
import torch

import bench_afg
from shards.errors import UserError
from train.features.gaussians import find_support, fit
from train.features.generation import _sample


def test_it_writes_every_figure_and_judges_the_bars(tmp_path, monkeypatch):
    # The package would come over the network.
    monkeypatch.setattr(bench_afg, "fetch_tailcalib", lambda folder: "not installed: a test")
    bench_afg.bench(json=tmp_path / "made/bench.json", size=0.02, chunks=1, peers=0.1)
    kept = json.loads((tmp_path / "made/bench.json").read_text())
    compared = kept["results"]["imagenet-lt"]
    assert set(compared["samplers"]) == {"ours", "cholesky", "multivariate"}
    assert compared["skipped"] == {"tailcalib": "not installed: a test"}
    for row in compared["samplers"].values():
        assert row["samples_per_second"] == pytest.approx(compared["samples"] / row["seconds"])
    scale = kept["results"]["inat2018"]
    assert 0 < scale["measured_samples"] < scale["samples_per_epoch"]
    assert 0 < scale["memory_above_bank_gb"] < 5
    assert [bar["figure"] for bar in kept["bars"]] == list(kept["figures"])
    by_figure = {bar["figure"]: bar for bar in kept["bars"]}
    assert by_figure["times_tailcalib_at_512"]["reached"] is None
    assert by_figure["memory_above_bank_gb"]["reached"] is True


def test_made_counts_have_the_size_they_stand_for():
    counts = bench_afg.made_counts(8142, 1000, 2, 437_513)
    assert (len(counts), counts[0], min(counts)) == (8142, 1000, 2)
    assert sum(counts) == pytest.approx(437_513, rel=0.01)


def test_all_samplers_draw_from_the_same_gaussians(tmp_path):
    """The peers' explicit mean and covariance of a parent are those of our samples."""
    case = bench_afg.make_case(tmp_path, "small", [60, 40, 5], 4)
    gaussians = fit(case.features_ND, case.labels_N, 3)
    support = find_support(gaussians, 2)
    parent = torch.tensor([100])
    means_1D, spread_1DD = bench_afg.calibrated(gaussians, support, bench_afg.covariances(gaussians), parent)
    beta, generator = torch.tensor([0.0, 0.0, bench_afg.BETA]), torch.Generator().manual_seed(0)
    samples_MD = _sample(gaussians, support, parent.expand(20_000), beta, generator)
    error_D = (spread_1DD[0].diagonal() / 20_000).sqrt()
    assert ((samples_MD.mean(0) - means_1D[0]).abs() < 4 * error_D).all()
    torch.testing.assert_close(samples_MD.T.cov(), spread_1DD[0], rtol=0.1, atol=0.01)


def test_wrong_arguments_are_reported(tmp_path):
    with pytest.raises(UserError, match="peers and size must lie in"):
        bench_afg.bench(peers=0)
    with pytest.raises(UserError, match="cannot be read"):
        bench_afg.bench(imagenet_lt=tmp_path / "none.json")
    (tmp_path / "counts.json").write_text("[3, 0]")
    with pytest.raises(UserError, match="list of positive integers"):
        bench_afg.bench(inat2018=tmp_path / "counts.json")
