"""Numbers of patients that leave rounded: to a multiple above or below, by a coin of this site.

Rounding to the nearest multiple is a threshold. Whoever can move a number by one, as a server can
by a model made for it, learns from the side it falls on whether one patient is there. So each
number goes up with the probability that makes it right on average (Cox 1987), by coins that are a
keyed function of the site's secret and of what is counted. The same question has the same answer,
so asking again averages nothing out. For another model the coins are others, so two answers cannot
be subtracted.

All that is told of one count adds up: images of a part to a multiple next to it, those of each
class to that total, and the cells of the confusion matrix in the row of each class to that class.
One patient more or less, who adds one to a cell, changes what is told of it with a probability of
1/base for each number that the cell is part of.
"""

import hashlib
import hmac
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from common.metrics.counts import Counts

_BITS = 64


class Rounding:
    """Rounds the numbers of one site.

    Args:
      secret: The site's; whoever knows it can tell which way a number went.
      base: What every number told is a multiple of; 1 leaves all as they are.
    """

    def __init__(self, secret: bytes, base: int) -> None:
        self._key, self._base = hmac.digest(secret, b"rounding", hashlib.sha256), base

    def round_number(self, n: int, *what: str) -> int:
        """A number that `what` names, as it is told: a multiple less than a base away from it."""
        down = n - n % self._base
        return down + self._base * (self._coin(*what) * self._base < n % self._base)

    def lower_number(self, n: int, *what: str) -> int:
        """A number less than a base below that `what` names, by as much each time.

        Whatever it is compared with, one patient more or less decides in one of base cases.
        """
        return n - int(self._coin("lower", *what) * self._base)

    def round_images(self, images: Sequence[int], part: str) -> tuple[int, ...]:
        """Images of each class in a part, as they are told."""
        total = self.round_number(sum(images), "images", part)
        return self._apportion(images, total, "images", part)

    def round_counts(self, counts: Counts, part: str, model: str) -> Counts:
        """Counts of a part as they are told, without scores; all of them where the base is 1.

        The deviation told with them is that of a cell which may lie anywhere between two multiples.

        Args:
          counts: Of all images of the part.
          part: Its name.
          model: The SHA-256 of what was evaluated.
        """
        if self._base == 1:
            return counts
        rows = counts.confusion.tolist()
        told = self.round_images([sum(row) for row in rows], part)
        cells = [
            self._apportion(row, total, "cells", part, model, str(k))
            for k, (row, total) in enumerate(zip(rows, told, strict=True))
        ]
        return counts.coarse(np.array(cells, np.int64), self._base / math.sqrt(6))

    def _apportion(self, numbers: Sequence[int], total: int, *what: str) -> tuple[int, ...]:
        """Each number to a multiple next to it, together `total`, one of the two next to the sum.

        By systematic sampling in a random order (Madow 1949): the chance to go up is what a number
        is above its lower multiple, as a share of the base, but for what the total rounded away.
        """
        down = [n - n % self._base for n in numbers]
        above = [Fraction(n % self._base, self._base) for n in numbers]
        up, whole = (total - sum(down)) // self._base, sum(above, Fraction())
        some = sum(1 for share in above if share)
        if up < whole:
            above = [share * up / whole for share in above]
        elif up > whole:
            above = [share and 1 - (1 - share) * (some - up) / (some - whole) for share in above]
        order = sorted(range(len(numbers)), key=lambda i: self._coin(*what, "order", str(i)))
        at, told = self._coin(*what), [*down]
        for i in order:
            told[i] += self._base * (int(at + above[i]) - int(at))
            at += above[i]
        return tuple(told)

    def _coin(self, *what: str) -> Fraction:
        """In [0, 1), the same whenever the same is asked."""
        drawn = hmac.digest(self._key, "\0".join(what).encode(), hashlib.sha256)
        return Fraction(int.from_bytes(drawn[: _BITS // 8], "big"), 2**_BITS)
