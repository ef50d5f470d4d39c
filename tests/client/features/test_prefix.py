"""The frozen prefix runs fast and says the same; what is kept of an image is what pays."""

import pytest
import torch
from torch import nn

from client.features.prefix import BATCH, CacheDecision, Prefix
from common.model import backbones
from common.model.images import Preprocess
from common.model.split import Split, split

pytestmark = pytest.mark.numbers

SIZES = {"vit_b_16": 224, "inception_v3": 96}
# Of which a batch takes seconds.
EVERY = [
    pytest.param(name, marks=[pytest.mark.slow] if name == "vit_b_16" else [])
    for name in backbones.REGISTRY
]
LIKE = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def parts(name, unfreeze="head"):
    """The backbone's two parts, its batch norms as if they had seen images."""
    backbone = backbones.get(name)
    model = backbone.build(classes=3, dropout=0.0, weights="none", seed=0)
    draw = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.3, generator=draw)
            part.running_var.uniform_(0.5, 2.0, generator=draw)
            part.weight.data.uniform_(0.5, 1.5, generator=draw)
            part.bias.data.normal_(0, 0.3, generator=draw)
    size = SIZES.get(name, 64)
    return split(model, backbone.trainable(model, unfreeze)), Preprocess(size, size, **LIKE)


def pixels(count, preprocess, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = (count, 3, preprocess.crop, preprocess.crop)
    return torch.randint(256, shape, generator=draw, dtype=torch.uint8)


def plain(found, preprocess, images):
    with torch.no_grad():
        return found.prefix(preprocess.normalise(images))


@pytest.mark.parametrize("name", EVERY)
def test_the_fast_prefix_says_what_the_plain_one_says(name):
    found, preprocess = parts(name)
    images = pixels(2, preprocess)
    before = {key: value.clone() for key, value in found.prefix.state_dict().items()}
    wanted = plain(found, preprocess, images)
    got = Prefix(found.prefix, preprocess, "float32")(images)
    scale = wanted.abs().max()
    torch.testing.assert_close(got / scale, wanted / scale, rtol=0, atol=2e-5)
    assert got.is_contiguous()
    after = found.prefix.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(plain(found, preprocess, images), wanted)


def test_batch_norms_are_folded_away():
    found, preprocess = parts("resnet18")
    fast = Prefix(found.prefix, preprocess, "float32")
    kinds = [
        type(fast.prefix.get_submodule(n.target))
        for n in fast.prefix.graph.nodes
        if n.op == "call_module"
    ]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(nn.Conv2d) == 20


def test_half_precision_is_close_and_half_the_size():
    found, preprocess = parts("shufflenet_v2_x0_5", "last:1")
    images = pixels(2, preprocess)
    wanted = plain(found, preprocess, images)
    got = Prefix(found.prefix, preprocess, "bfloat16")(images)
    assert got.dtype == torch.bfloat16
    assert got.nbytes == wanted.nbytes / 2
    error = (got.float() - wanted).norm() / wanted.norm()
    assert 0 < error < 0.03
    assert all(p.dtype == torch.float32 for p in found.prefix.parameters())


def test_activations_need_no_gradient_but_can_be_trained_on():
    found, preprocess = parts("shufflenet_v2_x0_5", "last:1")
    got = Prefix(found.prefix, preprocess, "float32")(pixels(2, preprocess))
    assert not got.requires_grad
    assert not got.is_inference()
    found.suffix(got).sum().backward()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EVERY)
def test_an_activation_depends_on_its_image_alone(name, dtype):
    """Bit for bit: not on its place in a batch, nor on what is before, beside or behind it."""
    found, preprocess = parts(name)
    fast, images = Prefix(found.prefix, preprocess, dtype), pixels(BATCH, preprocess)
    whole = fast(images)
    assert torch.equal(fast(images.flip(0)), whole.flip(0))
    assert torch.equal(fast(images[5:12]), whole[5:12])
    assert torch.equal(
        fast(torch.cat([images[9:], images[:10]])), torch.cat([whole[9:], whole[:10]])
    )


# --- what is kept ---


def test_an_image_keeps_its_activations_where_they_are_small_and_save_work():
    head, preprocess = parts("resnet18")
    decision = CacheDecision.of(head, preprocess, "float32")
    assert decision.room == 512 * 4
    assert decision.image == 3 * 64 * 64
    assert decision.share > 0.99
    assert decision.pays
    assert CacheDecision.of(head, preprocess, "bfloat16").room == 512 * 2
    assert "2.0 kB" in str(decision)


def test_an_image_keeps_its_pixels_where_activations_are_large():
    early, preprocess = parts("resnet18", "last:4")
    decision = CacheDecision.of(early, preprocess, "float32")
    assert decision.room > 4 * decision.image
    assert not decision.pays


def test_an_image_keeps_its_pixels_where_the_prefix_is_little_of_the_work():
    preprocess = Preprocess(16, 16, **LIKE)
    prefix, wide = nn.Conv2d(3, 1, 1), nn.Sequential(nn.Flatten(), nn.Linear(256, 4000))
    decision = CacheDecision.of(Split(prefix, wide, "here"), preprocess, "float32")
    assert decision.room <= 4 * decision.image
    assert decision.share < 0.01
    assert not decision.pays


def test_the_share_counts_a_backward_pass_as_two_forward():
    preprocess = Preprocess(16, 16, **LIKE)
    same = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    assert CacheDecision.of(Split(*same, "here"), preprocess, "float32").share == pytest.approx(
        1 / 4
    )


def test_with_nothing_frozen_there_is_nothing_to_keep():
    found, preprocess = parts("resnet18", "all")
    assert not CacheDecision.of(found, preprocess, "float32").pays
