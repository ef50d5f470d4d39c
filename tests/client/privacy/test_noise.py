"""The secret numbers are what ε assumes: of the right distribution, and never the same twice.

Every statistical test here fails a correct generator less than once in 10⁹ runs.
"""

import itertools
import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy import stats

from client.privacy import noise as module
from client.privacy.noise import DEVIATION, Entropy

pytestmark = pytest.mark.numbers

RARE = 1e-9
FAR = 6.5  # standard deviations


def known(key=bytes(32)):
    entropy = Entropy()
    entropy._key_of_tests_only(key)
    return entropy


def normal(n, entropy=None):
    (values,) = (entropy or Entropy()).gaussians([torch.Size([n])])
    return values.double() / DEVIATION


def far(sample, mean, variance):
    """How many standard deviations the mean of `sample` is off."""
    return abs(sample.double().mean().item() - mean) * math.sqrt(len(sample) / variance)


# --- the stream ---


def test_nobody_can_seed_it():
    with pytest.raises(TypeError):
        Entropy(7)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        draws.append(normal(10))
    assert not torch.equal(*draws)


def test_it_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    entropy = Entropy()
    entropy.poisson(10, 0.5), entropy.below(torch.tensor([3])), normal(10, entropy)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_key_gives_the_same_stream_and_another_another():
    one, again, other = known(), known(), known(bytes(31) + b"\1")
    for draw in (lambda e: normal(5, e), lambda e: e.below(torch.full((9,), 2**40))):
        value = draw(one)
        assert torch.equal(value, draw(again))
        assert not torch.equal(value, draw(other))


def test_words_are_chacha20_under_a_nonce_for_each_request():
    entropy = known(bytes(range(32)))
    for nonce in range(3):
        start = bytes(4) + nonce.to_bytes(12, "little")
        stream = Cipher(ChaCha20(bytes(range(32)), start), mode=None).encryptor().update(bytes(80))
        words = np.frombuffer(stream, "<u8") & (2**53 - 1)
        assert entropy._words(10).tolist() == words.tolist()


def test_no_position_of_the_stream_is_used_twice():
    seen = []

    class Noting(Entropy):
        def _bits(self, n):
            bits = super()._bits(n)
            seen.extend(bits.tolist())
            return bits

    entropy = Noting()
    for _ in range(10):
        entropy.poisson(20, 0.3)
        entropy.below(torch.full((20,), 7))
        entropy.gaussians([torch.Size([3, 5]), torch.Size([7])])
        entropy.seeds(4)
    assert len(seen) > 1000
    assert len(set(seen)) == len(seen)


def test_the_key_is_not_shown():
    entropy = known(b"0123456789abcdef0123456789abcdef")
    assert "0123456789abcdef" not in f"{entropy} {entropy!r}"


# --- noise ---


def test_noise_is_standard_normal():
    values = normal(400_000)
    assert values.dtype == torch.float64
    assert stats.kstest(values.numpy(), "norm").pvalue > RARE
    assert far(values, 0, 1) < FAR
    assert far(values.square(), 1, 2) < FAR
    assert far(values**4, 3, 96) < FAR


def test_numbers_do_not_depend_on_each_other():
    values = normal(400_000)
    # Neighbours, and those of the next block of candidates.
    for lag in (1, 2, 2**15, 2**16):
        a, b = values[lag:], values[:-lag]
        assert far(a * b, 0, 1) < FAR
        assert far(a.square() * b.square(), 1, 8) < FAR


def test_two_streams_are_independent():
    one, other = normal(200_000), normal(200_000)
    assert far(one * other, 0, 1) < FAR
    assert far(one.square() * other.square(), 1, 8) < FAR


def test_no_number_of_the_lattice_is_likelier_than_another():
    (values,) = Entropy().gaussians([torch.Size([400_000])])
    for low in (2, 256, 4096):
        for shift in (1, 2**12, 2**24):
            counts = (values // shift % low).bincount(minlength=low)
            assert stats.chisquare(counts.numpy()).pvalue > RARE
    assert abs(values.sign().double().mean().item()) * math.sqrt(len(values)) < FAR


def test_the_middle_and_the_tails_have_their_share():
    values, n = normal(2_000_000), 2_000_000
    edges = [-4.5, -4, -3, -2, -1, -1 / 8, 0, 1 / 64, 1 / 8, 1, 2, 3, 4, 4.5]
    for low, high in itertools.pairwise([-math.inf, *edges, math.inf]):
        share = stats.norm.cdf(high) - stats.norm.cdf(low)
        found = ((values >= low) & (values < high)).double().mean().item()
        assert abs(found - share) < 7 * math.sqrt(share / n)


def test_the_staircase_is_nowhere_below_the_density():
    assert sum(module._HEIGHTS) == len(module._STEPS) == 2**12
    for k, height in enumerate(module._HEIGHTS):
        assert height >= mpmath.exp(-(mpmath.mpf(k) ** 2) / 128) * module._UNIT
        assert (k == module._STEPS).sum() == height


def candidates(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    step = torch.randint(0, 60, (n,), generator=generator)
    cell = (step << module._STAIR) + torch.randint(0, 2**module._STAIR, (n,), generator=generator)
    return cell, module._HEIGHT[step]


def test_what_float64_decides_is_what_exact_numbers_decide():
    cell, height = candidates(3000)
    fast, exact = (known()._under(cell, height, doubt) for doubt in (module._DOUBT, 1e9))
    assert torch.equal(fast, exact)
    assert 0.1 < fast.double().mean() < 0.9


def test_exact_decisions_are_those_of_another_library():
    cell, height = candidates(300, seed=1)
    with mpmath.workprec(700):
        for c, h in zip(cell.tolist(), height.tolist(), strict=True):
            middle = mpmath.mpf(2 * c + 1) / 2**50
            limit = mpmath.exp(-(middle**2) / 2) * module._UNIT * 2**106 / h
            for point in (mpmath.floor(limit), mpmath.ceil(limit)):  # neighbours at 2⁻¹⁰⁶
                if 0 <= point < 2**106:
                    assert module._below(int(point), c, h) == (point < limit)


def test_density_in_float64_is_far_closer_than_its_doubt():
    cell, _ = candidates(2000, seed=2)
    middle = (cell.double() + 0.5) * 2.0**-module._GRID
    for c, density in zip(cell.tolist(), (middle.square() * -0.5).exp().tolist(), strict=True):
        with mpmath.workprec(200):
            true = mpmath.exp(-((mpmath.mpf(2 * c + 1) / 2**50) ** 2) / 2)
            assert abs(density / true - 1) < module._DOUBT / 8


@pytest.mark.parametrize("n", [0, 1, 2, 3, 2**16 - 1, 2**16, 2**16 + 1, 150_001])
def test_every_number_of_every_size_is_filled(n):
    shapes = [torch.Size([]), torch.Size([n]), torch.Size([2, 3, 1])]
    values = Entropy().gaussians(shapes)
    assert [v.shape for v in values] == shapes
    assert {v.dtype for v in values} == {torch.int64}
    flat = torch.cat([v.flatten() for v in values])
    assert flat.abs().max() < 16 * DEVIATION
    assert len(flat.unique()) > 0.99 * len(flat)
    assert Entropy().gaussians([]) == []


# --- sampling ---


@pytest.mark.parametrize("rate", [0.5, 0.01, 1 / 3, 1 - 2**-53, 3 * 2.0**-60])
def test_the_rate_is_exact_and_never_above(rate):
    # All 2⁵³ words are equally likely, so their share below the threshold is the true rate.
    words, drawn = known()._words(5000), known().poisson(5000, rate)
    share = math.floor(Fraction(rate) * 2**53)
    assert 0 <= Fraction(rate) - Fraction(share, 2**53) < Fraction(1, 2**53)
    assert drawn.tolist() == [i for i, word in enumerate(words.tolist()) if word < share]


def test_rate_one_draws_everybody():
    for _ in range(20):
        assert Entropy().poisson(1000, 1.0).tolist() == list(range(1000))
    assert Entropy().poisson(0, 1.0).tolist() == []


def test_each_is_drawn_by_itself():
    n, steps, rate = 40, 20_000, 0.2
    entropy = Entropy()
    drawn = torch.zeros(steps, n)
    for step in range(steps):
        drawn[step, entropy.poisson(n, rate)] = 1
    variance = rate * (1 - rate)
    assert all(far(drawn[:, i], rate, variance) < FAR for i in range(n))
    sizes = drawn.sum(1)  # binomial only if independent within a step
    spread = n * variance
    kurtosis = 3 + (1 - 6 * variance) / spread
    assert far((sizes - n * rate) ** 2, spread, spread**2 * (kurtosis - 1)) < FAR
    apart = drawn - rate
    assert far((apart[1:] * apart[:-1]).flatten(), 0, variance**2) < FAR


def test_numbers_below_a_bound_are_equally_likely_row_by_row():
    bounds = torch.tensor([1, 2, 3, 7, 50]).repeat(40_000)
    values = Entropy().below(bounds)
    for bound in (1, 2, 3, 7, 50):
        counts = values[bounds == bound].bincount(minlength=bound)
        assert len(counts) == bound
        assert stats.chisquare(counts.numpy()).pvalue > RARE or bound == 1


def test_large_bounds_are_not_biased_either():
    # By remainders alone, the numbers below 2⁵¹ would come half of the time, not a third.
    bound = 3 * 2**51
    values = Entropy().below(torch.full((100_000,), bound))
    assert values.max() < bound
    low = (values < 2**51).double()
    assert far(low, 1 / 3, 2 / 9) < FAR
    assert Entropy().below(torch.empty(0, dtype=torch.int64)).tolist() == []
