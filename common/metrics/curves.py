"""What other thresholds would do: curves of one class against the rest, from score histograms."""

from collections.abc import Sequence

import numpy as np

from common.metrics.counts import BINS, CENTRES, REACH, Counts, Floats
from common.metrics.metrics import Cells

_EDGES: Floats = np.sinh(np.arange(BINS) * (2 * REACH / BINS) - REACH)
"""The log-odds at the lower edge of each bin."""


def roc_curve(counts: Counts, k: int) -> tuple[Floats, Floats] | None:
    """False and true positive rates of class k, from the highest threshold to the lowest.

    Both rise from 0 to 1; the straight lines between the points have the area `class_auroc`. None
    without scores of images of the class, or of others.
    """
    own, others = counts.positive[k, ::-1], counts.negative[k, ::-1]
    if not own.any() or not others.any():
        return None
    used = (own + others) > 0
    fpr, tpr = (np.append(0, c[used].cumsum() / c.sum()) for c in (others, own))
    return fpr, tpr


def net_benefit(
    counts: Counts, k: int, thresholds: Sequence[float]
) -> tuple[Floats, Floats] | None:
    """Net benefit of acting on class k, by the model and on everybody (Vickers and Elkin 2006).

    A threshold p says that a missed image of the class costs as much as (1 - p) / p that are
    called in vain. The benefit is in true positives an image, to be compared with acting on
    everybody, and on nobody, which has a benefit of 0.

    Args:
      counts: of one model on one set of images.
      k: the class.
      thresholds: probabilities above 0 and below 1.

    Returns:
      Two arrays as long as `thresholds`, of the model and of acting on everybody; None without
      scores.
    """
    n = int(counts.positive.sum())
    if not n:
        return None
    odds = np.array([p / (1 - p) for p in thresholds])
    cells = np.array([apply_threshold(counts, k, p) for p in thresholds]).reshape(-1, 4)
    share = counts.positive[k].sum() / n
    return (cells[:, 0] - cells[:, 2] * odds) / n, share - (1 - share) * odds


def choose_threshold(validation: Counts, k: int, sensitivity: float) -> float | None:
    """The highest probability of class k from which on so many of its images are called.

    It is an edge of a bin, so that counts tell its cells exactly. Choose on validation images, and
    judge on test images by `apply_threshold`: on the images of its choice it flatters.

    Args:
      validation: counts of validation images.
      k: the class.
      sensitivity: the least share of its images that are called, above 0, up to 1.

    Returns:
      The threshold; None without scores of images of the class.
    """
    own = validation.positive[k]
    if not own.any():
        return None
    called = own[::-1].cumsum()[::-1]
    enough = np.flatnonzero(called >= sensitivity * own.sum())
    return float(_probability(_EDGES[enough[-1]]))


def apply_threshold(counts: Counts, k: int, threshold: float) -> Cells:
    """The cells of calling k all images to which it is given at least this probability.

    Exact where the threshold is one of `choose_threshold`; else a bin is called by its middle.
    """
    called = _probability(CENTRES) >= threshold
    own, others = counts.positive[k], counts.negative[k]
    tp, fp = int(own[called].sum()), int(others[called].sum())
    return Cells(tp, int(own.sum()) - tp, fp, int(others.sum()) - fp)


def _probability(log_odds: Floats) -> Floats:
    probability: Floats = np.exp(-np.logaddexp(0, -log_odds))
    return probability
