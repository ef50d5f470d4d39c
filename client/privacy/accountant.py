"""One hospital's privacy accountant: the noise a plan needs, the ε a history has spent.

ε bounds, with δ, what all releases together tell of one patient: whether that patient, with every
image, was added or removed. Only training patients are covered; validation and test are not.

What is accounted is the Gaussian mechanism over the real numbers, of which a release is an exact
function (`client.privacy.noised_sum`), but for the noise: that is normal only up to a share of
2⁻⁹⁴ in the density of each number, and up to a probability of 2⁻¹¹⁰. For 10¹² numbers these cost
less than 10⁻¹⁵ of ε and 10⁻²⁰ of δ, so 10⁻⁹ is added to every ε here.
"""

import math
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.errors import RefusedError

if TYPE_CHECKING:
    from opacus.accountants.analysis.prv import Domain

# Opacus is imported where it is used: it takes seconds, and most studies never need it.

_TIGHT = 16
"""As many different events are composed numerically; more are bounded by their Rényi curves."""
_MOST = 1024
_CELLS = 2**22
_REACH = 500.0
"""Limits on the work, known before it starts, so that none runs long: different events, and the
cells and the reach (a privacy loss; e to its power must be a float64) of the numerical grid."""

_EPS_ERROR = 0.01
_DELTA_ERROR = 1e-3
"""What the numerical bound gives away: an absolute part of ε, and a share of δ."""

_SAMPLER = 1e-9
"""What noise that is not quite normal adds to ε."""

_ORDERS = (*range(2, 12), 14, 16, 20, 24, 32, 48, 64, 128, 256)
"""Rényi orders: whole numbers, for which the curve is a short sum instead of a slow series."""

_NOISE = [float(f"{10 ** (k / 1000):.4g}") for k in range(-1000, 4001)]
_LAST = len(_NOISE) - 1
"""The noise multipliers to choose from: 0.1 to 10000 in steps of 0.23 %."""


@dataclass(frozen=True)
class DpEvent:
    """A stretch of equal DP-SGD steps: each samples by patient (Poisson) and adds Gaussian noise.

    Attributes:
      noise_multiplier: σ > 0, the noise's standard deviation over the clipping norm.
      sample_rate: 0 < q ≤ 1, the chance of a patient to be in one step.
      steps: How many, at least 1.

    Raises:
      RefusedError: a number outside its range.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        _within("noise_multiplier", self.noise_multiplier, "above 0", above=0)
        _within("sample_rate", self.sample_rate, "above 0, at most 1", above=0, most=1)
        if type(self.steps) is not int or self.steps < 1:
            raise _refusal("steps", "a whole number, at least 1", self.steps)


Bound = Callable[[tuple[DpEvent, ...], float], float]


def compute_epsilon(history: Sequence[DpEvent], delta: float) -> float:
    """An upper bound of ε at δ for everything in `history`, in whatever order it happened.

    It holds for parameters that were fixed before the first step, as those of a study are at join.

    Up to 16 different events: tight to about 0.01, by numerical composition (Gopi, Lee and
    Wutschitz 2021, by Opacus). More: 10 to 20 % above that, by Rényi divergence (Mironov, Talwar
    and Zhang 2019). Equal events cost what one of all their steps does; no history costs 0.

    Raises:
      RefusedError: δ is not between 0 and 1, or no finite bound was found within fixed limits.
    """
    return _guarded(_composed, history, delta)


def choose_filter_order(budget: float, delta: float) -> int:
    """The Rényi order at which a privacy filter for ε = `budget` at δ leaves the most room.

    It follows from these two numbers alone. So it is fixed before anything is released, as the
    theorem asks.
    """
    _within("epsilon", budget, "above 0", above=0)
    order: int = max(_ORDERS, key=lambda order: (budget - _price(order, delta)) / order)
    return order


def compute_filtered_epsilon(history: Sequence[DpEvent], delta: float, order: int) -> float:
    """An upper bound of ε at δ for steps whose parameters were chosen in view of earlier releases.

    The Rényi divergences of all steps at one `order`, which was fixed before the first of them, add
    up however the next was chosen (theorem 3.1 of Feldman and Zrnic 2021). As a site stops before
    this is above its budget, it is a privacy filter; `compute_epsilon` is none.

    Raises:
      RefusedError: as in `compute_epsilon`.
    """
    at = _ORDERS.index(order)

    def bound(events: Sequence[DpEvent], delta: float) -> float:
        curves = (s.steps * _curve(s.noise_multiplier, s.sample_rate)[at] for s in events)
        return float(sum(curves)) + _price(order, delta)

    return _guarded(bound, history, delta)


def find_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
) -> float:
    """The least σ with which `steps` steps stay within `epsilon` at `delta`.

    Args:
      epsilon: The budget, above 0.
      delta: Between 0 and 1.
      sample_rate: q of each step, in (0, 1].
      steps: All that are planned, at least 1.

    Returns:
      A σ that was itself tried and found good, rounded up by 0.23 % at most; at least 0.1.

    Raises:
      RefusedError: as in `scale_noise`.
    """
    return scale_noise((DpEvent(1.0, sample_rate, steps),), epsilon, delta)


def scale_noise(planned: Sequence[DpEvent], epsilon: float, delta: float) -> float:
    """The least factor on the noise of all that is planned that keeps it within ε at δ.

    Args:
      planned: Whose noise multipliers say how the budget is shared.
      epsilon: The budget, above 0.
      delta: Between 0 and 1.

    Returns:
      A factor that was itself tried and found good, rounded up by 0.23 % at most; at least 0.1.

    Raises:
      RefusedError: no σ up to 10000 is enough, or as in `compute_epsilon`.
    """
    _within("epsilon", epsilon, "above 0", above=0)

    def scaled(choice: int) -> list[DpEvent]:
        factor = _NOISE[choice]
        return [DpEvent(factor * e.noise_multiplier, e.sample_rate, e.steps) for e in planned]

    def stays(bound: Bound, choice: int) -> bool:
        try:
            return _guarded(bound, scaled(choice), delta) <= epsilon
        except RefusedError:  # too little noise to account for is too little noise
            return False

    near = bisect_left(range(_LAST), True, key=partial(stays, _renyi))
    found = _first(partial(stays, _composed), near)
    if found is None:
        least = _guarded(_composed, scaled(_LAST), delta)
        expected = f"ε within {epsilon:g} at δ = {delta:g}"
        got, remedy = f"{least:.4g} with any noise", "Plan fewer steps or raise epsilon."
        raise RefusedError("privacy", expected=expected, got=got, remedy=remedy)
    return _NOISE[found]


def _first(good: Callable[[int], bool], near: int) -> int | None:
    """Of 0 to _LAST the first that is good, sought from `near`; None if not even the last is."""
    high, stride = next((i for i in (near, _LAST) if good(i)), None), 32
    if high is None:
        return None
    while high and good(low := max(high - stride, 0)):
        high, stride = low, 2 * stride
    return bisect_left(range(high), True, max(high - stride, 0), key=good)


def _guarded(bound: Bound, history: Sequence[DpEvent], delta: float) -> float:
    """What `bound` makes of a history, or a refusal."""
    _within("delta", delta, "above 0, below 1", above=0, most=math.nextafter(1, 0))
    events = _merge(history)
    if len(events) > _MOST:
        raise _refusal("history", f"at most {_MOST} different events", len(events))
    if not events:
        return 0.0
    try:
        with np.errstate(all="ignore"):
            spent = bound(tuple(events), delta)
    except RefusedError:
        raise
    except Exception as ex:
        raise _refusal("history", "one whose ε can be computed", repr(ex)) from ex
    if not math.isfinite(spent):
        raise _refusal("history", "a finite ε", spent)
    return max(0.0, spent) + _SAMPLER


def _merge(history: Sequence[DpEvent]) -> list[DpEvent]:
    """One event for each (σ, q), sorted, so that the order never changes even the last digit."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in history:
        steps[event.noise_multiplier, event.sample_rate] += event.steps
    return [DpEvent(noise, rate, n) for (noise, rate), n in sorted(steps.items())]


@lru_cache(maxsize=4096)  # the virtual sites of a simulation spend alike
def _composed(events: tuple[DpEvent, ...], delta: float) -> float:
    return (_numerical if len(events) <= _TIGHT else _renyi)(events, delta)


def _numerical(events: Sequence[DpEvent], delta: float) -> float:
    """Opacus' PRV: of removing a patient, which costs no less than adding one (tests ask both)."""
    from opacus.accountants.analysis import prv
    from scipy.integrate import IntegrationWarning

    grid = _grid(events, delta)
    pieces = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", IntegrationWarning)  # an inexact mean may be too low
        for event in events:
            loss = prv.PoissonSubsampledGaussianPRV(event.sample_rate, event.noise_multiplier)
            cut = prv.TruncatedPrivacyRandomVariable(loss, grid.t_min, grid.t_max)
            pieces.append(prv.discretize(cut, grid))
    total = prv.compose_heterogeneous(pieces, [event.steps for event in events])
    _, _, upper = total.compute_epsilon(delta, _DELTA_ERROR * delta, _EPS_ERROR)
    return float(upper)


def _grid(events: Sequence[DpEvent], delta: float) -> "Domain":
    """Where losses are discretised: theorem 5.5 and remark 5.6 of Gopi, Lee and Wutschitz 2021.

    As in Opacus, but with limits, and with a number of cells that the FFT is fast at.
    """
    from opacus.accountants.analysis.prv import Domain
    from scipy.fft import next_fast_len

    share, steps = _DELTA_ERROR * delta, sum(event.steps for event in events)
    # The FFT is raised to the power of the steps: so many rounding errors must not count.
    if steps * np.finfo(np.float64).eps > share:
        raise _refusal("history", f"few enough steps for δ = {delta:g}", steps)
    single = (
        _convert(_curve(s.noise_multiplier, s.sample_rate), share / (8 * steps)) for s in events
    )
    reach = 3 + max(_EPS_ERROR, _renyi(events, share / 4), *single)
    mesh = _EPS_ERROR / math.sqrt(steps * math.log(12 / share) / 2)
    if not (reach <= _REACH and 2 * reach <= mesh * _CELLS):
        got = f"{steps} steps with privacy losses up to {reach:.3g}"
        raise _refusal("history", "fewer steps or more noise", got)
    half: int = next_fast_len(math.ceil(reach / mesh) + 2, real=True)
    reach = mesh * (half - 1.5)  # halfway between two cells: create_aligned adds one, then evens
    return Domain.create_aligned(-reach, reach, mesh)


def _renyi(events: Sequence[DpEvent], delta: float) -> float:
    curves = [s.steps * _curve(s.noise_multiplier, s.sample_rate) for s in events]
    return _convert(np.sum(curves, axis=0), delta)


@lru_cache(maxsize=2 * _MOST)
def _curve(noise: float, rate: float) -> NDArray[np.float64]:
    """Rényi divergence of one step at each of _ORDERS."""
    from opacus.accountants.analysis.rdp import compute_rdp

    curve = compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=_ORDERS)
    return np.asarray(curve, np.float64)


def _convert(curve: NDArray[np.float64], delta: float) -> float:
    """From a Rényi curve to ε: theorem 21 of Balle et al. 2020. NaN stays NaN."""
    return float(np.min(curve + [_price(order, delta) for order in _ORDERS]))


def _price(order: int, delta: float) -> float:
    """What ε is above a Rényi divergence of this order, at δ."""
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def _within(
    name: str, value: float, expected: str, *, above: float, most: float = math.inf
) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and above < value <= most):
        raise _refusal(name, f"a number {expected}", value)


def _refusal(name: str, expected: str, got: object) -> RefusedError:
    remedy = "Ask the coordinator for a study that can be accounted."
    return RefusedError(f"privacy: {name}", expected=expected, got=got, remedy=remedy)
