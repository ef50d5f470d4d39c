"""What guesses at who was in tell of ε: lower bounds from one run (Steinke, Nasr, Jagielski 2023).

Whether each of m canaries was in was decided by a coin of its own. A mechanism with (ε, δ) limits
how many coins anybody can guess from what it released. Who guesses more has shown, at a level of
95 %, that ε is larger. Two such bounds are computed:

- `epsilon`, for any mechanism: Steinke et al., "Privacy Auditing with One (1) Training Run",
  NeurIPS 2023, theorem 5.2.
- `gaussian`, for one that is a Gaussian mechanism, as noised sums over all patients are:
  Mahloujifar, Melis and Chaudhuri, "Auditing f-Differential Privacy in One Run", 2024, algorithm 3.
  It is much the sharper, since a Gaussian mechanism with little noise gives every coin away.

A bound of 0 does not show that nothing leaks. With m canaries neither bound can exceed what m right
guesses would give (`ceiling`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, log_ndtr, ndtr, ndtri
from scipy.stats import binom

from common.metrics.counts import Floats

_LEVEL = 0.05
_SHARES = (1.0, 0.5, 0.25)
"""Guesses that count, the surest first; each share is a test of its own."""
_MOST = 200.0
"""An ε beyond all use; a search ends there."""


@dataclass(frozen=True)
class Bound:
    """How well coins were guessed, and the ε that this shows.

    Attributes:
      canaries: Coins that were thrown.
      right: Guesses that were right, where every coin is guessed.
      auroc: How well scores tell those who were in from those who were not; 0.5 is chance.
      epsilon: At least this, at 95 %, whatever the mechanism.
      gaussian: At least this, at 95 %, if it is a Gaussian one.
      ceiling: The largest `epsilon` that so many canaries could show.
      gaussian_ceiling: The largest `gaussian`.
    """

    canaries: int
    right: int
    auroc: float
    epsilon: float
    gaussian: float
    ceiling: float
    gaussian_ceiling: float


def bound_epsilon(scores: Floats, included: NDArray[np.bool_], delta: float) -> Bound:
    """Bound the ε of a mechanism from below, from one run of it.

    Args:
      scores: [m], finite. Above 0 is a guess that the canary was in; far from 0 is a sure one.
        Must come from the release alone, not from the coins.
      included: [m], what the coins decided.
      delta: Of the (ε, δ) that is bounded.

    Raises:
      ValueError: there are no canaries, or a score is not finite.
    """
    m = len(scores)
    if not m or not np.isfinite(scores).all():
        raise ValueError(f"expected finite scores of at least one canary, got {m}")
    right = ((scores > 0) == included)[np.argsort(-np.abs(scores), kind="stable")]
    tested = [max(1, int(m * share)) for share in _SHARES]
    level = _LEVEL / len(tested)

    def best(shown: Callable[[int, int, int, float, float], float], found: list[int]) -> float:
        pairs = zip(tested, found, strict=True)
        return max(shown(m, guesses, correct, delta, level) for guesses, correct in pairs)

    correct = [int(right[:guesses].sum()) for guesses in tested]
    return Bound(
        canaries=m,
        right=correct[0],
        auroc=compute_auroc(scores, included),
        epsilon=best(show_epsilon, correct),
        gaussian=best(show_gaussian, correct),
        ceiling=best(show_epsilon, tested),
        gaussian_ceiling=best(show_gaussian, tested),
    )


def show_epsilon(m: int, guesses: int, correct: int, delta: float, level: float) -> float:
    """The largest ε whose (ε, δ) so many right guesses of m coins contradict; 0 if none."""

    def excess(epsilon: float) -> float:
        """How far the probability of so many right guesses is from the level."""
        chance = expit(epsilon)
        tail = binom.sf(correct - 1, guesses, chance)
        fewer = np.arange(1, correct + 1)
        gain = (binom.sf(correct - fewer - 1, guesses, chance) - tail) / fewer
        return float(tail + 2 * m * delta * np.max(gain, initial=0.0)) - level

    return _find_root(excess)


def show_gaussian(m: int, guesses: int, correct: int, delta: float, level: float) -> float:
    """The same of a Gaussian mechanism: the ε at δ of the largest μ that they contradict."""

    def excess(mu: float) -> float:
        inside, outside = level * correct / m, level * (guesses - correct) / m
        for i in range(correct - 1, -1, -1):
            grown = max(outside, float(ndtr(ndtri(inside) - mu)))
            if grown == outside:  # nothing changes from here on
                break
            inside = min(inside + i / (guesses - i) * (grown - outside), 1.0)
            outside = grown
        return guesses / m - inside - outside

    mu = _find_root(excess)
    return compute_gaussian_epsilon(mu, delta) if mu else 0.0


def compute_gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at δ of a Gaussian mechanism of sensitivity μ and noise 1 (Balle and Wang 2018)."""

    def excess(epsilon: float) -> float:
        near = float(ndtr(mu / 2 - epsilon / mu))
        return near - math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))) - delta

    most = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # by a tail bound
    return float(brentq(excess, 0.0, most, xtol=1e-6)) if excess(0.0) > 0 else 0.0


def _find_root(excess: Callable[[float], float]) -> float:
    """Where it stops to be below 0; 0 if it never is, at most `_MOST`."""
    if excess(0.0) >= 0:
        return 0.0
    most = 1.0
    while excess(most) < 0:
        if most > _MOST:
            return _MOST
        most *= 2
    return float(brentq(excess, 0.0, most, xtol=1e-6))


def compute_auroc(scores: Floats, included: NDArray[np.bool_]) -> float:
    """The chance that of one who was in and one who was not the first has the higher score.

    Ties count half; 0.5 where there is none of either.
    """
    inside, outside = scores[included], scores[~included]
    if not len(inside) or not len(outside):
        return 0.5
    wins = np.sign(inside[:, None] - outside[None, :])
    return float(0.5 + wins.mean() / 2)
