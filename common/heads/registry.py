"""The heads that are solved from sums, by name; adding one is a function and a line in `HEADS`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.heads.sums import Sums
from common.metrics.counts import Floats

_LEAST_SPREAD = 1e-12
_NEVER = -1e4
"""The logit of a class without images, and the least that a message may hold."""


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Logits of mapped features x are `weight @ x + bias`: [K, d] and [K], float64."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True)
class SolvedHead:
    """One way to solve a head.

    Attributes:
      solve: From the sums of all images, and a strength.
      strengths: Those to choose from by validation, the strongest last.
      default: The one to take where no site tells how it validates.
    """

    solve: Callable[[Sums, float], LinearHead]
    strengths: tuple[float, ...]
    default: float


def solve_discriminant(sums: Sums, shrinkage: float) -> LinearHead:
    """Linear discriminant analysis (Fisher 1936) with a class-balanced within-class covariance.

    Args:
      sums: With weights that balance the classes.
      shrinkage: In (0, 1], how far the covariance is drawn to a multiple of the identity (Ledoit
        and Wolf 2004): more where features are many and images few.

    Returns:
      Logits on the scale of log-probabilities, for classes that are all equally likely. A class
      without images is never called.
    """
    (head,) = discriminate_all([sums.means], sums.within, sums.counts, shrinkage)
    return head


def discriminate_all(
    means: Sequence[Floats], within: Floats, counts: Floats, shrinkage: float
) -> list[LinearHead]:
    """Such discriminants of several sets of class means [K, d], with one covariance [d, d]."""
    size, classes = len(within), len(counts)
    level = max(float(np.trace(within)) / size, _LEAST_SPREAD)  # one image a class has none
    shrunk = (1 - shrinkage) * within + shrinkage * level * np.eye(size)
    weights: Floats = np.linalg.solve(shrunk, np.concatenate(means).T).T.astype(np.float64)
    return [
        _bounded(weight, -0.5 * (mean * weight).sum(axis=1), counts)
        for mean, weight in zip(means, weights.reshape(-1, classes, size), strict=True)
    ]


def solve_ridge(sums: Sums, penalty: float) -> LinearHead:
    """Ridge regression on one-hot labels with a free intercept (Hoerl and Kennard 1970).

    Args:
      sums: With weights that balance the classes.
      penalty: Above 0, relative to the mean weight of an image.
    """
    mass = sums.weights * sums.counts
    whole = max(float(mass.sum()), np.finfo(float).tiny)
    share = mass / whole
    mean = sums.weights @ sums.totals / whole
    spread = sums.second / whole - np.outer(mean, mean)
    towards = (sums.weights[:, None] * sums.totals) / whole - np.outer(share, mean)
    weight = np.asarray(
        np.linalg.solve(spread + penalty * np.eye(len(spread)), towards.T).T, np.float64
    )
    return _bounded(weight, share - weight @ mean, sums.counts)


def _bounded(weight: Floats, bias: Floats, counts: Floats) -> LinearHead:
    """Without classes that have no images; scaled down alike if a number is too large to travel."""
    most = max(float(np.abs(weight).max()), float(np.abs(bias[counts > 0]).max(initial=0.0)))
    scale = min(1.0, -_NEVER / most) if most else 1.0
    some = counts > 0
    return LinearHead(
        np.where(some[:, None], weight * scale, 0.0), np.where(some, bias * scale, _NEVER)
    )


HEADS: Mapping[str, SolvedHead] = {
    "discriminant": SolvedHead(solve_discriminant, (0.05, 0.1, 0.2, 0.4, 0.6, 0.8), 0.2),
    "ridge": SolvedHead(solve_ridge, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 1e-3),
}
"""Every head that `model.head` can name beside `linear`, which is trained by rounds."""
