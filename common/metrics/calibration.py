"""Whether probabilities come true, from the score histograms alone."""

import math
from dataclasses import dataclass

import numpy as np

from common.metrics.counts import CENTRES, Counts, Floats, Ints
from common.metrics.metrics import brier_score
from common.metrics.statistics import Estimate

_PROBABILITY: Floats = (1 + np.tanh(CENTRES / 2)) / 2
_BINS = 10
_STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """Does a probability of 0.7 come true in 70 of 100 images? By class, in bins of probability.

    Attributes:
      predicted: float [K, bins], mean probability given to the class; NaN in an empty bin.
      observed: float [K, bins], share of those images that are of the class; NaN in an empty bin.
      images: int [K, bins].
      error: expected calibration error, 0 to 1: |observed - predicted| over the images, then
        averaged over the classes that have images (classwise ECE, Kull et al. 2019). Chance
        alone makes it larger than 0; see `expected_error_if_perfect`.
      debiased: root of the mean square of those gaps, 0 to 1, from which the square that chance
        adds is taken out (Kumar, Liang and Ma 2019); 0 where chance explains all of it. Squares
        have an unbiased estimate, and absolute gaps have none.
    """

    predicted: Floats
    observed: Floats
    images: Ints
    error: float
    debiased: float


def calibration(counts: Counts, bins: int = _BINS) -> Calibration | None:
    """Calibration from the score histograms, in equal bins of probability; None without scores."""
    if not counts.positive.any():
        return None
    member = _assign_bins(bins)
    everyone = counts.positive + counts.negative
    images = everyone @ member
    expected, true = (everyone * _PROBABILITY) @ member, counts.positive @ member
    with np.errstate(invalid="ignore"):
        predicted, observed = expected / images, true / images
    return Calibration(
        predicted,
        observed,
        images.astype(np.int64),
        _find_error(true - expected, counts),
        _find_debiased(predicted, observed, images, counts),
    )


def expected_error_if_perfect(counts: Counts, *, seed: int, draws: int = 200) -> float | None:
    """The `Calibration.error` that a perfectly calibrated model would show on so few images.

    An error near it is no sign of bad calibration. The classes are drawn from the probabilities
    that the model gave, and the errors of all draws averaged.

    Args:
      counts: of one model on one set of images.
      seed: of the draws; equal seeds give equal figures.
      draws: how often classes are drawn.
    """
    if not counts.positive.any():
        return None
    rng, member = np.random.default_rng(seed), _assign_bins(_BINS)
    everyone = counts.positive + counts.negative
    used = everyone.any(axis=0)
    everyone, member, chance = everyone[:, used], member[used], _PROBABILITY[used]
    gaps = ((rng.binomial(everyone, chance) - everyone * chance) @ member for _ in range(draws))
    return float(np.mean([_find_error(gap, counts) for gap in gaps]))


def calibration_slope(counts: Counts, k: int) -> tuple[float, float] | None:
    """Slope and intercept of true log-odds of class k over those that the model gave (Cox 1958).

    They are 1 and 0 for a model that is right; a slope below 1 tells of probabilities that are too
    extreme. Fitted as a logistic regression, by Newton's method. None where no finite slope is the
    likeliest: without images of the class or of others, or where one score parts them.
    """
    own, others = counts.positive[k], counts.negative[k]
    (high,), (low,) = own.nonzero(), others.nonzero()
    if not (len(high) and len(low) and high[0] < low[-1] and low[0] < high[-1]):
        return None
    used = (own + others).nonzero()
    x, n, y = CENTRES[used], (own + others)[used], own[used]
    design = np.stack([x, np.ones_like(x)], axis=1)
    point, loss = np.zeros(2), _nats(np.zeros_like(x), n, y)
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(design @ point, -700, 700)))
        curve = design.T @ (design * (n * p * (1 - p))[:, None])
        step = np.linalg.lstsq(curve, design.T @ (y - n * p), rcond=None)[0]
        # Halved until the loss falls: a whole step can overshoot where scores are extreme.
        while (lower := _nats(design @ (point + step), n, y)) > loss and np.abs(step).max() > 1e-12:
            step = step / 2
        point, loss = point + step, lower
        if np.abs(step).max() < 1e-9:
            break
    return float(point[0]), float(point[1])


def brier_interval(counts: Counts) -> Estimate | None:
    """`brier_score` with its normal 95 % interval by image, cut to 0 to 2; None of fewer than two.

    Counts do not tell which scores belong to one image. So an image's share in the squares of the
    classes that it is not of is taken as proportional to the square of its own; with two classes
    that is exact. Images that share a patient make it too narrow.
    """
    figure, own = brier_score(counts), counts.positive.sum(axis=0)
    n = int(own.sum())
    if figure is None or n < 2:
        return None
    squares = (1 - _PROBABILITY) ** 2
    mean = float(own @ squares) / n
    spread = math.sqrt(float(own @ (squares - mean) ** 2) / (n - 1)) / max(mean, 1e-300)
    half = 1.959964 * figure * spread / math.sqrt(n)
    return Estimate(figure, max(0.0, figure - half), min(2.0, figure + half))


def _assign_bins(bins: int) -> Floats:
    """Which equal bin of probability each bin of scores is in, [BINS, bins] of 0 and 1."""
    group = np.minimum((_PROBABILITY * bins).astype(int), bins - 1)
    member: Floats = (group[:, None] == np.arange(bins)).astype(np.float64)
    return member


def _find_error(gaps: Floats, counts: Counts) -> float:
    """Of images expected in each bin and not found, [K, bins]."""
    errors = np.abs(gaps).sum(axis=1) / counts.positive.sum()
    return float(errors[counts.positive.any(axis=1)].mean())


def _find_debiased(predicted: Floats, observed: Floats, images: Floats, counts: Counts) -> float:
    """A bin with one image tells nothing of chance, so it is left out."""
    luck = observed * (1 - observed) / np.maximum(images - 1, 1)
    squares = np.where(images > 1, (observed - predicted) ** 2 - luck, 0) * images
    by_class = squares.sum(axis=1) / counts.positive.sum()
    return math.sqrt(max(0.0, float(by_class[counts.positive.any(axis=1)].mean())))


def _nats(log_odds: Floats, n: Ints, y: Ints) -> float:
    """The loss of log-odds for n images, of which y are of the class."""
    return float(n @ np.logaddexp(0, log_odds) - y @ log_odds)
