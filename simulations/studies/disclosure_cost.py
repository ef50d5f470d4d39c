"""What it costs the figures of finished runs that sites round their counts, or add noise to them.

The counts on test patients that sites told exactly are told again as a policy would have them, many
times: each time with another secret, or other noise.
"""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from client.privacy.held_out import noise_counts, plan_end
from client.privacy.parameters import PrivateRelease
from client.privacy.rounding import Rounding
from common.errors import RunError
from common.metrics.counts import Counts
from common.metrics.metrics import value
from common.metrics.statistics import Estimate, intervals
from server.runs.results import FEDERATED, read_results, unite_counts
from server.runs.run_folder import RunFolder

Tell = Callable[[Counts], Counts]
"""Counts of one site as it tells them."""


@dataclass(frozen=True)
class DisclosureCost:
    """What one way of telling costs.

    Attributes:
      way: In words.
      figure: The mean of the figure over runs and draws.
      error: By how much a figure is off, root mean square over runs and draws.
      width: The mean width of its 95 % interval.
    """

    way: str
    figure: float
    error: float
    width: float


def read_exact_counts(path: Path) -> Mapping[str, Counts]:
    """The counts of each site on its test patients, of a finished run.

    Raises:
      RunError: the run is not finished, or a site told no exact counts.
    """
    classes = len(RunFolder(path).study.classes)
    sites = read_results(path, classes)[0][FEDERATED]
    if coarse := sorted(name for name, counts in sites.items() if counts.noise):
        remedy = "Run it again with disclose: {counts: exact} at every site."
        got = f"coarse ones of {', '.join(coarse)}"
        raise RunError(path, expected="exact counts of every site", got=got, remedy=remedy)
    return sites


def measure_costs(
    runs: Sequence[Mapping[str, Counts]],
    metric: str,
    epsilons: Sequence[float],
    delta: float,
    draws: int,
) -> list[DisclosureCost]:
    """The cost of every way of telling, exactly first.

    Args:
      runs: The exact counts of each site in each run; at least one run with some image.
      metric: The figure, of all sites together; one that needs no scores.
      epsilons: Those to compare, each at `delta`.
      delta: In (0, 1).
      draws: How often each run is told again.
    """
    ways: dict[str, Tell] = {"exact": lambda counts: counts, "rounded to 10": _round}
    ways |= {f"ε = {epsilon:g}": _noise(plan_end(epsilon, delta)) for epsilon in epsilons}
    return [
        _measure(way, tell, runs, metric, 1 if way == "exact" else draws)
        for way, tell in ways.items()
    ]


def _measure(
    way: str, tell: Tell, runs: Sequence[Mapping[str, Counts]], metric: str, draws: int
) -> DisclosureCost:
    figures, errors, widths = [], [], []
    for sites in runs:
        classes = next(iter(sites.values())).classes
        truth = value(unite_counts(sites.values(), classes), metric)
        for draw in range(draws):
            told = unite_counts((tell(counts) for counts in sites.values()), classes)
            estimate = intervals(told, [metric], seed=draw, draws=200)[metric]
            if truth is not None and estimate is not None:
                figures.append(estimate.value)
                errors.append(estimate.value - truth)
                widths.append(_width(estimate))
    error = math.sqrt(mean(error**2 for error in errors))
    return DisclosureCost(way, mean(figures), error, mean(widths))


def _round(counts: Counts) -> Counts:
    return Rounding(secrets.token_bytes(32), 10).round_counts(counts, "test", "model")


def _noise(plan: PrivateRelease) -> Tell:
    return lambda counts: noise_counts([counts], plan)[0]


def _width(estimate: Estimate) -> float:
    return estimate.high - estimate.low
