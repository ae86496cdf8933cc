"""The benchmark of train.predict, small: its figures come from what it says it measures."""

import json

import pytest

from bench_predict import bench
from shards.errors import UserError


def test_a_small_run_holds_every_figure(tmp_path, capsys):
    bench(tmp_path / "result.json", images=9, rounds=2, batch=2, backbone="resnet32", size=16)
    kept = json.loads((tmp_path / "result.json").read_text())
    assert kept["results"].keys() == {"predict", "network", "pictures"}
    for figures in kept["results"].values():
        assert len(figures["runs"]) == 2
        assert all(run["images_per_second"] > 0 and run["cpu_ms"] > 0 for run in figures["runs"])
    (bar,) = kept["bars"]
    ours, bare = (kept["results"][way]["runs"] for way in ("predict", "network"))
    ratios = [one["images_per_second"] / other["images_per_second"] for one, other in zip(ours, bare, strict=True)]
    assert bar["measured"] == pytest.approx(sum(ratios) / 2)
    assert bar["reached"] == (bar["measured"] >= 0.9)
    assert {"command", "commit", "environment", "images", "batch"} <= kept.keys()
    assert "predict over its bare network" in capsys.readouterr().err


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="give more images"):
        bench(tmp_path / "result.json", images=3, rounds=2, batch=2)
    assert not (tmp_path / "result.json").exists()
