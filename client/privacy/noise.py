"""Randomness that nobody can know or repeat: who is sampled for a step, and the noise added to it.

ε holds only against those who cannot predict either. So both come from a ChaCha20 keystream under a
key of the operating system's; the study's seed and torch's generators have no part in it.
"""

import math
import os
from collections.abc import Sequence
from decimal import Context, Decimal
from itertools import count

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

DEVIATION = 2**36
"""The standard deviation of `Entropy.gaussians`, in steps of their lattice."""

_BITS = 53
_WORD = 2**_BITS
"""Words of 53 bits: all of them are float64, exactly."""

# A normal number is sought on a grid of 2⁻⁴⁹, below a staircase of 128 steps that are 1/8 wide.
_GRID, _STAIR, _UNIT = 49, 46, 378
_HEIGHTS = [math.ceil(_UNIT * math.exp(-((k / 8) ** 2) / 2) + 0.01) for k in range(128)]
"""Of each step, in 1/378: nowhere below the density, however `exp` rounds."""
_HEIGHTS[0] += 2**12 - sum(_HEIGHTS)
_STEPS = torch.tensor([k for k, height in enumerate(_HEIGHTS) for _ in range(height)])
"""The step at each of the 2¹² columns of the staircase, which are equally likely."""
_HEIGHT = torch.tensor(_HEIGHTS)
_DOUBT = 2.0**-40
"""So far off the density may be in float64, as a share; what is closer is decided exactly."""
_SOME = 2**16
"""As many candidates are drawn at a time: 2 MB of memory, however many numbers are asked for."""

_EXACT = Context(prec=160)


class Entropy:
    """A stream of secret random numbers; a fresh one for every round.

    It cannot be seeded, and is never written anywhere: once gone, its numbers are gone too.
    """

    def __init__(self) -> None:
        self._key_of_tests_only(os.urandom(32))

    def _key_of_tests_only(self, key: bytes) -> None:
        """Start over under a 256-bit key. Whoever knows the key can take the noise off again."""
        self._key, self._nonces = key, count()

    def poisson(self, n: int, rate: float) -> Tensor:
        """Which of `n` are drawn, each by itself with probability `rate`: positions, int64.

        The rate is exact to 2⁻⁵³, rounded down, which is toward privacy; 1 draws all of them.
        """
        drawn: Tensor = self._words(n) < math.floor(rate * _WORD)
        return drawn.nonzero().squeeze(1)

    def below(self, bounds: Tensor) -> Tensor:
        """Below each bound (int64, 1 to 2⁵³) a whole number, 0 at least; all equally likely."""
        words = self._words(len(bounds))
        # The last, incomplete run of `bound` words would favour small numbers.
        unfair = words >= _WORD - _WORD % bounds
        if unfair.any():
            words[unfair] = self.below(bounds[unfair])
        return words % bounds

    def seeds(self, n: int) -> Tensor:
        """So many seeds of dropout, independent of each other: int64, 53 bits."""
        return self._words(n)

    def gaussians(self, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Independent normal numbers rounded to whole ones, int64, of deviation `DEVIATION`.

        Each is round(2³⁶ · ξ) for a normal ξ, by rejection (von Neumann 1951) in whole numbers: a
        cell of a grid of 2⁻⁴⁹ is drawn below a staircase over the density, and kept with the
        probability that makes it exact. No logarithm or cosine is rounded on the way, and no
        multiple of 2⁻³⁶ is out of reach, so there is nothing for an observer to see in the bits
        (Mironov 2012). What differs from the ideal: the density is taken at the middle of a cell,
        at a random height of 106 bits, and ends at 16 deviations. Up to 5 deviations that changes
        it by a share of at most 2⁻⁹⁴; beyond, it moves a probability of less than 2⁻¹¹⁰.
        """
        sizes = [shape.numel() for shape in shapes]
        flat, filled = torch.empty(sum(sizes), dtype=torch.int64), 0
        while filled < len(flat):
            missing = len(flat) - filled
            found = self._normal(min(missing + missing // 8 + 16, _SOME))[:missing]
            flat[filled : filled + len(found)] = found
            filled += len(found)
        return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]

    def _normal(self, candidates: int) -> Tensor:
        """Rounded normal numbers, from so many candidates; about 0.92 of them are kept."""
        bits = self._bits(candidates)
        step = _STEPS[bits & 2**12 - 1]
        cell = (step << _STAIR) + (bits >> 12 & 2**_STAIR - 1)
        kept = self._under(cell, _HEIGHT[step])
        fine = _GRID - DEVIATION.bit_length() + 1
        size = cell + (1 << fine - 1) >> fine
        return torch.where(bits < 0, -size, size)[kept]

    def _under(self, cell: Tensor, height: Tensor, doubt: float = _DOUBT) -> Tensor:
        """Whether a point at a random height of each cell's step lies below the density."""
        words = self._words(len(cell))
        middle = (cell.double() + 0.5) * 2.0**-_GRID
        share = (middle.square() * -0.5).exp() / height * (_UNIT * _WORD)
        slack = share * doubt + 1
        below: Tensor = words < share
        for i in ((words - share).abs() <= slack).nonzero().squeeze(1).tolist():
            point = (int(words[i]) << _BITS) + int(self._words(1))
            below[i] = _below(point, int(cell[i]), int(height[i]))
        return below

    def _words(self, n: int) -> Tensor:
        """The next `n` words, int64 in [0, 2⁵³)."""
        words: Tensor = self._bits(n).bitwise_and_(_WORD - 1)
        return words

    def _bits(self, n: int) -> Tensor:
        """The next `n` times 64 bits, int64, under a nonce of their own."""
        if not n:
            return torch.empty(0, dtype=torch.int64)
        start = bytes(4) + next(self._nonces).to_bytes(12, "little")
        stream, bits = bytes(8 * n), bytearray(8 * n)
        Cipher(ChaCha20(self._key, start), mode=None).encryptor().update_into(stream, bits)
        return torch.frombuffer(bits, dtype=torch.int64)


def _below(point: int, cell: int, height: int) -> bool:
    """Whether `point` · 2⁻¹⁰⁶ of a step's height is below the density in a cell, exactly."""
    twice = Decimal(2 * cell + 1)  # the middle, in 2⁻⁵⁰
    exponent = _EXACT.divide(_EXACT.multiply(twice, twice), Decimal(-(2 ** (2 * _GRID + 3))))
    density = _EXACT.multiply(_EXACT.exp(exponent), Decimal(_UNIT << 2 * _BITS))
    return Decimal(point * height) < density
