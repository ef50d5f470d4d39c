"""What an ε means: bounds that known mechanisms reach, and never pass."""

import math

import numpy as np
import pytest

from common.metrics.guarantee import bound_belief, bound_gaussian_power, bound_power
from common.metrics.one_run import compute_gaussian_epsilon


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_response_reaches_the_bound(epsilon: float) -> None:
    told = math.exp(epsilon) / (1 + math.exp(epsilon))
    assert bound_power(epsilon, 0.0, 1 - told) == pytest.approx(told)
    assert bound_belief(epsilon) == pytest.approx(told)
    assert bound_belief(epsilon, prior=0.1) < told


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-5), (8.0, 1e-5), (3.0, 1e-6)])
def test_noise_does_what_is_said_of_it_and_no_more(epsilon: float, delta: float) -> None:
    mu = min(
        np.linspace(0.05, 4, 4000), key=lambda m: abs(compute_gaussian_epsilon(m, delta) - epsilon)
    )
    rng = np.random.default_rng(0)
    without, there = rng.normal(0, 1, 400_000), rng.normal(mu, 1, 400_000)
    found = float((there > np.quantile(without, 0.99)).mean())
    assert bound_gaussian_power(epsilon, delta, 0.01) == pytest.approx(found, abs=0.005)
    assert found <= bound_power(epsilon, delta, 0.01) + 0.005


def test_no_promise_is_no_bound_and_a_full_one_is_chance() -> None:
    assert bound_power(50.0, 1e-5, 0.01) == pytest.approx(1.0)
    assert bound_power(1e-9, 0.0, 0.01) == pytest.approx(0.01)
    assert bound_gaussian_power(1e6, 1e-5, 0.01) == 1.0
