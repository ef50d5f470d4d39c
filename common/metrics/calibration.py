"""Whether probabilities come true, from the score histograms alone."""

from dataclasses import dataclass

import numpy as np

from common.metrics.counts import CENTRES, Counts, Floats, Ints


@dataclass(frozen=True)
class Calibration:
    """Does a probability of 0.7 come true in 70 of 100 images? By class, in bins of probability.

    Attributes:
      predicted: float [K, bins], mean probability given to the class; NaN in an empty bin.
      observed: float [K, bins], share of those images that are of the class; NaN in an empty bin.
      images: int [K, bins].
      error: expected calibration error, 0 to 1: |observed - predicted| over the images, then
        averaged over the classes that have images (classwise ECE, Kull et al. 2019).
    """

    predicted: Floats
    observed: Floats
    images: Ints
    error: float


def calibration(counts: Counts, bins: int = 10) -> Calibration | None:
    """Calibration from the score histograms, in equal bins of probability; None without scores."""
    if not counts.positive.any():
        return None
    probability = (1 + np.tanh(CENTRES / 2)) / 2
    group = np.minimum((probability * bins).astype(int), bins - 1)
    member = (group[:, None] == np.arange(bins)).astype(np.float64)
    everyone = counts.positive + counts.negative
    images = everyone @ member
    expected, true = (everyone * probability) @ member, counts.positive @ member
    errors = np.abs(true - expected).sum(axis=1) / counts.positive.sum()
    with np.errstate(invalid="ignore"):
        predicted, observed = expected / images, true / images
    error = float(errors[counts.positive.any(axis=1)].mean())
    return Calibration(predicted, observed, images.astype(np.int64), error)
