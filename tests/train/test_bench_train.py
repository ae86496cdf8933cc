"""The benchmark compares like with like, and writes what it promises."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from train.networks import build_network

PATH = Path(__file__).parents[2] / "scripts" / "bench_train.py"


@pytest.fixture(scope="module")
def bench_train():
    spec = importlib.util.spec_from_file_location("bench_train", PATH)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "bench_train", module)
        spec.loader.exec_module(module)
        yield module


def test_both_ways_are_the_same_step(bench_train):
    torch.manual_seed(0)
    network = build_network("bilateral", "resnet32", 5)
    streams = bench_train.made_streams(4, 16, 5, torch.device("cpu"))
    losses = [step(network, streams) for step in (bench_train.bbn_step, bench_train.two_passes_step)]
    torch.testing.assert_close(*losses)


def test_everything_is_measured(bench_train, tmp_path, digits):
    out = tmp_path / "below" / "out.json"
    bench_train.bench(out, image_size=8, batch_size=4, classes=10, steps=1, rounds=2, device="cpu", data=digits.root)
    told = json.loads(out.read_text())
    settings = [f"float32, channels {layout}" for layout in ("last", "first")]
    names = {f"{kind}, {setting}" for kind in ("bbn", "two passes", "single") for setting in settings}
    assert told["images_per_second"].keys() == names | {"loader, bbn, float32, channels last"}
    assert {len(seconds) for seconds in told["seconds_per_step"].values()} == {2}
    rates = told["images_per_second"]
    assert told["bbn_over_two_passes"].keys() == told["bbn_over_single"].keys() == set(settings)
    assert told["bbn_over_single"][settings[0]] == rates[f"bbn, {settings[0]}"] / rates[f"single, {settings[0]}"]
    assert told["loader_share_of_step"].keys() == {"loader, bbn, float32, channels last"}
