"""What an ε means: how well anybody could tell from all that left whether one patient took part."""

import math

from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri

from common.metrics.one_run import compute_gaussian_epsilon

_MOST = 200.0


def bound_belief(epsilon: float, prior: float = 0.5) -> float:
    """The surest anybody can become that a patient took part, who believed `prior` before.

    It holds but for a chance of δ (Wasserman and Zhou 2010).
    """
    return float(expit(math.log(prior / (1 - prior)) + epsilon))


def bound_power(epsilon: float, delta: float, errors: float) -> float:
    """The largest share of those who took part that a test finds, whatever the mechanism.

    Args:
      epsilon: Of the guarantee.
      delta: Of the guarantee.
      errors: The share of others, 0 to 1, that the test takes for them by mistake.
    """
    # Kairouz, Oh and Viswanath 2015: the two lines that bound every test under (ε, δ).
    steep = math.exp(epsilon) * errors + delta
    flat = 1 - math.exp(-epsilon) * (1 - delta - errors)
    return min(steep, flat, 1.0)


def bound_gaussian_power(epsilon: float, delta: float, errors: float) -> float:
    """The same of a Gaussian mechanism, such as noised sums over all patients: much less.

    Such a mechanism is told apart just as two normal distributions whose means are μ apart (Dong,
    Roth and Su 2022).
    """
    if epsilon >= compute_gaussian_epsilon(_MOST, delta):
        return 1.0
    mu = brentq(lambda mu: compute_gaussian_epsilon(mu, delta) - epsilon, 1e-6, _MOST, xtol=1e-9)
    return float(ndtr(ndtri(errors) + mu))
