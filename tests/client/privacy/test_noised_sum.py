"""The noised sum: exact, clipped, whole, and refused where it would not be."""

import math

import pytest
import torch

from client.privacy.noise import DEVIATION, Entropy
from client.privacy.noised_sum import NoisedSum
from common.errors import RefusedError

pytestmark = pytest.mark.numbers

SHAPES = [torch.Size((3, 4)), torch.Size((5,))]
COUNT = 17


def drawn(seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(shape, generator=generator) for shape in SHAPES]


def empty(clip=1.0, sigma=2.0, shapes=SHAPES):
    return NoisedSum(shapes, clip_norm=clip, noise_multiplier=sigma)


def summed(*rows, **options):
    total = empty(**options)
    for row in rows:
        total.add(row)
    return torch.cat(total.sums)


def flat(row):
    return torch.cat([part.flatten() for part in row]).double()


class Silent(Entropy):
    def gaussians(self, shapes):
        return [torch.zeros(shape, dtype=torch.int64) for shape in shapes]


@pytest.mark.parametrize("clip", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("sigma", [0.3, 2.0, 40.0])
def test_a_row_within_the_norm_counts_as_it_is_but_for_the_lattice(clip, sigma):
    row = drawn(size=0.05 * clip)
    total = empty(clip, sigma)
    total.add(row)
    told = torch.cat([part.flatten() for part in total.release(Silent())])
    unit = sigma * clip / DEVIATION
    off = (told - flat(row) * (1 - 2.0**-20)).abs()
    assert off.max() <= unit * (1 + 1e-6)
    assert [tuple(part.shape) for part in empty().release(Silent())] == [(3, 4), (5,)]


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e20, 1e37])
def test_no_row_is_longer_than_the_norm(size):
    for seed in range(50):
        total = empty()
        total.add(drawn(seed, size))
        length = math.sqrt(sum(int(n) ** 2 for part in total.sums for n in part.tolist()))
        assert length <= total.longest
        if size >= 1:
            assert length > total.longest * (1 - 2.0**-19)


def test_numbers_are_cut_off_towards_zero():
    row = drawn(size=3.0)
    scaled = flat(row) * ((1 - 2.0**-20) * empty().longest / flat(row).norm())
    whole = summed(row)
    assert (whole.double().abs() <= scaled.abs() + 1e-4).all()
    assert (whole.double() - scaled).abs().max() < 1


def test_the_order_does_not_matter_and_a_row_adds_what_it_adds_alone():
    rows = [drawn(seed, 10.0 ** (seed % 9 - 4)) for seed in range(40)]
    forth, back = summed(*rows), summed(*reversed(rows))
    assert forth.equal(back)
    for out in (0, 17, 39):
        rest = summed(*rows[:out], *rows[out + 1 :])
        assert (forth - rest).equal(summed(rows[out]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_adds_nothing(bad):
    row = drawn()
    row[1][2] = bad
    assert not summed(row).any()
    assert summed(drawn(1), row).equal(summed(drawn(1)))


def test_a_row_of_zeros_adds_zeros():
    assert not summed([torch.zeros(shape) for shape in SHAPES]).any()


def test_a_row_that_is_too_long_all_the_same_is_refused():
    """The norm of one thing, the sum of another: the fault that this guards against."""

    class Other(torch.Tensor):
        """Three times as long when it is read again."""

        times = 1

        def flatten(self):
            numbers = self.times * self.as_subclass(torch.Tensor).reshape(-1)
            self.times = 3
            return numbers

    row = [part.as_subclass(Other) for part in drawn(size=3.0)]
    with pytest.raises(RefusedError, match=r"at most the clipping norm long, got 2\.9999"):
        empty().add(row)


@pytest.mark.parametrize("changed", [lambda part: part[:1], torch.Tensor.double])
def test_a_row_of_another_shape_or_type_is_refused(changed):
    total, (first, *others) = empty(), drawn()
    with pytest.raises(RefusedError, match="a row: expected float32 of"):
        total.add([changed(first), *others])
    assert not any(part.any() for part in total.sums)


def test_so_many_rows_that_the_sum_could_overflow_are_refused():
    total = empty(sigma=1e-8)
    row = [torch.ones(shape) for shape in SHAPES]
    with pytest.raises(RefusedError, match=r"noised sum: rows: expected less than 0\.671"):
        total.add(row)
    assert not any(part.any() for part in total.sums)


def test_what_is_released_is_the_sum_and_the_draw_exactly():
    rows = [drawn(seed) for seed in range(5)]
    key = bytes(range(32))
    one, two = Entropy(), Entropy()
    one._key_of_tests_only(key)
    two._key_of_tests_only(key)
    total = empty()
    for row in rows:
        total.add(row)
    sums = [part.clone() for part in total.sums]
    told = total.release(one)
    noise = two.gaussians([part.shape for part in sums])
    unit = 2.0 / DEVIATION
    for got, part, draw in zip(told, sums, noise, strict=True):
        assert got.flatten().equal((part + draw).double() * unit)
    assert total.sums == []
