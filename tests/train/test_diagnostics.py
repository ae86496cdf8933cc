"""What a run keeps of its classifier and its features."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from train.engine.diagnostics import Compactness, norms, write_diagnostics
from train.networks.cosine import CosineClassifier
from train.networks.networks import build_network


class Tiny(nn.Module):
    """A classifier alone: its features are the images."""

    branches = 1

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def distances_of(features_ND, labels_N, accelerator, batch=3, num_classes=4):
    network = Tiny(nn.Linear(features_ND.shape[1], num_classes))
    with Compactness(network, num_classes) as compactness:
        for features_BD, labels_B in zip(features_ND.split(batch), labels_N.split(batch), strict=True):
            network.classifier(features_BD)
            compactness.add(labels_B)
    network.classifier(features_ND)  # no longer seen
    return compactness.distances(accelerator)


def test_the_distance_is_that_of_unit_features_from_their_mean(accelerator):
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.rand(50, 6, generator=generator) * torch.rand(50, 1, generator=generator) * 100
    labels_N = torch.arange(50) % 3
    found_C = distances_of(features_ND, labels_N, accelerator)
    unit_ND = (features_ND / features_ND.norm(dim=1, keepdim=True)).double().numpy()
    for label in range(3):
        mine_ND = unit_ND[labels_N.numpy() == label]
        squares_N = ((mine_ND - mine_ND.mean(axis=0)) ** 2).sum(axis=1)
        assert found_C[label] == pytest.approx((squares_N.sum() / (len(mine_ND) - 1)) ** 0.5, rel=1e-4)
    assert np.isnan(found_C[3])
    assert found_C == pytest.approx(distances_of(features_ND, labels_N, accelerator, batch=50), nan_ok=True, rel=1e-4)


def test_one_image_has_no_distance_and_equal_ones_have_none(accelerator):
    features_ND = torch.tensor([[1.0, 0], [2, 0], [0, 1]])
    found_C = distances_of(features_ND, torch.tensor([0, 0, 1]), accelerator)
    assert found_C[0] == 0
    assert np.isnan(found_C[1:]).all()


def test_a_method_that_classifies_in_its_own_way_has_no_distances(accelerator):
    network = Tiny(nn.Linear(2, 2))
    with Compactness(network, 2) as compactness:
        network.classifier(torch.rand(6, 2))  # two views of three images, say
        compactness.add(torch.tensor([0, 1, 1]))
    assert np.isnan(compactness.distances(accelerator)).all()


def test_norms_of_both_branches_add_up(tmp_path):
    network = build_network("bilateral", "resnet10", 5)
    write_diagnostics(tmp_path, network, beta=None, distances=np.ones(5))
    with np.load(tmp_path / "diagnostics.npz") as kept:
        assert set(kept) == {"norms", "norms_conventional", "norms_rebalancing", "distances"}
        assert {kept[name].dtype for name in kept} == {np.dtype("float32")}
        halves = np.hypot(kept["norms_conventional"], kept["norms_rebalancing"])
        assert kept["norms"] == pytest.approx(halves)
        assert kept["norms"] == pytest.approx(network.classifier.weight.norm(dim=1).detach().numpy())


def test_the_norms_of_a_cosine_classifier_are_those_it_multiplies_with():
    assert norms(CosineClassifier(8, 3, branches=2, scale=30.0), 2)["norms_conventional"] == pytest.approx([15] * 3)
