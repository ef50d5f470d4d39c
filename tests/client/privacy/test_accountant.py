"""ε is never below the truth and hardly above it: Google's accountant, another method, says so."""

import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    PrivacyAccountant,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from client.privacy.accountant import (
    DpEvent,
    choose_filter_order,
    compute_epsilon,
    compute_filtered_epsilon,
    find_noise_multiplier,
)
from common.errors import RefusedError

DELTA = 1e-5
FEW = settings(max_examples=6, deadline=None, derandomize=True, database=None)


def by_google(accountant: PrivacyAccountant, history: Sequence[DpEvent]) -> PrivacyAccountant:
    for s in history:
        step = PoissonSampledDpEvent(s.sample_rate, GaussianDpEvent(s.noise_multiplier))
        accountant.compose(step, s.steps)
    return accountant


def google(history: Sequence[DpEvent], *deltas: float) -> list[float]:
    """The least ε at each δ by the privacy loss distribution, which is rounded up, but finely."""
    mesh = min(1e-3, 3e-3 / math.sqrt(sum(s.steps for s in history)))
    either = NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = by_google(PLDAccountant(either, value_discretization_interval=mesh), history)
    return [float(accountant.get_epsilon(delta)) for delta in deltas]


def different(n: int, steps: int = 20) -> list[DpEvent]:
    """As many events, no two alike."""
    return [DpEvent(1.5 + 0.1 * i, 0.02 + 0.001 * (i % 5), steps) for i in range(n)]


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [
        (1.0, 1 / 16, 320),
        (0.5, 0.01, 40),
        (0.6, 0.5, 1),
        (2.0, 1 / 8, 160),
        (4.0, 0.01, 3000),
        (1.0, 0.001, 2000),
        (20.0, 1 / 16, 320),
        (50.0, 0.9, 1000),
        (2.0, 1.0, 1),
        (10.0, 1.0, 20),
        (30.0, 1.0, 3000),
    ],
)
def test_equals_google_on_equal_steps(noise: float, rate: float, steps: int) -> None:
    history, deltas = [DpEvent(noise, rate, steps)], (1e-3, 1e-5, 1e-8)
    for delta, truth in zip(deltas, google(history, *deltas), strict=True):
        assert 0 <= compute_epsilon(history, delta) - truth <= 0.02


@pytest.mark.parametrize(
    "history",
    [
        [DpEvent(1.0, 0.02, 100), DpEvent(2.0, 1.0, 3)],
        [DpEvent(1.2, 0.05, 60), DpEvent(5.0, 0.2, 200), DpEvent(0.8, 0.01, 30)],
        [DpEvent(0.45, 0.01, 1), DpEvent(8.0, 0.3, 100), DpEvent(8.0, 0.31, 100)],
        different(16),
    ],
    ids=len,
)
def test_equals_google_on_mixed_histories(history: list[DpEvent]) -> None:
    assert 0 <= compute_epsilon(history, DELTA) - google(history, DELTA)[0] <= 0.02


def test_many_different_segments_are_bounded_more_loosely_never_too_low() -> None:
    history = different(17)
    (truth,) = google(history, DELTA)
    renyi = by_google(RdpAccountant(), history).get_epsilon(DELTA)
    assert truth + 0.02 < renyi - 1e-6 <= compute_epsilon(history, DELTA) <= 1.02 * renyi


@pytest.mark.parametrize("budget", [0.5, 1.0, 3.0, 8.0, 20.0])
def test_a_filter_is_googles_renyi_bound_at_one_order(budget: float) -> None:
    order, history = choose_filter_order(budget, DELTA), different(5)
    ours = compute_filtered_epsilon(history, DELTA, order)
    theirs = by_google(RdpAccountant([order]), history).get_epsilon(DELTA)
    assert ours == pytest.approx(float(theirs), abs=1e-6)
    assert compute_epsilon(history, DELTA) < ours


def test_the_order_of_a_filter_follows_from_budget_and_delta_alone() -> None:
    assert [choose_filter_order(b, DELTA) for b in (0.5, 1.0, 8.0, 20.0)] == [32, 20, 4, 3]
    with pytest.raises(RefusedError, match="expected a number above 0"):
        choose_filter_order(0.0, DELTA)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6))
@FEW
def test_in_a_filter_steps_add_up_however_they_come(steps: list[int]) -> None:
    """What one step adds does not depend on what came before: so it may be chosen in view of it."""
    order = choose_filter_order(8.0, DELTA)
    history = [DpEvent(1.5 + 0.3 * i, 0.1, n) for i, n in enumerate(steps)]
    start = compute_filtered_epsilon([DpEvent(9.0, 1e-6, 1)], DELTA, order)
    each = [compute_filtered_epsilon([s], DELTA, order) - start for s in history]
    assert compute_filtered_epsilon(history, DELTA, order) - start == pytest.approx(
        sum(each), abs=1e-7
    )


def test_a_filter_leaves_most_of_the_budget_for_a_study() -> None:
    """A second study costs more than it would alone, but is not a second time the whole."""
    sigma = find_noise_multiplier(epsilon=4.0, delta=DELTA, sample_rate=0.1, steps=100)
    both = compute_filtered_epsilon(
        [DpEvent(sigma, 0.1, 100)] * 2, DELTA, choose_filter_order(8.0, DELTA)
    )
    assert 4.0 < both < 8.0


def test_nothing_done_costs_nothing() -> None:
    assert compute_epsilon([], DELTA) == 0


@pytest.mark.system
def test_importing_the_accountant_does_not_import_opacus() -> None:
    check = "import sys, client.privacy.accountant; sys.exit('opacus' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


# --- what holds of any history ---

events = st.builds(
    DpEvent,
    noise_multiplier=st.floats(0.8, 20),
    sample_rate=st.floats(0.001, 0.3) | st.just(1.0),
    steps=st.integers(1, 50),
)
histories = st.lists(events, min_size=1, max_size=3)


@FEW
@given(histories, events)
def test_every_further_step_costs(history: list[DpEvent], more: DpEvent) -> None:
    before, after = compute_epsilon(history, DELTA), compute_epsilon([*history, more], DELTA)
    assert after >= before - 1e-3  # the grid moves; so does the last digit or two
    again = DpEvent(more.noise_multiplier, more.sample_rate, 2 * more.steps)
    assert compute_epsilon([*history, again], DELTA) >= after - 1e-3


@FEW
@given(histories.flatmap(lambda h: st.tuples(st.just(h), st.permutations(h))))
def test_order_never_counts(both: tuple[list[DpEvent], list[DpEvent]]) -> None:
    history, shuffled = both
    assert compute_epsilon(history, DELTA) == compute_epsilon(shuffled, DELTA)


@FEW
@given(events, events, st.integers(1, 30))
def test_equal_segments_merge_even_apart(one: DpEvent, other: DpEvent, more: int) -> None:
    rest = DpEvent(one.noise_multiplier, one.sample_rate, more)
    whole = DpEvent(one.noise_multiplier, one.sample_rate, one.steps + more)
    assert compute_epsilon([one, other, rest], DELTA) == compute_epsilon([whole, other], DELTA)


def test_equal_rounds_stay_tight_however_many() -> None:
    rounds = [DpEvent(2.0, 0.05, 8)] * 200
    assert compute_epsilon(rounds, DELTA) == compute_epsilon([DpEvent(2.0, 0.05, 1600)], DELTA)


# --- noise for a plan ---


@FEW
@given(
    st.floats(0.5, 20),
    st.floats(0.005, 0.3) | st.just(1.0),
    st.integers(1, 400),
)
def test_noise_is_enough_and_no_more(budget: float, rate: float, steps: int) -> None:
    noise = _noise(budget, rate, steps)
    assert compute_epsilon([DpEvent(noise, rate, steps)], DELTA) <= budget
    assert compute_epsilon([DpEvent(0.98 * noise, rate, steps)], DELTA) > budget


def _noise(budget: float, rate: float, steps: int) -> float:
    return find_noise_multiplier(epsilon=budget, delta=DELTA, sample_rate=rate, steps=steps)


def test_noise_agrees_with_google() -> None:
    noise = _noise(3.0, 1 / 16, 320)
    (within,) = google([DpEvent(noise, 1 / 16, 320)], DELTA)
    (beyond,) = google([DpEvent(0.99 * noise, 1 / 16, 320)], DELTA)
    assert within <= 3.0 < beyond


def test_a_budget_below_what_any_noise_costs_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"ε within 0\.001 at δ = 1e-05, got 0\.0\d+ with any"):
        _noise(0.001, 0.1, 10)


# --- wrong input, and what cannot be accounted for ---


@pytest.mark.parametrize("noise", [0, -1.0, math.nan, math.inf, True, "1"])
def test_a_segment_needs_noise(noise: float) -> None:
    with pytest.raises(RefusedError, match="noise_multiplier"):
        DpEvent(noise, 0.1, 10)


@pytest.mark.parametrize("rate", [0, -0.1, 1.0001, math.nan, math.inf, None])
def test_a_segment_needs_a_sample_rate(rate: float) -> None:
    with pytest.raises(RefusedError, match="sample_rate"):
        DpEvent(1.0, rate, 10)


@pytest.mark.parametrize("steps", [0, -1, 1.5, 10.0, True, None])
def test_a_segment_needs_steps(steps: int) -> None:
    with pytest.raises(RefusedError, match="steps"):
        DpEvent(1.0, 0.1, steps)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 2, math.nan, math.inf])
@pytest.mark.parametrize("history", [[], [DpEvent(1.0, 0.1, 10)]], ids=len)
def test_delta_is_a_small_chance(history: list[DpEvent], delta: float) -> None:
    with pytest.raises(RefusedError, match="delta"):
        compute_epsilon(history, delta)
    with pytest.raises(RefusedError, match="delta"):
        find_noise_multiplier(epsilon=8, delta=delta, sample_rate=0.1, steps=10)


@pytest.mark.parametrize("budget", [0, -1, math.nan, math.inf])
def test_a_budget_is_a_positive_number(budget: float) -> None:
    with pytest.raises(RefusedError, match="epsilon"):
        _noise(budget, 0.1, 10)


@pytest.mark.parametrize(
    ("history", "delta"),
    [
        ([DpEvent(1 / 24, 1.0, 1)], DELTA),
        ([DpEvent(1e-200, 0.5, 1)], DELTA),
        ([DpEvent(1e300, 0.5, 1)], DELTA),
        ([DpEvent(1.0, 1.0, 10**6)], DELTA),
        ([DpEvent(1000.0, 0.01, 10**7)], DELTA),
        ([DpEvent(1000.0, 0.01, 10**10)], DELTA),
        ([DpEvent(1.0, 0.1, 10**400)], DELTA),
        ([DpEvent(10.0, 1.0, 1000)], 1e-11),
        ([DpEvent(100.0, 1.0, 300_000)], 1e-9),
        (different(1025), DELTA),
        ([*different(16), DpEvent(1e-155, 0.5, 1)], DELTA),
        ([*different(16), DpEvent(1e-160, 1.0, 1)], DELTA),
    ],
    ids=range(12),
)
def test_what_no_bound_can_be_trusted_for_is_refused(history: list[DpEvent], delta: float) -> None:
    """Losses beyond float64, grids beyond memory, roundings beyond δ; NaN and ∞ of either bound."""
    with pytest.raises(RefusedError, match="history"):
        compute_epsilon(history, delta)
