"""A site finds out by itself when private training is not what its ε is computed from."""

import copy

import pytest
import torch
from torch import nn

from client.features.extract import Prepared
from client.features.store import Rows
from client.privacy import dp_sgd, noised_rows, self_check
from client.privacy.noise import DEVIATION, Entropy
from client.privacy.noised_sum import NoisedSum
from client.privacy.parameters import PrivateRelease
from client.privacy.plan import PrivacyPlan, Query
from client.privacy.self_check import check_noise, check_rows
from client.training.dataset import Examples
from common.config.study import Study
from common.errors import RefusedError
from common.model import backbones
from common.model.network import assemble

pytestmark = pytest.mark.numbers

SIZES = {"inception_v3": 80, "vit_b_16": 224}
QUICK = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")

RELEASE = PrivateRelease(
    mechanism="dp_sgd",
    noise_multiplier=1.3,
    sample_rate=0.1,
    steps=3,
    delta=1e-5,
    clip_norm=0.7,
)
PROTECTION = PrivacyPlan(queries=(Query(kind="round", release=RELEASE),), enrolled=160)
SUMS = PrivacyPlan(queries=(Query(kind="moments", release=RELEASE),), enrolled=160)


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
        check_rows(module or convolutional(), examples(6, 5, 5), PROTECTION)
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
    check_rows(network.split.suffix, examples(*shape), PROTECTION)


def test_a_head_that_is_very_sure_passes():
    module = convolutional()
    module[4].weight.data *= 1e4
    check_rows(module, examples(6, 5, 5), PROTECTION)


def test_the_noise_passes():
    check_noise(PROTECTION)
    check_noise(SUMS)


def test_it_leaves_everything_as_it_was():
    module = nn.Sequential(convolutional(), nn.Dropout(0.4)).eval()
    module[0][4].weight.data.zero_()
    module[0][4].weight.grad = torch.ones(3, 200)
    module[0][0].train()
    before, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    generator = torch.get_rng_state()
    check_rows(module, examples(6, 5, 5), PROTECTION)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert [p.grad is not None for p in module.parameters()].count(True) == 1
    assert module[0][4].weight.grad.eq(1).all()
    assert module[1].p == 0.4
    assert not any(part._forward_hooks for part in module.modules())
    assert torch.equal(torch.get_rng_state(), generator)


# --- each trap, set on purpose ---


def test_gradients_that_are_not_clipped(monkeypatch):
    class Unclipped(NoisedSum):
        def add(self, row):
            norm = torch.cat([part.flatten() for part in row]).norm()
            for total, part in zip(self.sums, row, strict=True):
                total += (part.flatten().double() / max(norm, 1e-3) * 4 * self.longest).long()

    monkeypatch.setattr(dp_sgd, "NoisedSum", Unclipped)
    refused("a row, in clipping norms")


class Remembering(nn.Module):
    """What one row leaves behind, the next one finds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.detach().mean().clamp(-1, 1)
        return x + self.seen


def test_a_row_that_leaves_something_for_the_next():
    module = convolutional()
    module[2] = Remembering()
    refused("a row, after others", module)


def test_batchnorm_in_training(monkeypatch):
    monkeypatch.setattr(self_check, "train_mode", nn.Module.train)
    module = convolutional()
    module[1].momentum = 0.5
    before = module[1].running_mean.clone()
    with pytest.raises(RefusedError, match="its buffers"):
        check_rows(module, examples(6, 5, 5), PROTECTION)
    assert not torch.equal(before, module[1].running_mean)


@pytest.mark.parametrize("plan", [PROTECTION, SUMS], ids=["round", "sum"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 0.99, 1.01, 2.0])
def test_noise_of_another_size(factor, plan):
    class Wrong(Entropy):
        def gaussians(self, shapes):
            return [(factor * z).long() for z in super().gaussians(shapes)]

    with pytest.raises(RefusedError, match="the noise's"):
        check_noise(plan, Wrong())


def test_noise_that_is_not_centred():
    class Shifted(Entropy):
        def gaussians(self, shapes):
            return [z + DEVIATION // 50 for z in super().gaussians(shapes)]

    with pytest.raises(RefusedError, match="the noise's mean"):
        check_noise(PROTECTION, Shifted())


def test_steps_without_patients_that_get_no_noise(monkeypatch):
    def skipping(suffix, rows, losses, privacy_plan, entropy):
        assert not list(rows)
        return [torch.zeros_like(p) for p in dp_sgd.list_trained(suffix)]

    monkeypatch.setattr(self_check, "compute_noised_gradient", skipping)
    with pytest.raises(RefusedError, match="the noise's variance"):
        check_noise(PROTECTION)


def test_sums_without_patients_that_get_no_noise(monkeypatch):
    class Silent(NoisedSum):
        def release(self, entropy):
            return [0.0 * told for told in super().release(entropy)]

    monkeypatch.setattr(noised_rows, "NoisedSum", Silent)
    with pytest.raises(RefusedError, match="the noise's variance"):
        check_noise(SUMS)


def test_a_suffix_that_does_not_run():
    module = convolutional()
    module[4] = nn.Linear(199, 3)
    refused("one that runs", module)
