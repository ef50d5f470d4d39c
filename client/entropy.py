"""Randomness that nobody can know or repeat: who is sampled for a step, and the noise added to it.

ε holds only against those who cannot predict either. So both come from a ChaCha20 keystream under a
key of the operating system's; the study's seed and torch's generators have no part in it.
"""

import math
import os
from collections.abc import Sequence
from itertools import count

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

_UNIT = 2.0**-53
_WORD = 2**53
"""Words of 53 bits: all of them are float64, exactly."""
_PAIRS = 2**15
"""Normal numbers are made this many pairs at a time: 4 MB of memory, however many are asked for."""


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
        return (self._words(n) < math.floor(rate * _WORD)).nonzero().squeeze(1)

    def below(self, bounds: Tensor) -> Tensor:
        """Below each bound (int64, 1 to 2⁵³) a whole number, 0 at least; all equally likely."""
        words = self._words(len(bounds))
        # The last, incomplete run of `bound` words would favour small numbers.
        unfair = words >= _WORD - _WORD % bounds
        if unfair.any():
            words[unfair] = self.below(bounds[unfair])
        return words % bounds

    def seed(self) -> int:
        """A seed for what needs no secrecy but must not repeat, such as dropout: 53 bits."""
        return int(self._words(1))

    def gaussians(self, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Independent standard normal numbers in these shapes, float32.

        Each is half the sum of four, by Box and Muller from 53-bit uniforms in float64: from one
        alone, its rounding could tell what it was added to (Holohan and Braghin 2021).
        """
        sizes = [shape.numel() for shape in shapes]
        flat = torch.empty(sum(sizes), dtype=torch.float32)
        for part in flat.split(2 * _PAIRS):
            cosines, sines = self._pairs(-(-len(part) // 2))
            half = len(cosines)
            part[:half], part[half:] = cosines, sines[: len(part) - half]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]

    def _pairs(self, n: int) -> tuple[Tensor, Tensor]:
        """Two times `n` normal numbers, float64; no two terms of a sum are of the same pair."""
        uniform = self._words(8 * n).double().view(2, 4, n)
        # (-2 log u)^½ / 2, with u in (0, 1]
        radius = uniform[0].add_(1).mul_(_UNIT).log_().mul_(-0.5).sqrt_()
        angle = uniform[1].mul_(2 * math.pi * _UNIT)
        cosines = angle.cos().mul_(radius).sum(0)
        return cosines, angle.sin_().mul_(radius).sum(0)

    def _words(self, n: int) -> Tensor:
        """The next `n` words, int64 in [0, 2⁵³), under a nonce of their own."""
        if not n:
            return torch.empty(0, dtype=torch.int64)
        start = bytes(4) + next(self._nonces).to_bytes(12, "little")
        stream, words = bytes(8 * n), bytearray(8 * n)
        Cipher(ChaCha20(self._key, start), mode=None).encryptor().update_into(stream, words)
        return torch.frombuffer(words, dtype=torch.int64).bitwise_and_(_WORD - 1)
