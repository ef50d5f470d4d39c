"""What a solved head needs of images: sums that add up over sites, in float64.

The features are mapped first, each image by itself: less the study's public mean, then to length 1.
So a sum over all sites is the sum over all images, however they are split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from common.metrics.counts import Floats, Ints

_SHORTEST = 1e-12


def map_features(features: Floats, mean: Floats | None) -> Floats:
    """Features [n, d], less the public mean [d], each image scaled to length 1.

    An image whose features are not all finite, or all equal the mean, is all zeros.
    """
    centred = features.astype(np.float64) - (0.0 if mean is None else mean)
    centred = np.where(np.isfinite(centred).all(axis=1, keepdims=True), centred, 0.0)
    unit: Floats = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), _SHORTEST)
    return unit


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over images; `a + b` is of both sets together, and `a - b` of a set without a part.

    Attributes:
      counts: [K], images of each class.
      totals: [K, d], their mapped features, added.
      second: [d, d], x xᵀ of every image, times the weight of its class, added.
      weights: [K], the weight of an image of each class; the same for all that are added.
    """

    counts: Floats
    totals: Floats
    second: Floats
    weights: Floats

    @classmethod
    def of(cls, features: Floats, labels: Ints, weights: Floats) -> Self:
        """The sums of images: mapped features [n, d], labels [n] in 0..K-1, weights [K]."""
        classes = len(weights)
        own = (np.arange(classes)[:, None] == labels).astype(np.float64)
        second = (features * weights[labels][:, None]).T @ features
        return cls(own.sum(axis=1), own @ features, (second + second.T) / 2, weights)

    @classmethod
    def mean(cls, views: Sequence[Self]) -> Self:
        """Of the same images seen in several ways: each way counts alike, and an image once."""
        first, share = views[0], 1 / len(views)
        totals = sum((each.totals for each in views), 0.0 * first.totals) * share
        second = sum((each.second for each in views), 0.0 * first.second) * share
        return cls(first.counts, totals, second, first.weights)

    def scaled(self, factor: float) -> Self:
        """Of the same images, each counting for so much of one."""
        scaled = [factor * part for part in (self.counts, self.totals, self.second)]
        return type(self)(scaled[0], scaled[1], scaled[2], self.weights)

    @classmethod
    def zero(cls, width: int, weights: Floats) -> Self:
        """The sums of no images."""
        return cls.of(np.zeros((0, width)), np.zeros(0, np.int64), weights)

    def __add__(self, other: Self) -> Self:
        return self._with(other, 1.0)

    def __sub__(self, other: Self) -> Self:
        return self._with(other, -1.0)

    def _with(self, other: Self, sign: float) -> Self:
        return type(self)(
            self.counts + sign * other.counts,
            self.totals + sign * other.totals,
            self.second + sign * other.second,
            self.weights,
        )

    @property
    def means(self) -> Floats:
        """[K, d], the mean of each class; zeros where it has no image."""
        means: Floats = self.totals / np.maximum(self.counts, 1.0)[:, None]
        return means

    @property
    def spread(self) -> Floats:
        """[d, d], as `second`, of what each image lies apart from the mean of its class."""
        means, mass = self.means, self.weights * self.counts
        spread: Floats = self.second - (means.T * mass) @ means
        return spread

    @property
    def within(self) -> Floats:
        """[d, d], the covariance within classes, each image with the weight of its class."""
        mass = float(self.weights @ self.counts)
        within: Floats = self.spread / max(mass, np.finfo(float).tiny)
        return within


def balance(counts: Floats) -> Floats:
    """Weights [K] by which all classes that have images count the same; 0 where one has none."""
    some = counts > 0
    weights: Floats = some / np.maximum(counts, 1.0) / max(int(some.sum()), 1)
    return weights
