"""What cannot be trained privately stays frozen, on both sides alike, and is told."""

from fnmatch import fnmatch

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

from client.features import Recipe
from common import backbones, private
from common.network import assemble
from common.study import Study

pytestmark = pytest.mark.numbers

SIZES = {"inception_v3": 96, "vit_b_16": 224}
HELD = {
    "convnext_tiny": ["*.layer_scale", "classifier.0.*", "features.6.0.*"],
    "squeezenet1_0": [],
    "squeezenet1_1": [],
    "swin_t": ["*.attn.*"],
    "vgg16": [],
    "vit_b_16": ["*.self_attention.*"],
}
"""What `last:1` may not train; everywhere else, BatchNorm."""


def study(backbone="resnet18", unfreeze="last:1", **changes):
    content = {
        "name": "t",
        "classes": ["a", "b"],
        "model": {"backbone": backbone, "weights": "none", "unfreeze": unfreeze},
        "images": {"size": SIZES.get(backbone, 64)},
        "train": {"rounds": 1},
        "privacy": {"mechanism": "dp_sgd", "epsilon": 8, "delta": 1e-5},
    }
    return Study.model_validate({**content, **changes})


@pytest.mark.parametrize("name", backbones.names())
def test_what_every_backbone_can_train(name):
    backbone = backbones.get(name)
    model = backbone._outline(classes=3).eval()
    everything = private.hookable(model, backbone.trainable(model, "all"), SIZES.get(name, 64))
    for unfreeze in ("head", "last:1", "all"):
        asked = backbone.trainable(model, unfreeze)
        kept = [n for n in asked if n in everything]
        owners = {type(model.get_submodule(n.rpartition(".")[0])) for n in kept}
        assert owners <= set(private.LAYERS)
        assert {n for n in asked if n.startswith(backbone.head)} <= set(kept)
        held = [n for n in asked if n not in kept]
        if unfreeze == "last:1":
            if name in HELD:
                patterns = HELD[name]
                assert held == [n for n in asked if any(fnmatch(n, p) for p in patterns)]
                assert all(any(fnmatch(n, p) for n in held) for p in patterns)
            else:
                norms = {n for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
                assert held == [n for n in asked if n.rpartition(".")[0] in norms]
            assert len(kept) > 2


class Strange(nn.Module):
    """One of everything that must stay frozen, and one layer that may train."""

    def __init__(self):
        super().__init__()
        self.good = nn.Conv2d(3, 4, 3)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.twice = nn.Linear(4, 4)
        self.functional = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.mirrored(self.good(x))).flatten(2).mT * self.scale
        x = F.linear(self.twice(self.twice(x)), self.functional.weight, self.functional.bias)
        return self.head(self.attention(x, x, x)[0].mean(1))


def test_whatever_is_not_called_as_a_known_layer_once_stays_frozen():
    model = Strange().eval()
    names = [name for name, _ in model.named_parameters()]
    kept = private.hookable(model, names, 8)
    assert kept == ("good.weight", "good.bias", "head.weight", "head.bias")
    assert private.hookable(model, ["head.bias", "scale"], 8) == ("head.bias",)


def test_looking_changes_nothing():
    model = Strange().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    private.hookable(model, [name for name, _ in model.named_parameters()], 8)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    assert not any(module._forward_hooks for module in model.modules())


def test_a_private_network_sends_less_and_says_so():
    open_ = assemble(study(privacy={"mechanism": "none"}), "none")
    closed = assemble(study(), "none")
    assert open_.held == ()
    assert closed.held == tuple(n for n in open_.trainable if n not in closed.trainable)
    assert closed.held
    assert all(".bn" in n or ".downsample.1." in n for n in closed.held)
    assert set(closed.tensors) == set(closed.initial) == set(closed.trainable)
    assert "suffix" in open_.contract.differences(closed.contract)
    trains = {n for n, p in closed.model.named_parameters() if p.requires_grad}
    assert trains == set(closed.trainable)


def test_what_trains_privately_is_prepared():
    network = assemble(study("efficientnet_b0", "last:3"), "none")
    parts = list(network.split.suffix.modules())
    depths = [part for part in parts if isinstance(part, StochasticDepth)]
    assert depths
    assert all(part.p == 0 for part in depths)
    assert any(hasattr(part, "inplace") for part in parts)
    assert not any(getattr(part, "inplace", False) for part in parts)


def test_prepared_images_serve_studies_with_privacy_and_without():
    keys = {
        Recipe.of(assemble(study("resnet18", "head", **kind), "none"), "float32", "auto").key
        for kind in ({}, {"privacy": {"mechanism": "none"}})
    }
    assert len(keys) == 1
