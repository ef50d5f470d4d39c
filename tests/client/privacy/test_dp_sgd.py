"""DP-SGD does what its ε is computed from: by patient, clipped, noised, whatever the batch."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from client.features.extract import Prepared
from client.features.store import Rows
from client.privacy import dp_sgd
from client.privacy.dp_sgd import compute_row_gradient, make_sum
from client.privacy.noise import DEVIATION, Entropy
from client.privacy.noised_sum import NoisedSum
from client.privacy.parameters import PrivateRelease
from client.privacy.plan import PrivacyPlan, Query
from client.privacy.sampling import Patients
from client.training import trainer
from client.training.dataset import Examples
from common.config.study import Study, Train
from common.errors import RefusedError
from common.model import backbones
from common.model.backbones import Head
from common.model.network import assemble
from common.model.split import train_mode

pytestmark = pytest.mark.numbers

CLASSES = 3
SIZES = {"inception_v3": 80, "vit_b_16": 224}
QUICK = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1")
SILENT = 2.0**-20  # no noise to speak of


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def known(key=bytes(32)):
    entropy = Entropy()
    entropy._key_of_tests_only(key)
    return entropy


def examples(inputs, labels, views=1):
    rows = Rows([(inputs, i) for i in range(len(inputs))])
    return Examples(Prepared(rows, views, nn.Identity()), torch.tensor(labels))


def some(n, width=5):
    return examples(random(n, width), [i % CLASSES for i in range(n)])


def suffix(width=5, seed=1):
    module = nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    for p in module.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
    return module.eval()


def plan(**changes):
    given = {"rounds": 1, "optimizer": "sgd", "momentum": 0.0, "lr": 0.5} | changes
    return Train(**given)


def privacy_plan(*, sigma=SILENT, rate=1.0, steps=1, clip=1.0, enrolled=10):
    one = PrivateRelease(
        mechanism="dp_sgd",
        noise_multiplier=sigma,
        sample_rate=rate,
        steps=steps,
        delta=1e-5,
        clip_norm=clip,
    )
    return PrivacyPlan(queries=(Query(kind="round", release=one),), enrolled=enrolled)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def update(data, patients, how, private, *, module=None, **options):
    """What a round adds to the weights."""
    module = module or suffix()
    before = weights(module)
    dp_sgd.train(module, data, patients, how, private, lr=how.lr, **options)
    return weights(module) - before


def each_alone(n):
    return Patients.of([str(i) for i in range(n)])


def losses(how=None, class_weights=None):
    return partial(trainer.losses, plan=how or plan(), weights=class_weights)


def brute(module, inputs, labels, clip, of=None):
    """Clipped gradients row by row, and their lengths before, by plain autograd."""
    trained = [p for p in module.parameters() if p.requires_grad]
    rows, lengths = [], []
    for i in range(len(inputs)):
        torch.manual_seed(i)  # of layers that are left out at random
        loss = (of or losses())(module(inputs[[i]]), labels[[i]]).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]).double()
        lengths.append(gradient.norm())
        rows.append(gradient * min(1.0, clip / float(lengths[-1])))
    return torch.stack(rows), torch.stack(lengths)


def clipped(module, inputs, labels, of, clip):
    """The sum of the clipped rows, flat, float64, as it is before the noise."""
    total = make_sum(module, privacy_plan(clip=clip))
    for i in range(len(inputs)):
        total.add(compute_row_gradient(module, (inputs[[i]], labels[[i]], i), of))
    return torch.cat(total.sums).double() * clip / total.longest


# --- clipping ---


@pytest.mark.parametrize("unfreeze", ["head", "last:1"])
@pytest.mark.parametrize(
    "backbone",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in backbones.names()
    ],
)
def test_clipped_gradients_are_those_of_brute_force(backbone, unfreeze):
    size = SIZES.get(backbone, 64)
    study = Study(
        name="t",
        classes=("a", "b", "c"),
        model={"backbone": backbone, "weights": "none", "unfreeze": unfreeze},
        images={"size": size},
        train={"rounds": 1},
        privacy={"mechanism": "dp_sgd", "epsilon": 8, "delta": 1e-5},
    )
    network = assemble(study, "none")
    module = copy.deepcopy(network.split.suffix)
    for p in dp_sgd.list_trained(module):
        if not p.any():  # else nothing before the head has a gradient
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inputs = network.split.prefix(random(5, 3, size, size))
        inputs /= inputs.std()  # random weights let some grow until rounding is all there is
    labels = torch.tensor([0, 1, 2, 0, 1])
    train_mode(module)
    _, lengths = brute(module, inputs, labels, 1.0)
    clip = lengths.median().item()
    rows, _ = brute(module, inputs, labels, clip)
    got, wanted = clipped(module, inputs, labels, losses(), clip), rows.sum(0)
    assert (got - wanted).norm() < 1e-5 * wanted.norm()
    for i in range(len(inputs)):
        assert clipped(module, inputs[[i]], labels[[i]], losses(), clip).norm() <= clip


@pytest.mark.parametrize("imbalance", ["none", "focal"])
@pytest.mark.parametrize("class_weights", [None, (0.5, 3.0, 9.0)])
def test_the_studys_loss_is_what_is_clipped(imbalance, class_weights):
    how, data = plan(imbalance=imbalance, class_weights=class_weights), some(8)
    inputs, labels = data.batch(torch.arange(8), 0, torch.device("cpu")), data.labels
    given = torch.tensor(class_weights) if class_weights else None
    rows, _ = brute(suffix(), inputs, labels, 0.7, losses(how, given))
    moved = update(data, each_alone(8), how, privacy_plan(clip=0.7))
    torch.testing.assert_close(moved.double(), -how.lr * rows.sum(0) / 10, rtol=1e-4, atol=1e-6)


def test_weights_counted_from_patients_are_refused():
    with pytest.raises(RefusedError, match="constants"):
        update(some(4), each_alone(4), plan(imbalance="weighted"), privacy_plan())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_row_that_is_not_finite_adds_nothing(bad):
    inputs, labels = random(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, CLASSES))
    spoilt = inputs.clone()
    spoilt[2] = bad
    others = torch.tensor([0, 1, 3, 4, 5])
    got = clipped(module, spoilt, labels, losses(), 0.5)
    wanted = clipped(module, inputs[others], labels[others], losses(), 0.5)
    if bad != 1e30:
        assert torch.equal(got, wanted)
    else:  # its gradient is finite, or counts as nothing: no more than the clipping norm
        assert (got - wanted).norm() <= 0.5
    assert not clipped(module, spoilt[[2]] * math.nan, labels[[2]], losses(), 0.5).any()


def test_without_one_patient_the_sum_differs_by_just_what_that_patient_adds(monkeypatch):
    ids, n = ["a", "b", "b", "c", "c", "c", "d", "d"], 8
    data, private = some(n), privacy_plan(rate=0.8, steps=1, clip=0.5)
    seen = []

    class Noting(NoisedSum):
        def release(self, entropy):
            seen.append(torch.cat(self.sums))
            return super().release(entropy)

    monkeypatch.setattr(dp_sgd, "NoisedSum", Noting)
    for kept in (n, 6):  # with d, and without; the keystream is the same
        fewer = examples(random(n, 5)[:kept], data.labels[:kept].tolist())
        update(fewer, Patients.of(ids[:kept]), plan(), private, entropy=known(b"\6" * 32))
    whole, without = seen
    assert without.any()
    apart = (whole - without).double()
    labels = data.labels
    alone = [
        clipped(suffix().train(), random(n, 5)[[i]], labels[[i]], losses(), 0.5) for i in (6, 7)
    ]
    unit = 0.5 * SILENT / DEVIATION
    assert any(torch.equal(apart * unit, one) for one in alone)


def test_dropout_keeps_lengths_bounded():
    module = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES)).train()
    for seed in range(20):
        torch.manual_seed(seed)
        assert clipped(module, random(1, 5), torch.tensor([1]), losses(), 0.01).norm() <= 0.01


# --- who is drawn ---


def test_patients_are_their_images_wherever_these_stand():
    patients = Patients.of(["b", "a", "b", "c", "b", "a"])
    assert patients.images.tolist() == [0, 2, 4, 1, 5, 3]
    assert patients.counts.tolist() == [3, 2, 1]


def test_a_drawn_patient_gives_one_image_in_one_view_all_equally_likely():
    ids = ["a"] * 4 + ["b"] + ["c", "d"] * 3
    patients, entropy = Patients.of(ids), Entropy()
    pairs = torch.zeros(len(ids), 3)
    steps = 1500
    for _ in range(steps):
        images, views = patients.draw(0.5, 3, entropy)
        owners = [ids[i] for i in images.tolist()]
        assert len(set(owners)) == len(owners)
        pairs[images, views] += 1
    for i, owner in enumerate(ids):
        share = 0.5 / ids.count(owner) / 3
        spread = math.sqrt(steps * share * (1 - share))
        assert (pairs[i] - steps * share).abs().max() < 6.5 * spread


def test_what_a_patient_adds_is_the_same_whoever_is_before_or_beside(monkeypatch):
    """One patient more may change neither another's dropout nor a bit of its gradient."""
    inputs, labels, added = random(40, 64), [i % CLASSES for i in range(40)], []
    row_gradient = dp_sgd.compute_row_gradient

    class Known(Entropy):
        def seeds(self, n):
            return torch.arange(40)[-n:]  # each patient's own, whoever is left out before it

    def noting(*args):
        gradient = row_gradient(*args)
        added[-1].append(torch.cat([part.flatten() for part in gradient]))
        return gradient

    monkeypatch.setattr(dp_sgd, "compute_row_gradient", noting)
    for out in (0, 1, 17):
        added.append([])
        data, head = examples(inputs[out:], labels[out:]), Head(64, CLASSES, 0.5)
        update(data, each_alone(40 - out), plan(), privacy_plan(), module=head, entropy=Known())
    assert not torch.equal(*added[0][:2])
    for fewer in added[1:]:
        same = zip(added[0][-len(fewer) :], fewer, strict=True)
        assert all(torch.equal(one, other) for one, other in same)


def test_a_patient_with_many_images_pulls_no_harder():
    labels = [0, 1, 2, 0]
    alone = examples(random(4, 5), labels)
    copies = examples(torch.cat([random(4, 5), random(4, 5)[3:].repeat(49, 1)]), labels + [0] * 49)
    ids = ["a", "b", "c", "d"]
    private, how = privacy_plan(clip=0.2), plan()
    one = update(alone, Patients.of(ids), how, private)
    fifty = update(copies, Patients.of(ids + ["d"] * 49), how, private)
    none = update(examples(random(4, 5)[:3], labels[:3]), Patients.of(ids[:3]), how, private)
    bound = how.lr * 0.2 / 10 * (1 + 1e-5)
    torch.testing.assert_close(fifty, one)
    assert (fifty - none).norm() <= bound
    per_image = update(copies, each_alone(53), how, private)  # as if images were patients
    assert (per_image - none).norm() > 10 * bound


def test_each_view_of_an_image_is_used_and_stays_with_its_image():
    # Row value = 10 · image + view.
    values = torch.tensor([10.0 * i + v for i in range(4) for v in range(3)])
    seen = []

    data = examples(values[:, None].repeat(1, 5), [0, 1, 2, 0], views=3)
    module = nn.Sequential(nn.Linear(5, CLASSES))
    hook = module.register_forward_pre_hook(lambda _, rows: seen.extend(rows[0][:, 0].tolist()))
    update(data, Patients.of(["a", "a", "b", "c"]), plan(), privacy_plan(steps=80), module=module)
    hook.remove()
    assert set(seen) == set(values.tolist())
    assert len(seen) == 80 * 3


# --- a step ---


def test_a_sum_is_divided_by_the_batch_expected_not_the_one_drawn():
    data, private = some(6), privacy_plan(rate=0.5, enrolled=200, clip=0.4)
    assert private.batch == 100
    entropy, same = known(), known()
    drawn, _ = each_alone(6).draw(0.5, 1, same)
    assert 0 < len(drawn) < 6
    rows = data.batch(drawn, 0, torch.device("cpu"))
    clipped, _ = brute(suffix(), rows, data.labels[drawn], 0.4)
    moved = update(data, each_alone(6), plan(), private, entropy=entropy)
    torch.testing.assert_close(moved.double(), -0.5 * clipped.sum(0) / 100, rtol=0, atol=3e-7)
    assert moved.norm() > 1e-3


def test_noise_is_of_the_promised_size_also_in_steps_without_a_patient():
    # Nobody is ever drawn; each step adds noise of its own to a million weights.
    steps, private = 5, privacy_plan(sigma=2.0, rate=1e-12, steps=5, clip=3.0, enrolled=10**12)
    private = private.model_copy(update={"enrolled": 4 * 10**12})  # a batch of 4
    module, how = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, CLASSES)), plan(lr=0.5)
    moved = update(some(3, width=1000), each_alone(3), how, private, module=module).double()
    unit = how.lr * 2.0 * 3.0 / 4
    off = (moved.square().mean().item() / unit**2 / steps - 1) * math.sqrt(len(moved) / 2)
    assert abs(off) < 6.5
    assert abs(moved.mean().item()) * math.sqrt(len(moved) / steps) / unit < 6.5


def test_noise_comes_once_for_a_step_however_many_rows_are_read_at_a_time(monkeypatch):
    data, how = some(20), plan()
    private = privacy_plan(sigma=5.0, clip=0.3)
    whole = update(data, each_alone(20), how, private, entropy=known())
    monkeypatch.setattr(dp_sgd, "_READ", 3)
    parts = update(data, each_alone(20), how, private, entropy=known())
    assert torch.equal(parts, whole)


def test_the_proximal_term_acts_after_clipping_and_noise():
    data, how = some(6), plan(lr=0.1)
    private, mu = privacy_plan(steps=2, clip=1e-3), 5.0
    module = suffix()
    start = weights(module).double()
    inputs = data.batch(torch.arange(6), 0, torch.device("cpu"))
    first, _ = brute(module, inputs, data.labels, 1e-3)
    middle = copy.deepcopy(module)
    update(data, each_alone(6), how, privacy_plan(clip=1e-3), module=middle, proximal_mu=mu)
    second, _ = brute(middle, inputs, data.labels, 1e-3)
    update(data, each_alone(6), how, private, module=module, proximal_mu=mu)
    step_one = -0.1 * first.sum(0) / 10
    step_two = -0.1 * (second.sum(0) / 10 + mu * step_one)
    moved = weights(module).double() - start
    # Weights are near 1, so that their changes are known to 1e-7.
    torch.testing.assert_close(moved, step_one + step_two, rtol=0, atol=5e-7)
    assert (mu * step_one).norm() > 1e-4  # it would show


def test_weight_decay_acts_after_clipping_and_noise():
    how, private = plan(weight_decay=0.2), privacy_plan(rate=1e-12, enrolled=10**13)
    module = suffix()
    before = weights(module)
    update(some(3), each_alone(3), how, private, module=module)
    torch.testing.assert_close(weights(module), before * (1 - how.lr * 0.2))


def test_it_learns():
    inputs = torch.eye(CLASSES).repeat(40, 1) + 0.1 * random(120, CLASSES)
    data = examples(inputs, [i % CLASSES for i in range(120)])
    module = nn.Linear(CLASSES, CLASSES)
    private = privacy_plan(sigma=1.0, rate=0.5, steps=60, enrolled=120)
    dp_sgd.train(module, data, each_alone(120), plan(), private, lr=1.0)
    counts = trainer.evaluate(module, data, CLASSES)
    assert counts.confusion.diagonal().sum() > 100


# --- nobody can repeat it ---


def test_the_same_study_twice_gives_another_result_whatever_the_seed():
    data, private, how = some(6), privacy_plan(sigma=1.0, rate=0.5, steps=3), plan()
    moved = []
    for _ in range(2):
        torch.manual_seed(7)
        moved.append(update(data, each_alone(6), how, private))
    assert not torch.equal(*moved)
    difference = (moved[0] - moved[1]).norm() / math.sqrt(len(moved[0]))
    assert difference > 0.1 * how.lr / 10  # noise of each, not a rounding


def test_torchs_generator_takes_no_part_and_is_left_alone():
    module = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES))
    before = torch.get_rng_state()
    first, second = (
        update(some(6), each_alone(6), plan(), privacy_plan(), module=copy.deepcopy(module))
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert (first - second).norm() > 1e-3  # dropout, without noise to speak of


def test_half_precision_around_it_is_switched_off():
    def moved():
        return update(some(6), each_alone(6), plan(), privacy_plan(), entropy=known())

    alone = moved()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moved(), alone)


# --- what may change ---


def test_it_tells_nothing_and_leaves_batchnorm_and_modes_alone():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    module[1].requires_grad_(False)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    data = examples(random(6, 3, 6, 6), [0, 1, 2, 0, 1, 2])
    told = dp_sgd.train(module, data, each_alone(6), plan(), privacy_plan(steps=2), lr=0.5)
    assert told is None
    changed = {n for n, t in module.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert not any(part.training for part in module.modules())
    assert all(p.grad is None for p in module.parameters())
    assert not any(part._forward_hooks for part in module.modules())
