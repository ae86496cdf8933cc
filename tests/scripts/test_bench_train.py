"""The training benchmark: that its ways compute the same, what it judges, and that it runs from end to end."""

import copy
import json

import pytest
import torch

import bench_train
from bench_train import Case, Loading, Mode, bbn, bench, judge, measure, one_pass, two_passes
from shards.errors import UserError
from train.networks.networks import build_network

TINY = Case("resnet32", 8, 4)


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Processes that begin at once, whatever memory they hold."""
    monkeypatch.setattr(bench_train, "START", "fork")


def test_all_ways_compute_the_same_step():
    torch.manual_seed(0)
    network = build_network("bilateral", "resnet32", 5)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 6, 16, 16, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 5, (2, 6), generator=generator)
    gradients = []
    for way in (bbn, one_pass, two_passes):
        own = copy.deepcopy(network)
        loss = way(own, *images, *labels)
        loss.backward()
        gradients.append([loss.detach(), own.conventional.conv1.weight.grad, own.trunk.conv1.weight.grad])
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=1e-3, atol=1e-4)


def test_a_run_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "CASES", {"cpu": [TINY]})
    monkeypatch.setattr(bench_train, "MODES", {"cpu": [Mode()]})
    bench(tmp_path / "new" / "result.json", rounds=2, seconds=0.01, loader="torch", loader_threads=1, images=100)
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert result["skipped"] == {}
    ways = result["results"]["resnet32, 8x8, 4+4"]["float32, channels last, 1 thread"]
    assert set(ways) == set(bench_train.WAYS)
    assert all((figures.get("peak_mb", 0) > 0) == (way != "bbn, loader") for way, figures in ways.items())
    assert all(len(figures["runs"]) == 2 and min(figures["runs"]) > 0 for figures in ways.values())
    (bar,) = result["bars"]
    assert bar["what"].endswith("bbn over two passes")
    assert bar["reached"] == (bar["measured"] >= 0.98)


def test_timms_models_are_measured_beside_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "CASES", {"cpu": [TINY, Case("timm/test_vit", 32, 2)]})
    monkeypatch.setattr(bench_train, "MODES", {"cpu": [Mode()]})
    few = {"rounds": 1, "seconds": 0.01, "loader": "torch", "loader_threads": 1, "images": 100}
    bench(tmp_path / "result.json", backbones=["timm/test_vit"], **few)
    result = json.loads((tmp_path / "result.json").read_text())
    ((mode, ways),) = result["results"]["timm/test_vit, 32x32, 2+2"].items()
    assert set(ways) == {"bbn", "plain", "timm"}
    assert set(result["ratios"]["timm/test_vit, 32x32, 2+2"][mode]) == {"bbn over plain", "bbn over timm"}
    with pytest.raises(UserError, match=r"backbones=\['resnet51'\] names no case of cpu; there are: resnet32, timm"):
        bench(tmp_path / "none.json", backbones=["resnet51"])


def test_what_cannot_run_is_left_out_and_named(monkeypatch, tmp_path):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(bench_train._LOSSES, "plain", no_memory)
    result = measure([TINY], [Mode()], "cpu", 1, 0.0, Loading("torch", 1, 100))
    assert result["skipped"] == {"resnet32, 8x8, 4+4: float32, channels last, 1 thread: plain": "CUDA out of memory."}
    assert "plain" not in result["results"]["resnet32, 8x8, 4+4"]["float32, channels last, 1 thread"]


def figures(*rates: float) -> dict:
    return {"images_per_second": sorted(rates)[len(rates) // 2], "runs": list(rates)}


def test_bars_on_a_gpu():
    papers, fast = str(bench_train.PAPERS_MODE), "bf16"
    slow = {"bbn": figures(110, 100, 90), "two passes": figures(100, 100, 100)}
    quick = {"bbn": figures(170, 140, 160), "two passes": figures(170, 170, 170)}
    measured = {"case": {papers: slow, fast: quick | {"bbn, loader": figures(165, 138, 152)}}}
    bars = {bar["what"]: bar for bar in judge(measured, "cuda")}
    assert bars[f"case: {papers}: bbn over two passes"]["reached"]
    assert not bars["case: bf16: bbn over two passes"]["reached"]
    assert bars["case: bf16: data loading's share of the step"]["reached"]
    assert bars["case: bf16: data loading's share of the step"]["measured"] == pytest.approx(1 - 165 / 170)
    best = bars[f"case: bbn (bf16) over two eager passes ({papers})"]
    assert best["measured"] == 1.6
    assert best["reached"]


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda needs an NVIDIA GPU and there is none; use --device cpu"):
        bench(tmp_path / "result.json", device="cuda")
    assert not list(tmp_path.iterdir())
