"""One figure on several seeds: their mean with an interval or, of few seeds, each by itself.

An interval of two or three seeds is as wide as the figure's range, and says nothing but that.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from common.metrics.metrics import METRICS
from common.metrics.statistics import FEWEST_SEEDS, Estimate, t_interval
from server.reports.tables import UNDEFINED, format_figure

SIGNS = {UNDEFINED: "undefined, for lack of images of a class, or withheld by a site"}
"""What stands instead of a figure of a seed, and why."""

SHARE = (0.0, 1.0)
"""The range of most figures."""
_ANY = (-math.inf, math.inf)


class Seeded(NamedTuple):
    """A figure on each of some seeds.

    Attributes:
      values: One of each seed; None where it is undefined, or not told.
      estimate: Their mean and its 95 % interval; None of fewer than FEWEST_SEEDS.
    """

    values: tuple[float | None, ...]
    estimate: Estimate | None = None

    @property
    def known(self) -> list[float]:
        """The figures that there are."""
        return [value for value in self.values if value is not None]


def join_seeds(values: Sequence[float | None], within: tuple[float, float] = _ANY) -> Seeded:
    """What the figures of all seeds say together.

    Args:
      values: One of each seed.
      within: The figure's range; the interval is cut to it.
    """
    found = Seeded(tuple(values))
    enough = len(found.known) >= FEWEST_SEEDS
    return found._replace(estimate=t_interval(values, within) if enough else None)


def subtract_seeds(a: Sequence[float | None], b: Sequence[float | None]) -> Seeded:
    """The differences a - b, paired by seed."""
    pairs = zip(a, b, strict=bool(b))
    return join_seeds([None if x is None or y is None else x - y for x, y in pairs])


def format_seeds(found: Seeded, *, signed: bool = False) -> str:
    """The mean with its interval, or the figure of each seed."""
    if estimate := found.estimate:
        mean, low, high = (_format(x, signed) for x in vars(estimate).values())
        return f"{mean} ({low} to {high})"
    if not found.known:
        return UNDEFINED
    return ", ".join(_format(value, signed) for value in found.values)


def format_metric(values: Sequence[float | None], name: str) -> str:
    """A metric, one of METRICS, on each seed: its mean with the interval, or all of a few."""
    return format_seeds(join_seeds(values, METRICS[name].range))


def format_change(
    values: Sequence[float | None],
    base: Sequence[float | None] | None,
    within: tuple[float, float] = SHARE,
) -> str:
    """A figure on each seed and, in brackets, its differences to `base`, paired by seed."""
    found, gain = join_seeds(values, within), subtract_seeds(values, base or ())
    if not gain.known:
        return format_seeds(found)
    if found.estimate and (apart := gain.estimate):
        low, high = (_format(end, True) for end in (apart.low, apart.high))
        return f"{found.estimate.value:.3f} ({apart.value:+.3f}, {low} to {high})"
    return f"{format_seeds(found)} ({format_seeds(gain, signed=True)})"


def describe_seeds(seeds: int) -> str:
    """What stands in a table of so many seeds."""
    if seeds >= FEWEST_SEEDS:
        return f"means of {seeds} seeds, with 95 % intervals"
    if seeds == 1:
        return "of one seed"
    return f"of each of {seeds} seeds: fewer than {FEWEST_SEEDS} make no interval"


def _format(value: float | None, signed: bool) -> str:
    return f"{value:+.3f}" if signed and value is not None else format_figure(value)
