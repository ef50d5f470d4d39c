"""Attacks on the private release, each of which told a patient's presence before, and must fail.

The adversary is the one that ε is about: who knows every other patient, chooses the weights, and
sees what leaves bit by bit.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from client.features.extract import Prepared
from client.features.store import Rows
from client.privacy import dp_sgd
from client.privacy.accountant import find_noise_multiplier
from client.privacy.dp_sgd import compute_row_gradient, make_sum
from client.privacy.noise import DEVIATION, Entropy
from client.privacy.noised_sum import NoisedSum
from client.privacy.parameters import PrivateRelease
from client.privacy.plan import PrivacyPlan, Query
from client.privacy.sampling import Patients
from client.training import trainer
from client.training.dataset import Examples
from common.config.study import Study, Train
from common.model.backbones import Head
from common.model.network import assemble
from common.model.split import train_mode

pytestmark = pytest.mark.numbers

DELTA = 1e-5
PLAN = Train(rounds=1, local_steps=1, optimizer="sgd", momentum=0.0, lr=64.0)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def examples(inputs, labels):
    rows = Rows([(inputs, i) for i in range(len(inputs))])
    return Examples(Prepared(rows, 1, nn.Identity()), labels)


def privacy_plan(sigma, *, rate=1.0, steps=1, enrolled=10, clip=1.0):
    one = PrivateRelease(
        mechanism="dp_sgd",
        noise_multiplier=sigma,
        sample_rate=rate,
        steps=steps,
        delta=DELTA,
        clip_norm=clip,
    )
    return PrivacyPlan(queries=(Query(kind="round", release=one),), enrolled=enrolled)


def each_alone(n):
    return Patients.of([str(i) for i in range(n)])


def losses():
    return partial(trainer.losses, plan=PLAN, weights=None)


def summed(module, inputs, labels, private, seeds=None):
    """The whole numbers to which noise is added; each patient's seed is its number if not given."""
    total = make_sum(module, private)
    for i, seed in enumerate(seeds or range(len(inputs))):
        total.add(compute_row_gradient(module, (inputs[[i]], labels[[i]], seed), losses()))
    return total


# --- holes between the numbers that can be released (Mironov 2012) ---

WIDTH, CLASSES, PATIENTS = 64, 7, 40
INPUTS = F.normalize(drawn(PATIENTS, WIDTH, seed=1), dim=1)
LABELS = torch.arange(PATIENTS) % CLASSES
CLAIMED = 0.1
SIGMA = 33.88  # what ε = 0.1 takes in one step on all


def head():
    linear = nn.Linear(WIDTH, CLASSES)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear.train()


def with_or_without(last):
    """Float32 sums of clipped gradients, with the last patient or without."""
    total = summed(head(), INPUTS[: PATIENTS - 1 + last], LABELS, privacy_plan(SIGMA))
    return [(s.double() / total.longest).float() for s in total.sums]


def nearby(values, steps=4):
    up = down = values
    yield values
    for _ in range(steps):
        up = torch.nextafter(up, torch.full_like(up, math.inf))
        down = torch.nextafter(down, torch.full_like(down, -math.inf))
        yield from (up, down)


def impossible(seen, sums):
    """How many numbers no float32 noise can lead to from these sums; the old release's weakness."""
    count = 0
    for got, total in zip(seen, sums, strict=True):
        noise = ((got.double() * PATIENTS - total.double()) / SIGMA).float()
        possible = torch.zeros_like(got, dtype=torch.bool)
        for guess in nearby(noise):
            possible |= total.clone().add_(guess, alpha=SIGMA).div_(PATIENTS) == got
        count += int((~possible).sum())
    return count


def old_release(last, generator):
    """As it was: float32 noise, times σ, added to a float32 sum."""
    noise = [torch.randn(s.shape, generator=generator) for s in with_or_without(last)]
    return [
        s.add_(z, alpha=SIGMA).div_(PATIENTS)
        for s, z in zip(with_or_without(last), noise, strict=True)
    ]


def new_release(last, _):
    """What a server reads from a round's weights: they began at 0, and 64 is a power of two."""
    module, n = head(), PATIENTS - 1 + last
    data = examples(INPUTS[:n], LABELS[:n])
    private = privacy_plan(SIGMA, enrolled=PATIENTS)
    dp_sgd.train(module, data, each_alone(n), PLAN, private, lr=64.0)
    return [(-p.detach() / 64).flatten() for p in module.parameters()]


def right_guesses(release, runs):
    generator, right = torch.Generator().manual_seed(5), 0
    without, with_it = with_or_without(0), with_or_without(1)
    for run in range(runs):
        seen = release(run % 2, generator)
        zero, one = impossible(seen, without), impossible(seen, with_it)
        right += (one < zero) == run % 2 if one != zero else run % 4 > 1
    return right


def test_claimed_epsilon_is_the_tenth_it_is_said_to_be():
    assert find_noise_multiplier(epsilon=CLAIMED, delta=DELTA, sample_rate=1.0, steps=1) == SIGMA


def test_holes_told_presence_in_the_old_release():
    assert right_guesses(old_release, 40) == 40


def test_holes_tell_nothing_in_this_one():
    runs = 400
    right = right_guesses(new_release, runs)
    assert abs(right - runs / 2) < 4 * math.sqrt(runs) / 2


def test_every_whole_number_can_follow_from_either_sum():
    """The exact form: with the patient or without, the same numbers are within reach."""
    private = privacy_plan(SIGMA, enrolled=PATIENTS)
    n = PATIENTS
    sums = [torch.cat(summed(head(), INPUTS[:k], LABELS, private).sums) for k in (n - 1, n)]
    (noise,) = Entropy().gaussians([sums[1].shape])
    released = sums[1] + noise
    other = released - sums[0]  # the noise that the other sum would have needed
    assert other.dtype == torch.int64
    # The likelihoods differ by no more than those of the ideal mechanism.
    ratio = (other.double().square() - noise.double().square()).sum() / (2 * float(DEVIATION) ** 2)
    shift = (sums[1] - sums[0]).double()
    ideal = (noise.double() * shift).sum() / float(DEVIATION) ** 2
    ideal += shift.square().sum() / (2 * float(DEVIATION) ** 2)
    assert ratio.item() == pytest.approx(ideal.item(), rel=1e-6, abs=1e-9)
    assert shift.norm() <= DEVIATION / SIGMA


# --- weights that let one patient count for more than the clipping norm ---

KINDS = {
    "linear": lambda: nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)),
    "tokens": lambda: nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Linear(4, 5), Pooled()),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 6, 2, padding=1), nn.ReLU(), Pooled()
    ),
    "grouped": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 6, 1, groups=3), nn.SiLU(), Pooled()
    ),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 3)),
    "group norm": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)), nn.GroupNorm(3, 3), nn.Conv2d(3, 3, 1), Pooled()
    ),
    "attention": lambda: nn.Sequential(nn.Unflatten(1, (3, 4)), Attention(), Pooled()),
}


class Attention(nn.Module):
    """With a table of positions and a scale for each channel, which stand alone."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(3, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = x + self.positions
        return self.scale * self.attention(x, x, x)[0]


class Pooled(nn.Module):
    """The sum over positions, where terms of either sign cancel."""

    def forward(self, x):
        return x.flatten(2).sum(2)[:, :3] if x.ndim == 4 else x.sum(1)[:, :3]


def craft(module, generator):
    """Weights of any size a message may hold, constant, random or of alternating signs."""

    def uniform(low, high):
        return float(torch.empty(1).uniform_(low, high, generator=generator))

    for p in module.parameters():
        if not p.requires_grad:
            continue
        kind, size = int(uniform(0, 5)), 10 ** uniform(-20, 2)
        values = torch.randn(p.shape, generator=generator).clamp(-1, 1)
        if kind == 0:
            values = torch.zeros(p.shape)
        elif kind == 1:
            values = torch.ones(p.shape)
        elif kind == 2:
            values = values.sign()
        with torch.no_grad():
            p.copy_(values * size)


def hostile_rows(shape, generator):
    """Rows of any size, some of which cancel themselves."""
    rows = torch.randn(6, *shape, generator=generator)
    sizes = 10 ** torch.empty(6).uniform_(-38, 20, generator=generator)
    sizes[0] = 1.0
    flat = rows.flatten(1)
    flat[1, ::2] = -flat[1, 1::2][: flat[1, ::2].numel()].mean()
    return flat.mul(sizes[:, None]).view(rows.shape)


def assert_bounded(module, rows, labels, private):
    """One patient more moves the sum by what that one adds alone, no longer than the norm."""
    whole = summed(module, rows, labels, private)
    for out in range(len(rows)):
        kept = [i for i in range(len(rows)) if i != out]
        without = summed(module, rows[kept], labels[kept], private, kept)
        alone = summed(module, rows[[out]], labels[[out]], private, [out])
        apart = [a - b for a, b in zip(whole.sums, without.sums, strict=True)]
        assert all(map(torch.equal, apart, alone.sums))
        assert sum(float(a.double().square().sum()) for a in apart) <= whole.longest**2


@pytest.mark.parametrize("kind", KINDS)
def test_no_weights_of_any_layer_defeat_the_clip(kind):
    generator, moved = torch.Generator().manual_seed(3), 0
    module = KINDS[kind]().train()
    for trial in range(60):
        craft(module, generator)
        rows = hostile_rows((12,), generator)
        private = privacy_plan(1.0, clip=10.0 ** (trial % 7 - 3))
        assert_bounded(module, rows, torch.arange(6) % 3, private)
        moved += summed(module, rows, torch.arange(6) % 3, private).sums[-1].any().item()
    assert moved > 20  # the search is not of dead weights alone


@pytest.mark.parametrize(
    "backbone",
    [
        "squeezenet1_0",
        pytest.param("resnet18", marks=pytest.mark.slow),
        "shufflenet_v2_x0_5",
        pytest.param("densenet121", marks=pytest.mark.slow),
        pytest.param("swin_t", marks=pytest.mark.slow),
    ],
)
def test_no_weights_of_a_backbone_defeat_the_clip(backbone):
    study = Study(
        name="t",
        classes=("a", "b"),
        model={"backbone": backbone, "weights": "none", "unfreeze": "last:1"},
        images={"size": 64},
        train={"rounds": 1},
        privacy={"mechanism": "dp_sgd", "epsilon": 8, "delta": DELTA},
    )
    network = assemble(study, "none")
    suffix = network.split.suffix
    with torch.no_grad():
        shape = network.split.prefix(drawn(1, 3, 64, 64)).shape[1:]
    train_mode(suffix)
    generator, private = torch.Generator().manual_seed(4), privacy_plan(1.0)
    for _ in range(4):
        craft(suffix, generator)
        assert_bounded(suffix, hostile_rows(shape, generator)[:3], torch.tensor([0, 1, 1]), private)


def test_the_weights_that_let_a_patient_count_five_million_times():
    """Tiny squeezes, huge expansions: the norm was of one pass, the gradient of another."""
    study = Study(
        name="t",
        classes=("a", "b"),
        model={"backbone": "squeezenet1_0", "weights": "none", "unfreeze": "last:1"},
        images={"size": 64},
        train={"rounds": 1},
        privacy={"mechanism": "dp_sgd", "epsilon": 0.5, "delta": DELTA},
    )
    network = assemble(study, "none")
    suffix = network.split.suffix
    pixels = torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = network.split.prefix(network.preprocess.normalise(pixels.to(torch.uint8)))
        for name, p in suffix.named_parameters():
            if name.endswith("squeeze.weight"):
                p.fill_(6.323571713648781e-18)
            elif (
                "expand" in name and name.endswith("weight")
            ) or name == "classifier.linear.weight":
                p.fill_(8192.0)
            elif name == "classifier.linear.bias":
                p.copy_(torch.tensor([1.5127458572387695, 0.0]))
            elif p.requires_grad:
                p.zero_()
    train_mode(suffix)
    assert_bounded(suffix, rows, torch.tensor([0, 1, 1, 0, 1]), privacy_plan(7.178))


# --- dropout that one patient more changes for all others ---


def sum_with_dropout(first, seeds):
    """The sum of a head's rows from the `first` on, in clipping norms.

    Whoever knows the others knows it: of the seeds of a stream torch tells only 2³² apart.
    """
    suffix, private = Head(WIDTH, CLASSES, 0.9).train(), privacy_plan(SIGMA)
    total = make_sum(suffix, private)
    for i, seed in zip(range(first, PATIENTS), seeds, strict=False):
        row = INPUTS[[i]] * 10, LABELS[[i]], seed
        total.add(compute_row_gradient(suffix, row, losses()))
    return torch.cat(total.sums).double() / total.longest


def test_dropout_from_one_stream_moved_a_sum_by_several_clipping_norms():
    stream = Entropy().seeds(PATIENTS).tolist()
    apart = sum_with_dropout(0, stream) - sum_with_dropout(1, stream)
    assert apart.norm() > 3


def test_a_patient_changes_nobody_elses_dropout():
    own = Entropy().seeds(PATIENTS).tolist()
    apart = sum_with_dropout(0, own) - sum_with_dropout(1, own[1:])
    assert apart.norm() <= 1 + 1e-9


# --- an audit of the whole mechanism by a canary, as it is and with each part broken ---

RATE, STEPS, EPSILON, RUNS = 0.25, 6, 1.0, 300
CANARY_SIGMA = 2.838


def canary_scores(member, private):
    """What a round tells in the direction that only the canary's gradient has, RUNS times."""
    n, width = 4, 6
    inputs = torch.zeros(n + 1, width)
    inputs[:n, :2] = 2 * drawn(n, 2, seed=2)
    inputs[n, 5] = 50.0
    labels = torch.zeros(n + 1, dtype=torch.int64)
    scores = []
    kept = n + member
    data, whose = examples(inputs[:kept], labels[:kept]), each_alone(kept)
    for run in range(RUNS):
        module = nn.Linear(width, 2, bias=False)
        nn.init.zeros_(module.weight)
        entropy = Entropy()
        entropy._key_of_tests_only(bytes([member]) + run.to_bytes(31, "little"))
        dp_sgd.train(module, data, whose, PLAN, private, lr=1e-4, entropy=entropy)
        along = module.weight.detach().double()[:, 5]
        scores.append(float(along[0] - along[1]) / math.sqrt(2) * private.batch / 1e-4)
    return np.array(scores)


def least(hits, runs):
    return stats.beta.ppf(0.025, hits, runs - hits + 1) if hits else 0.0


def most(hits, runs):
    return stats.beta.ppf(0.975, hits + 1, runs - hits) if hits < runs else 1.0


def by_threshold(without, with_it):
    """A 95 % lower bound of ε (Clopper and Pearson); the threshold comes from the other half."""

    def bound(a, b, threshold, sign):
        false, true = (sign * a > sign * threshold).sum(), (sign * b > sign * threshold).sum()
        odds = (least(true, len(b)) - DELTA) / most(false, len(a))
        return math.log(odds) if odds > 1 else 0.0

    half = RUNS // 2
    tried = np.quantile(
        np.concatenate([without[:half], with_it[:half]]), np.linspace(0.01, 0.99, 99)
    )
    best = max(
        ((t, sign) for t in tried for sign in (1, -1)),
        key=lambda choice: bound(without[:half], with_it[:half], *choice),
    )
    return bound(without[half:], with_it[half:], *best)


def by_mean(without, with_it):
    """A 95 % lower bound of the shift, over what the mechanism promises at most."""
    shift = with_it.mean() - without.mean()
    error = math.sqrt(without.var(ddof=1) / RUNS + with_it.var(ddof=1) / RUNS)
    return (shift - 1.96 * error) / (STEPS * RATE)


def by_spread(without):
    """A 95 % upper bound of the noise's deviation, over what was promised."""
    upper = without.std(ddof=1) * math.sqrt((RUNS - 1) / stats.chi2.ppf(0.05, RUNS - 1))
    return upper / (CANARY_SIGMA * math.sqrt(STEPS))


def audit():
    private = privacy_plan(CANARY_SIGMA, rate=RATE, steps=STEPS, enrolled=4)
    without, with_it = canary_scores(0, private), canary_scores(1, private)
    return by_threshold(without, with_it), by_mean(without, with_it), by_spread(without)


def test_a_canary_is_told_no_better_than_epsilon_says():
    sigma = find_noise_multiplier(epsilon=EPSILON, delta=DELTA, sample_rate=RATE, steps=STEPS)
    assert sigma == CANARY_SIGMA
    empirical, shift, spread = audit()
    assert empirical < EPSILON
    assert shift < 1
    assert spread > 1


class FourTimesTheClip(NoisedSum):
    def add(self, row):
        self._clip, self.longest = 4 * self._clip, 4 * self.longest
        super().add(row)
        self._clip, self.longest = self._clip / 4, self.longest / 4


class HalfTheNoise(Entropy):
    def gaussians(self, shapes):
        return [z // 2 for z in super().gaussians(shapes)]


class EverybodyAlways(Entropy):
    def poisson(self, n, rate):
        return torch.arange(n)


class NoiseOnce(Entropy):
    done = False

    def gaussians(self, shapes):
        noise = super().gaussians(shapes)
        first, self.done = not self.done, True
        return noise if first else [torch.zeros_like(z) for z in noise]


@pytest.mark.parametrize("broken", [FourTimesTheClip, HalfTheNoise, EverybodyAlways, NoiseOnce])
def test_a_broken_mechanism_is_caught(broken, monkeypatch):
    if issubclass(broken, Entropy):
        monkeypatch.setattr(f"{__name__}.Entropy", broken)
    else:
        monkeypatch.setattr(dp_sgd, "NoisedSum", broken)
    empirical, shift, spread = audit()
    assert empirical > EPSILON or shift > 1 or spread < 1
