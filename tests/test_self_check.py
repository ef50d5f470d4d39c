"""A site finds out by itself when private training is not what its ε is computed from."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from client import dp_sgd, ghost, self_check
from client.entries import Privacy
from client.entropy import Entropy
from client.features import Prepared
from client.protection import Protection
from client.self_check import check
from client.store import Rows
from client.trainer import Examples
from common import backbones
from common.errors import RefusedError
from common.network import assemble
from common.study import Study

SIZES = {"inception_v3": 80, "vit_b_16": 224}
QUICK = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")

PROTECTION = Protection(
    round=Privacy(
        mechanism="dp_sgd",
        noise_multiplier=1.3,
        sample_rate=0.1,
        steps=3,
        delta=1e-5,
        clip_norm=0.7,
    ),
    rounds=1,
    enrolled=160,
)


def examples(*shape):
    inputs = torch.full((1, *shape), float("nan"))  # only their shape may be looked at
    return Examples(Prepared(Rows([(inputs, 0)]), 1, nn.Identity()), torch.tensor([0]))


def convolutional():
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(8).requires_grad_(False)
    return nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(200, 3)
    )


def refused(match, module=None):
    with pytest.raises(RefusedError, match=match) as caught:
        check(module or convolutional(), examples(6, 5, 5), PROTECTION)
    assert caught.value.code == "refused"
    assert "Nothing was trained" in str(caught.value)


@pytest.mark.parametrize("unfreeze", ["head", "last:1"])
@pytest.mark.parametrize(
    "backbone",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in backbones.names()
    ],
)
def test_every_backbone_passes(backbone, unfreeze):
    size = SIZES.get(backbone, 64)
    study = Study(
        name="t",
        classes=("a", "b", "c"),
        model={"backbone": backbone, "weights": "none", "unfreeze": unfreeze, "dropout": 0.3},
        images={"size": size},
        train={"rounds": 1},
        privacy={"mechanism": "dp_sgd", "epsilon": 8, "delta": 1e-5},
    )
    network = assemble(study, "none")
    with torch.no_grad():
        shape = network.split.prefix(torch.zeros(1, 3, size, size)).shape[1:]
    check(network.split.suffix, examples(*shape), PROTECTION)


def test_a_head_that_is_very_sure_passes():
    module = convolutional()
    module[4].weight.data *= 1e4
    check(module, examples(6, 5, 5), PROTECTION)


def test_it_leaves_everything_as_it_was():
    module = nn.Sequential(convolutional(), nn.Dropout(0.4)).eval()
    module[0][4].weight.data.zero_()
    module[0][4].weight.grad = torch.ones(3, 200)
    module[0][0].train()
    before, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    generator = torch.get_rng_state()
    check(module, examples(6, 5, 5), PROTECTION)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert [p.grad is not None for p in module.parameters()].count(True) == 1
    assert module[0][4].weight.grad.eq(1).all()
    assert module[1].p == 0.4
    assert not any(part._forward_hooks for part in module.modules())
    assert torch.equal(torch.get_rng_state(), generator)


# --- each trap, set on purpose ---


def careless(layer, a, g):
    """As a well-known library has it: patches by strides that only one layout has."""
    n, c, height, width = a.shape
    k, p = layer.kernel_size[0], layer.padding[0]
    padded = F.pad(a, (p, p, p, p))
    h, w = height + 2 * p, width + 2 * p
    out = (h - k + 1, w - k + 1)
    patches = padded.as_strided((n, c, k, k, *out), (c * h * w, h * w, w, 1, w, 1))
    shape = (n, 1, -1, out[0] * out[1])
    return ghost._product(patches.reshape(shape), g.reshape(shape)) + ghost._shift(
        layer, g.reshape(shape)
    )


def test_a_convolution_that_reads_another_layout_wrongly(monkeypatch):
    inputs = torch.randn(4, 6, 5, 5)
    layer, g = nn.Conv2d(6, 8, 3, padding=1), torch.randn(4, 8, 5, 5)
    torch.testing.assert_close(careless(layer, inputs, g), ghost._conv2d(layer, inputs, g))
    monkeypatch.setitem(ghost._SQUARES, nn.Conv2d, careless)
    refused("norms of rows, short of the true ones")


def test_norms_that_leave_a_layer_out(monkeypatch):
    monkeypatch.setitem(ghost._SQUARES, nn.Conv2d, lambda layer, a, g: torch.zeros(len(a)))
    refused("norms of rows, short of the true ones")


def test_norms_that_are_too_long(monkeypatch):
    """Private, but not what was asked for: it would learn less."""
    right = ghost._linear
    monkeypatch.setitem(ghost._SQUARES, nn.Linear, lambda *args: 4 * right(*args))
    refused("clipped gradients, against row by row")


def test_gradients_that_are_not_clipped(monkeypatch):
    def unclipped(suffix, inputs, labels, losses, clip_norm):
        each = losses(suffix(inputs), labels)
        return list(torch.autograd.grad(each.sum(), dp_sgd.trained_by(suffix)))

    monkeypatch.setattr(self_check, "clipped_sum", unclipped)
    refused("clipped gradients, against row by row")


def test_batchnorm_in_training(monkeypatch):
    monkeypatch.setattr(self_check, "train_mode", nn.Module.train)
    refused("self-check")


def test_batchnorm_without_statistics_of_its_own():
    """It normalises by the batch in every mode."""
    module = convolutional()
    module[1] = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    refused("norms of rows|row by row|one row changed", module)


class Mixing(nn.Module):
    """Rows in a batch see the first one, but a row alone sees nothing of the kind."""

    def forward(self, x):
        return x + 0.5 * (x[:1] - x[:1].mean(0)) if len(x) == 1 else x + 0.5 * x[:1].detach()


def test_rows_that_touch_each_other():
    module = convolutional()
    module[2] = Mixing()
    refused("norms of rows|row by row", module)


def test_a_row_that_touches_the_others_in_their_gradients_alone(monkeypatch):
    right = dp_sgd.clipped_sum

    def leaking(suffix, inputs, labels, losses, clip_norm):
        first = right(suffix, inputs[:1], labels[:1], self_check._losses, clip_norm)
        sums = right(suffix, inputs, labels, losses, clip_norm)
        hidden = losses.func is self_check._all_but_first
        return [a + 0.01 * b if hidden else a for a, b in zip(sums, first, strict=True)]

    monkeypatch.setattr(self_check, "clipped_sum", leaking)
    refused("the others' gradients, one row changed")


class Scaling(nn.Module):
    def forward(self, x):
        return x.mul_(10)


def test_a_layers_output_that_is_overwritten():
    module = convolutional()
    module[1] = Scaling()
    refused("norms of rows, short of the true ones", module)


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.99, 1.01, 2.0, float("nan")])
def test_noise_of_another_size(factor):
    class Wrong(Entropy):
        def gaussians(self, shapes):
            noise = len(shapes) == 4  # one for each parameter; not the inputs of the check
            return [factor * z if noise else z for z in super().gaussians(shapes)]

    with pytest.raises(RefusedError, match="the noise's"):
        check(convolutional(), examples(6, 5, 5), PROTECTION, Wrong())


def test_noise_that_is_not_centred():
    class Shifted(Entropy):
        def gaussians(self, shapes):
            return [z + 0.02 for z in super().gaussians(shapes)]

    with pytest.raises(RefusedError, match="the noise's mean"):
        check(convolutional(), examples(6, 5, 5), PROTECTION, Shifted())


def test_empty_batches_without_noise(monkeypatch):
    def skipping(suffix, batches, losses, protection, entropy):
        if not list(batches):
            return [torch.zeros_like(p) for p in dp_sgd.trained_by(suffix)]
        raise AssertionError

    monkeypatch.setattr(self_check, "released", skipping)
    refused("the noise's variance")


def test_a_layer_that_cannot_be_trained_privately():
    module = convolutional()
    module[1].requires_grad_(True)
    with pytest.raises(RefusedError, match="BatchNorm2d"):
        check(module, examples(6, 5, 5), PROTECTION)


def test_a_suffix_that_does_not_run():
    module = convolutional()
    module[4] = nn.Linear(199, 3)
    refused("one that runs", module)
