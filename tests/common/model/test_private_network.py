"""A private study freezes BatchNorm's scale and shift on both sides alike, and tells so."""

import pytest
from torch.nn.modules.batchnorm import _BatchNorm

from client.features.extract import FeatureSpec
from common.config.study import Study
from common.model import backbones
from common.model.network import assemble
from common.model.split import list_batchnorm

pytestmark = pytest.mark.numbers


def study(backbone="resnet18", unfreeze="last:1", **changes):
    content = {
        "name": "t",
        "classes": ["a", "b"],
        "model": {"backbone": backbone, "weights": "none", "unfreeze": unfreeze},
        "images": {"size": 64},
        "train": {"rounds": 1},
        "privacy": {"mechanism": "dp_sgd", "epsilon": 8, "delta": 1e-5},
    }
    return Study.model_validate({**content, **changes})


@pytest.mark.parametrize("name", backbones.names())
def test_what_every_backbone_can_train(name):
    backbone = backbones.get(name)
    model = backbone._outline(classes=3).eval()
    for unfreeze in ("head", "last:1", "all"):
        asked = backbone.trainable(model, unfreeze)
        held = list_batchnorm(model, asked)
        owners = {n: model.get_submodule(n.rpartition(".")[0]) for n in asked}
        assert held == tuple(n for n in asked if isinstance(owners[n], _BatchNorm))
        assert not any(n.startswith(backbone.head) for n in held)
        assert len(held) < len(asked)


def test_a_private_network_sends_less_and_says_so():
    open_ = assemble(study(privacy={"mechanism": "none"}), "none")
    closed = assemble(study(), "none")
    assert open_.frozen == ()
    assert closed.frozen == tuple(n for n in open_.trainable if n not in closed.trainable)
    assert closed.frozen
    assert all(".bn" in n or ".downsample.1." in n for n in closed.frozen)
    assert set(closed.tensors) == set(closed.initial) == set(closed.trainable)
    assert "suffix" in open_.contract.differences(closed.contract)
    trains = {n for n, p in closed.model.named_parameters() if p.requires_grad}
    assert trains == set(closed.trainable)


def test_prepared_images_serve_studies_with_privacy_and_without():
    keys = {
        FeatureSpec.of(assemble(study("resnet18", "head", **kind), "none"), "float32", "auto").key
        for kind in ({}, {"privacy": {"mechanism": "none"}})
    }
    assert len(keys) == 1
