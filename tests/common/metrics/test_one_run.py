"""Lower bounds on ε from guessed coins, against jax-privacy, and against mechanisms that are known.

The figures in `BY_JAX_PRIVACY` are those of jax-privacy 2.0.0, `auditing._epsilon_one_run` and
`auditing._epsilon_one_run_fdp`, of the same arguments.
"""

import numpy as np
import pytest

from common.metrics.one_run import (
    bound_epsilon,
    compute_auroc,
    compute_gaussian_epsilon,
    show_epsilon,
    show_gaussian,
)

BY_JAX_PRIVACY = [  # canaries, guesses, right ones, δ, ε of any mechanism, of a Gaussian one
    (100, 100, 100, 1e-5, 3.4902, 8.2162),
    (100, 100, 100, 1e-3, 3.2023, 6.1486),
    (100, 100, 70, 1e-5, 0.4714, 1.0607),
    (100, 100, 70, 1e-3, 0.4446, 0.6855),
    (100, 50, 45, 1e-5, 1.3928, 2.7930),
    (100, 50, 45, 1e-3, 1.3038, 1.9414),
    (400, 400, 300, 1e-5, 0.9040, 1.7986),
    (1000, 250, 249, 1e-5, 3.9371, 6.8863),
    (1000, 1000, 900, 1e-3, 1.9277, 2.6828),
    (50, 50, 25, 1e-5, 0.0, 0.0),
]


@pytest.mark.parametrize(("m", "guesses", "right", "delta", "epsilon", "gaussian"), BY_JAX_PRIVACY)
def test_as_an_established_library_has_it(m, guesses, right, delta, epsilon, gaussian):
    assert show_epsilon(m, guesses, right, delta, 0.05) == pytest.approx(epsilon, abs=1e-4)
    assert show_gaussian(m, guesses, right, delta, 0.05) == pytest.approx(gaussian, abs=1e-4)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_a_bound_lies_below_the_epsilon_of_the_mechanism(mu):
    """Each canary has a number of its own, with noise: nobody can guess these coins better."""
    rng, delta, m = np.random.default_rng(7), 1e-5, 200
    true = compute_gaussian_epsilon(mu, delta)
    bounds = []
    for _ in range(100):
        included = rng.random(m) < 0.5
        scores = mu * (included - 0.5) + rng.standard_normal(m)
        bounds.append(bound_epsilon(scores, included, delta))
    assert sum(bound.epsilon > true for bound in bounds) <= 5
    assert sum(bound.gaussian > true for bound in bounds) <= 5
    if mu >= 1:  # it is not low for want of trying
        assert np.median([bound.gaussian for bound in bounds]) > 0.3 * true
    assert all(bound.gaussian <= bound.gaussian_ceiling for bound in bounds)


def test_what_is_told_in_the_clear_reaches_the_ceiling():
    included = np.array([True, False] * 50)
    bound = bound_epsilon(np.where(included, 1.0, -1.0), included, 1e-5)
    assert (bound.right, bound.auroc) == (100, 1.0)
    assert bound.epsilon == bound.ceiling
    assert bound.gaussian == bound.gaussian_ceiling
    fewer = bound_epsilon(np.ones(10), np.ones(10, bool), 1e-5)
    assert fewer.ceiling < bound.ceiling  # with few coins little can be shown
    assert fewer.auroc == 0.5


def test_chance_and_ties_show_nothing():
    included = np.array([True, False] * 50)
    for scores in (np.zeros(100), np.ones(100), np.where(np.arange(100) < 50, 1.0, -1.0)):
        bound = bound_epsilon(scores, included, 1e-5)
        assert (bound.epsilon, bound.gaussian) == (0.0, 0.0)
    assert compute_auroc(np.zeros(100), included) == 0.5


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")]])
def test_no_canary_and_no_number(scores):
    with pytest.raises(ValueError, match="expected finite scores"):
        bound_epsilon(np.array(scores), np.ones(len(scores), bool), 1e-5)


def test_a_gaussian_mechanism_has_the_epsilon_that_its_accountant_says():
    from client.privacy.accountant import DpEvent, compute_epsilon

    for noise in (0.5, 1.0, 4.0):
        exact = compute_gaussian_epsilon(1 / noise, 1e-5)
        assert exact == pytest.approx(compute_epsilon([DpEvent(noise, 1.0, 1)], 1e-5), abs=0.02)
