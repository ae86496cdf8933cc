"""The cosine classifier by hand, and what is left of it in a saved model: a plain linear layer on unit features."""

import json
import math

import pytest
import torch
from test_networks import images, mixed
from torch import nn

from train.networks.cosine import CosineClassifier
from train.networks.model_files import load_model, load_weights, save_model
from train.networks.networks import build_network


@pytest.mark.parametrize(("branches", "scale"), [(1, 30.0), (2, 8.0)])
def test_logits_are_scaled_cosines(branches, scale):
    torch.manual_seed(0)
    classifier = CosineClassifier(6, 4, branches, scale)
    with torch.no_grad():
        classifier.weight *= 7  # lengths play no part
    features_BD = torch.rand(3, 6)
    features_BD = torch.cat([part / part.norm(dim=1, keepdim=True) for part in features_BD.chunk(branches, dim=1)], 1)
    for b, feature in enumerate(features_BD.tolist()):
        for c, row in enumerate(classifier.weight.tolist()):
            size, cosines = 6 // branches, []
            for first in range(0, 6, size):
                f, w = feature[first : first + size], row[first : first + size]
                cosines.append(sum(x * y for x, y in zip(f, w, strict=True)) / math.hypot(*f) / math.hypot(*w))
            expected = scale * sum(cosines) / branches
            assert classifier(features_BD)[b, c].item() == pytest.approx(expected, abs=1e-4)


def test_directions_begin_with_unit_length():
    torch.manual_seed(0)
    rows = CosineClassifier(6, 4, branches=2).weight.unflatten(1, (2, 3))
    torch.testing.assert_close(rows.norm(dim=2), torch.ones(4, 2))


@pytest.mark.parametrize("kind", ["plain", "bilateral"])
def test_a_saved_model_is_a_linear_layer_on_unit_features(kind, tmp_path):
    torch.manual_seed(0)
    network = build_network(kind, "resnet32", 7, classifier="cosine", scale=20.0)
    network.features(images(4))  # moves the running statistics
    network.eval()
    save_model(network, tmp_path)
    assert isinstance(network.classifier, CosineClassifier)  # stays what is trained
    spec = json.loads((tmp_path / "model.json").read_text())["network"]
    assert spec == {"kind": kind, "backbone": "resnet32", "num_classes": 7, "unit_features": True}
    loaded = load_model(tmp_path)
    assert type(loaded.classifier) is nn.Linear
    assert loaded.spec == network.spec == spec
    torch.testing.assert_close(loaded.predict(images(3)), network.predict(images(3)), rtol=1e-4, atol=1e-4)
    features_BD = loaded.features(images(3))
    parts = features_BD.chunk(loaded.branches, dim=1)
    assert all(part.norm(dim=1).tolist() == pytest.approx([1.0] * 3) for part in parts)
    assert torch.equal(loaded.predict(images(3)), loaded.classifier(features_BD))
    assert loaded.predict(images(3)).abs().max() <= 20.001
    # And what a second stage puts in its place is saved as it is.
    loaded.classifier = nn.Linear(loaded.classifier.in_features, 7)
    save_model(loaded, tmp_path / "second")
    torch.testing.assert_close(load_model(tmp_path / "second").predict(images(3)), loaded.predict(images(3)))


def test_models_saved_before_there_were_cosines_still_load(tmp_path):
    network = build_network("plain", "resnet32", 3)
    save_model(network, tmp_path)
    assert network.spec.keys() == {"kind", "backbone", "num_classes"}
    (tmp_path / "model.json").write_text(json.dumps(network.spec))
    torch.testing.assert_close(load_model(tmp_path).predict(images(2)), network.eval().predict(images(2)))


def test_raw_weights_go_back_into_what_is_trained(tmp_path):
    from train.engine.checkpoints import read_selected, save_selected

    torch.manual_seed(0)
    network = build_network("plain", "resnet32", 3, classifier="cosine")
    save_selected(tmp_path, network, 1, 0.5)
    other = build_network("plain", "resnet32", 3, classifier="cosine")
    load_weights(other, read_selected(tmp_path)[0])
    assert torch.equal(other.classifier.weight, network.classifier.weight)


def test_each_branch_has_cosines_of_its_own_and_both_are_averaged():
    torch.manual_seed(0)
    network = build_network("bilateral", "resnet32", 5, classifier="cosine", scale=30.0).eval()
    first, second = images(3), images(3, seed=1)
    z_c, z_r = network(first, second)
    f_c, f_r = network.features(first)[:, :64], network.features(second)[:, 64:]
    w_c, w_r = network.classifier.weight[:, :64], network.classifier.weight[:, 64:]
    torch.testing.assert_close(z_c, 30 * f_c @ (w_c / w_c.norm(dim=1, keepdim=True)).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z_r, 30 * f_r @ (w_r / w_r.norm(dim=1, keepdim=True)).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.predict(first), mixed(network(first, first), 0.5), rtol=1e-4, atol=1e-4)
