"""Every row's norm is the norm of its own gradient, whatever the layer and the layout."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from client import ghost
from common.errors import RefusedError
from common.private import LAYERS

LAST = torch.channels_last


def norms(module, inputs, losses=lambda out: out.tanh().flatten(1).sum(1)):
    with ghost.watched(module) as calls:
        each = losses(module(inputs))
    return ghost.row_norms(module, calls, each)


def brute(module, inputs, losses=lambda out: out.tanh().flatten(1).sum(1)):
    trained = [p for p in module.parameters() if p.requires_grad]
    lengths = []
    for i in range(len(inputs)):
        gradients = torch.autograd.grad(losses(module(inputs[[i]])).sum(), trained)
        lengths.append(sum(g.double().square().sum() for g in gradients).sqrt())
    return torch.stack(lengths).float()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(module, seed=1):
    for p in module.parameters():
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(seed))
    return module


def test_all_known_layers_have_a_norm():
    assert set(ghost._SQUARES) == set(LAYERS)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (9, 5), (40, 5), (3, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias):
    layer, inputs = drawn(nn.Linear(5, 30, bias=bias)), random(6, *shape)
    torch.testing.assert_close(norms(layer, inputs), brute(layer, inputs))


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 1), "stride": (2, 1), "padding": (0, 1)},
        {"kernel_size": 3, "dilation": 2, "padding": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 7, "padding": 3, "groups": 8},
        {"kernel_size": 4, "stride": 3},
    ],
)
@pytest.mark.parametrize("side", [5, 16])  # few positions and many: both ways to multiply
def test_convolution(options, bias, layout, side):
    layer = drawn(nn.Conv2d(8, 16, bias=bias, **options))
    inputs = random(20, 8, side, side).contiguous(memory_format=layout)
    torch.testing.assert_close(norms(layer, inputs), brute(layer, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("middle", [(), (7,), (3, 4)])
def test_layer_norm(middle):
    layer, inputs = drawn(nn.LayerNorm(6)), random(5, *middle, 6)
    torch.testing.assert_close(norms(layer, inputs), brute(layer, inputs))


def test_layer_norm_over_more_than_one_axis():
    layer, inputs = drawn(nn.LayerNorm((4, 6))), random(5, 3, 4, 6)
    torch.testing.assert_close(norms(layer, inputs), brute(layer, inputs))


@pytest.mark.parametrize("rest", [(), (4, 5)])
def test_group_norm(rest):
    layer, inputs = drawn(nn.GroupNorm(2, 6)), random(5, 6, *rest)
    torch.testing.assert_close(norms(layer, inputs), brute(layer, inputs))


def test_layers_after_each_other_with_another_layout_between_them():
    class Permuting(nn.Module):  # as ConvNeXt does
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)
            self.last = nn.Conv2d(8, 4, 3, groups=4)

        def forward(self, x):
            x = self.linear(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.last(x.relu())

    module, inputs = drawn(Permuting()), random(6, 8, 7, 7)
    torch.testing.assert_close(norms(module, inputs), brute(module, inputs), rtol=1e-4, atol=1e-5)


def test_only_what_trains_counts():
    module, inputs = drawn(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))), random(6, 5)
    module[0].requires_grad_(False)
    torch.testing.assert_close(norms(module, inputs), brute(module, inputs))


def test_a_norm_that_cancels_is_never_taken_for_smaller():
    # The same patch at every position, with gradients of either sign: what is left is small.
    for size in (1.0, 1e-2, 1e-4, 0.0):
        a = random(3, 1, 600, 1) + size * random(3, 1, 600, 48, seed=1)
        signs = torch.ones(48)
        signs[::2] = -1
        g = random(3, 1, 500, 1, seed=2) * signs
        squares = ghost._product(a, g)
        true = (a.double() @ g.double().mT).square().sum((1, 2, 3))
        used = (a @ g.mT).square().sum((1, 2, 3))
        assert (squares >= true * (1 - 1e-6)).all()
        assert (squares >= used * (1 - 1e-6)).all()
    assert 48 * (600 + 500) < 600 * 500


def test_it_takes_its_hooks_off_again():
    layer = nn.Linear(5, 3)
    with pytest.raises(RuntimeError), ghost.watched(layer):
        layer(random(2, 4))
    assert not layer._forward_hooks


def shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x):
            return self.linear(self.linear(x))

    return Twice()


def bare():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.linear = nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

        def forward(self, x):
            return self.linear(self.scale * x)

    return Scaled()


def functional():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x):
            return F.linear(x, self.linear.weight, self.linear.bias)

    return Functional()


def folded():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x):
            return self.linear(x.repeat(2, 1)).view(2, len(x), 3).sum(0)

    return Folded()


class Odd(nn.Linear):
    """Another type, which may compute something else."""


@pytest.mark.parametrize(
    "make",
    [shared, bare, functional, folded, lambda: Odd(5, 3), lambda: nn.BatchNorm1d(5).eval()],
)
def test_what_is_not_known_is_refused(make):
    with pytest.raises(RefusedError, match="known layers to train, called once on 4 rows"):
        norms(make(), random(4, 5))
