"""The frozen prefix and the trainable suffix are the model, bit for bit, for every backbone."""

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from common.errors import BackboneError
from common.model import backbones
from common.model.split import Split, cut_at, legal_cuts, split, train_mode

pytestmark = pytest.mark.numbers

QUICK = {"squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18"}
SIDE = {"inception_v3": 96, "vit_b_16": 224}
DEPTHS = ["head", "last:1", "last:2", "all"]

every_backbone = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in backbones.names()],
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny layers on busy cores lose far more to waiting for threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(name: str) -> Tensor:
    side = SIDE.get(name, 64)
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))


@lru_cache(maxsize=len(QUICK))
def learned(name: str) -> nn.Module:
    """A random model without random depth; its BatchNorm has seen images, its head is not zero."""
    model = backbones.get(name).build(classes=3, dropout=0.0, weights="none", seed=1)
    head = model.get_submodule(backbones.get(name).head)
    nn.init.normal_(head.linear.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
        if isinstance(part, StochasticDepth):
            part.p = 0.0
    with torch.no_grad():
        model.train()(images(name))
    return model.eval()


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def assert_is_the_model(parts: Split, model: nn.Module, name: str) -> None:
    x = images(name)
    with torch.no_grad():
        activation = parts.prefix(x)
        kept = activation.clone()
        assert torch.equal(parts.suffix(activation), model(x))
        assert isinstance(activation, Tensor)
        assert len(activation) == len(x)
        assert torch.equal(activation, kept), "the suffix overwrote what would be cached"


@every_backbone
@pytest.mark.parametrize("unfreeze", DEPTHS)
def test_split_is_exact_with_equal_gradients(name: str, unfreeze: str) -> None:
    model = learned(name)
    trainable = backbones.get(name).trainable(model, unfreeze)
    parts = split(model, trainable)
    assert_is_the_model(parts, model, name)
    with torch.no_grad():
        activation = parts.prefix(images(name))
    through_parts = gradients(parts.suffix, parts.suffix(activation).square().sum())
    through_model = gradients(model, model(images(name)).square().sum())
    assert set(through_parts) == set(through_model) == set(trainable)
    assert all(torch.equal(through_parts[key], through_model[key]) for key in trainable)


@every_backbone
def test_every_legal_cut_is_exact(name: str) -> None:
    model = learned(name)
    cuts = legal_cuts(model)
    assert len(cuts) > len(backbones.get(name).blocks)
    for at in cuts[:: max(1, len(cuts) // 8)]:
        parts = cut_at(model, at)
        assert parts.at == at
        assert_is_the_model(parts, model, name)


@every_backbone
def test_parts_share_the_models_own_parameters(name: str) -> None:
    model = learned(name)
    trainable = backbones.get(name).trainable(model, "last:1")
    parts = split(model, trainable)
    own = dict(model.named_parameters())
    prefix, suffix = (dict(part.named_parameters()) for part in parts[:2])
    assert {**prefix, **suffix}.keys() == own.keys()
    assert all(own[key] is tensor for key, tensor in (*prefix.items(), *suffix.items()))
    assert not prefix.keys() & set(trainable)
    assert {key for key, tensor in own.items() if tensor.requires_grad} == set(trainable)


@every_backbone
@pytest.mark.parametrize("unfreeze", DEPTHS)
def test_a_step_changes_the_trainable_parameters_and_nothing_else(name: str, unfreeze: str) -> None:
    model = learned(name)
    trainable = backbones.get(name).trainable(model, unfreeze)
    parts = split(model, trainable)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        activation = parts.prefix(images(name))
    train_mode(parts.suffix)
    optimizer = torch.optim.Adam([p for p in parts.suffix.parameters() if p.requires_grad], lr=0.01)
    labels = torch.tensor([0, 1])
    nn.functional.cross_entropy(parts.suffix(activation), labels).backward()
    optimizer.step()
    model.zero_grad()
    after = model.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == set(trainable)
    model.load_state_dict(before)


@every_backbone
def test_a_zero_head_learns_at_the_first_step(name: str) -> None:
    model = learned(name)
    head = model.get_submodule(backbones.get(name).head)
    weight = head.linear.weight.detach().clone()
    with torch.no_grad():
        head.linear.weight.zero_()
    loss = nn.functional.cross_entropy(model(images(name)), torch.tensor([0, 1]))
    grads = torch.autograd.grad(loss, [head.linear.weight, head.linear.bias])
    assert all(grad.abs().max() > 0 for grad in grads)
    with torch.no_grad():
        head.linear.weight.copy_(weight)


def test_nothing_frozen_means_no_prefix() -> None:
    for name in ("resnet18", "inception_v3"):  # inception starts with arithmetic on the image
        backbone = backbones.get(name)
        model = backbone.build(classes=2, dropout=0.0, weights="none", seed=1)
        parts = split(model, backbone.trainable(model, "all"))
        assert (type(parts.prefix), parts.suffix, parts.at) == (nn.Identity, model, "input")


def test_cut_is_as_late_as_possible() -> None:
    backbone = backbones.get("resnet18")
    model = learned("resnet18")
    shapes = {}
    for unfreeze in ("head", "last:1", "last:2"):
        parts = split(model, backbone.trainable(model, unfreeze))
        with torch.no_grad():
            shapes[unfreeze] = tuple(parts.prefix(images("resnet18")).shape[1:])
    assert shapes == {"head": (512,), "last:1": (256, 4, 4), "last:2": (128, 8, 8)}


def test_head_dropout_is_in_the_suffix_and_obeys_train_mode() -> None:
    backbone = backbones.get("squeezenet1_1")
    model = backbone.build(classes=2, dropout=0.5, weights="none", seed=1)
    nn.init.normal_(model.get_submodule("classifier.linear").weight)
    parts = split(model, backbone.trainable(model, "head"))
    activation = torch.ones(1, 512)
    assert torch.equal(parts.suffix(activation), parts.suffix(activation))
    train_mode(parts.suffix)
    assert not torch.equal(parts.suffix(activation), parts.suffix(activation))
    assert not any(isinstance(part, nn.Dropout) for part in parts.prefix.modules())


def test_stochastic_depth_is_not_frozen_by_tracing() -> None:
    backbone = backbones.get("efficientnet_b0")
    model = backbone.build(classes=2, dropout=0.0, weights="none", seed=1)
    nn.init.normal_(model.get_submodule("classifier.linear").weight, std=1e9)
    parts = split(model, backbone.trainable(model, "last:4"))
    with torch.no_grad():
        activation = parts.prefix(torch.randn(8, 3, 64, 64))
        assert torch.equal(parts.suffix(activation), parts.suffix(activation))
        train_mode(parts.suffix)
        assert not torch.equal(parts.suffix(activation), parts.suffix(activation))


def test_train_mode_keeps_batchnorm_as_pretrained() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()))
    train_mode(module)
    training = [type(part).__name__ for part in module.modules() if part.training]
    assert training == ["Sequential", "Sequential", "Dropout"]


def test_a_parameter_the_model_does_not_use_is_refused() -> None:
    backbone = backbones.get("squeezenet1_1")
    model = backbone.build(classes=2, dropout=0.0, weights="none", seed=1)
    model.register_parameter("stray", nn.Parameter(torch.zeros(1)))
    head = backbone.trainable(model, "head")
    with pytest.raises(
        BackboneError, match=r"3 trainable parameters .* 1 elsewhere, such as stray"
    ):
        split(model, (*head, "stray"))
    with pytest.raises(BackboneError, match=r"such as no\.such"):
        split(model, (*head, "no.such"))
