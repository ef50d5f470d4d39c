"""How sure a figure is: intervals by image, and over seeds. Pure, from counts alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.metrics.counts import CENTRES, Counts, Floats, Ints
from common.metrics.metrics import METRICS, SHARES, Metric, better, find_cells, value


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, in the figure's own unit."""

    value: float
    low: float
    high: float


def intervals(
    counts: Counts, names: Sequence[str], *, seed: int, draws: int = 1000
) -> dict[str, Estimate | None]:
    """Bootstrap of metrics, by image, each class's number of images held fixed.

    It answers: how far could the figure move with this model and other images of these classes?
    It does not know that images share a patient (then it is too narrow), nor what training again
    would give (see `t_interval`). Counts do not tell which scores belong to one image, so with
    three classes or more the AUROC's interval is 10 to 20 % too narrow. Where cells have noise, it
    is drawn again, too.

    Args:
      counts: of one model on one set of images.
      names: of METRICS.
      seed: of the resampling; equal seeds give equal intervals.
      draws: how often the images are resampled; 1000 take about a second.

    Returns:
      An estimate per name, None where the metric is undefined.
    """
    if counts.n <= 0:
        return dict.fromkeys(names)
    figures = {name: value(counts, name) for name in names}
    # Fixed totals per class: a metric defined once is defined in every draw, but for noise.
    drawn = np.array(
        [[value(again, name) for name in names] for again in _redraws(counts, seed, draws)],
        np.float64,
    )
    images = counts.confusion.sum(axis=1)
    return {
        name: form_estimate(name, figure, column, images)
        for (name, figure), column in zip(figures.items(), drawn.T, strict=True)
    }


def _redraws(counts: Counts, seed: int, draws: int) -> Iterator[Counts]:
    rng = np.random.default_rng(seed)
    used = (counts.positive + counts.negative).any(axis=0)
    positive, negative = counts.positive[:, used], counts.negative[:, used]
    nats = np.logaddexp(0, -CENTRES[used])  # the loss of an image, from its class's log-odds
    images = counts.positive.sum(axis=1)
    share, others = counts.right / np.maximum(images, 1), np.random.default_rng([seed, 1])
    for _ in range(draws):
        confusion, own, rest = (_redraw(a, rng) for a in (counts.confusion, positive, negative))
        if counts.noise:
            confusion = confusion + rng.normal(0, counts.noise, confusion.shape).round().astype(int)
        loss_sum = counts.loss_sum + float(((own - positive) @ nats).sum())
        right = others.binomial(images, share)
        yield Counts(confusion, own, rest, loss_sum, right, counts.noise)


def _redraw(counts: Ints, rng: np.random.Generator) -> Ints:
    """Each row drawn again with its own total and shares."""
    if not counts.size:  # scores are withheld
        return counts
    some = np.maximum(counts, 0)  # noise may have made cells negative: they keep their mean
    totals = some.sum(axis=1)
    return counts - some + rng.multinomial(totals, some / np.maximum(totals, 1)[:, None])


# --- an interval from draws ---

_MISJUDGED = 0.25
"""So many more images or patients are taken to be misjudged than were: a few of them free of error
do not show that there is none. Intervals with 0.1 cover too seldom, as tests measure it."""


_FEWEST_PAIRS = 6
"""Where all of n units speak for one of two, chance does so, too, with 2⁻ⁿ⁺¹: 6 % for five."""


def form_estimate(
    name: str, figure: float | None, drawn: Floats, units: Ints, *, difference: bool = False
) -> Estimate | None:
    """The interval of a figure, from the variance of its bootstrap draws.

    Percentiles of draws cover too seldom: they are too close for few units, and have no width
    without errors. So the variance of the draws says how many independent trials the figure is
    worth, and the interval is Wilson's of so many, with Student's t in place of a normal quantile
    (as surveys do it: Franco, Little, Louis and Slud 2019). A difference has a t interval; a loss
    has one of its logarithm, which a few sure mistakes can still escape. A difference on fewer than
    six units always holds 0: as a sign test of them shows, so few decide nothing at 5 %.

    Args:
      name: of METRICS.
      figure: The figure, or the difference of two; None where it is undefined.
      drawn: [draws], NaN where it is undefined; those are left out.
      units: int [K], of each class, what was drawn: images or patients.
      difference: Whether it is the difference of two figures on the same units.

    Returns:
      The estimate, within the metric's range; None where it is undefined.
    """
    known = drawn[~np.isnan(drawn)]
    if figure is None or len(known) < 2:
        return None
    metric = METRICS[name]
    size, unseen = _weigh_units(units, metric)
    variance, t = float(known.var()) * unseen, _t(max(1, int(size) - 1))
    most = metric.range[1]
    if math.isinf(most) and not difference:
        ratio = math.exp(min(t * math.sqrt(variance) / max(figure, 1e-12), 100.0))
        return Estimate(figure, figure / ratio, figure * ratio)
    errors = 0.0 if math.isinf(most) else _MISJUDGED / size
    variance += errors / size
    if difference:
        half = t * math.sqrt(variance)
        low, high = max(-most, figure - half), min(most, figure + half)
        if units.sum() < _FEWEST_PAIRS:
            low, high = min(low, 0.0), max(high, 0.0)
        return Estimate(figure, low, high)
    return _score_interval(figure, (figure * (1 - figure) + errors) / variance, t)


def _weigh_units(units: Ints, metric: Metric) -> tuple[float, float]:
    """As how many units of one class those of all classes count, and what to make up for.

    A class with one unit has no spread of its own: it is given that of the others.
    """
    sizes = units[units > 0].astype(np.float64)
    weights = np.full(len(sizes), 1 / len(sizes)) if metric.macro else sizes / sizes.sum()
    parts = weights**2 / sizes
    seen = parts[sizes > 1].sum()
    return float(1 / parts.sum()), float(parts.sum() / seen) if seen else 1.0


# --- shares ---

_Z = 1.959964
"""The 97.5 % quantile of a normal distribution."""


def wilson(successes: int, n: int) -> Estimate | None:
    """A share of n independent trials, and Wilson's score interval (1927); None of no trials."""
    return _score_interval(successes / n, n, _Z) if n else None


def _score_interval(share: float, n: float, z: float) -> Estimate:
    """Shares from which this one, of n trials, is no more than z standard errors away."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = min(share, middle - half), max(share, middle + half)  # however it is rounded
    return Estimate(share, max(0.0, low), min(1.0, high))


def class_shares(counts: Counts) -> dict[str, list[Estimate | None]]:
    """Each of SHARES for each class, with Wilson's interval by image.

    It does not know that images share a patient: then it is too narrow. None where there are no
    such images, and everywhere where cells have noise, for then they are no counts of trials.
    """
    cells = [find_cells(counts, k) for k in range(counts.classes)]
    if counts.noise:
        return {name: [None] * len(cells) for name in SHARES}
    return {
        name: [wilson(right, right + wrong) for right, wrong in map(split, cells)]
        for name, split in SHARES.items()
    }


# --- over seeds ---

FEWEST_SEEDS = 5
"""Below so many seeds single figures are shown, and no interval: it would be as wide as the range.
"""

# The 97.5 % quantile of Student's t: exact for few degrees of freedom, then the Cornish-Fisher
# series around the normal's (Abramowitz and Stegun 26.7.5), within 0.0005.
_FEW = (12.7062, 4.3027, 3.1824, 2.7764)
_SERIES = (1.959964, 2.372271, 2.822502, 2.555851, 1.589530)


def t_interval(
    values: Sequence[float | None], within: tuple[float, float] = (-math.inf, math.inf)
) -> Estimate | None:
    """Mean over training seeds and its t interval: how far would other seeds have led?

    Undefined values are left out; with fewer than two left there is no interval, hence None.

    Args:
      values: One figure of each seed.
      within: The figure's range, as `Metric.range`; the interval is cut to it.
    """
    known = np.array([v for v in values if v is not None])
    if len(known) < 2:
        return None
    mean, half = known.mean(), _t(len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known))
    low, high = np.clip([mean - half, mean + half], *within)
    return Estimate(float(mean), float(low), float(high))


def difference(a: Sequence[float | None], b: Sequence[float | None]) -> Estimate | None:
    """Mean of a - b paired by seed, with its t interval; pairs with an undefined value left out."""
    pairs = zip(a, b, strict=True)
    return t_interval([x - y for x, y in pairs if x is not None and y is not None])


def _t(freedom: int) -> float:
    if freedom <= len(_FEW):
        return _FEW[freedom - 1]
    return float(sum(c / freedom**power for power, c in enumerate(_SERIES)))


def gap_closed(
    name: str, *, local: float | None, federated: float | None, pooled: float | None
) -> float | None:
    """How much of the way from local to pooled training federating went: 0 none, 1 all of it.

    Outside 0 to 1 where federating did worse than local or better than pooled; None where pooling
    does not beat local training, so that there is no gap to close.
    """
    if local is None or federated is None or pooled is None or not better(name, pooled, local):
        return None
    return (federated - local) / (pooled - local)
