"""Metrics from counts that add up: figures of the union of images, never a mean of means."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.metrics.counts import CENTRES, Counts, Floats


@dataclass(frozen=True)
class Metric:
    """One figure of merit: its name for people, how it is computed, and which way is better.

    Attributes:
      label: The name for people.
      of: Computes it; None where the counts leave it undefined.
      higher: Whether a larger figure is better.
      range: The least and the largest figure there can be.
      macro: Whether it is a mean over classes, in which a rare one weighs as much as any.
    """

    label: str
    of: Callable[[Counts], float | None]
    higher: bool = True
    range: tuple[float, float] = (0.0, 1.0)
    macro: bool = True


class Cells(NamedTuple):
    """Images of one class, and of the others, by whether they were called that class."""

    tp: int
    fn: int
    fp: int
    tn: int


def find_cells(counts: Counts, k: int) -> Cells:
    """The decisions about class k against the rest."""
    called, own = counts.confusion[:, k].sum(), counts.confusion[k].sum()
    tp = int(counts.confusion[k, k])
    fn, fp = int(own) - tp, int(called) - tp
    return Cells(tp, fn, fp, counts.n - tp - fn - fp)


SHARES: Mapping[str, Callable[[Cells], tuple[int, int]]] = {
    "sensitivity": lambda cells: (cells.tp, cells.fn),
    "specificity": lambda cells: (cells.tn, cells.fp),
    "ppv": lambda cells: (cells.tp, cells.fp),
    "npv": lambda cells: (cells.tn, cells.fn),
}
"""Shares of decisions about one class: the images that were right, and those that were wrong."""

SHARE_LABELS = {"ppv": "PPV", "npv": "NPV"}
"""How shares are called in tables, where that is not their name."""


def class_share(counts: Counts, k: int, name: str) -> float | None:
    """One of SHARES of decisions about class k; None without images that it is a share of."""
    right, wrong = SHARES[name](find_cells(counts, k))
    return _number(_share(right, right + wrong))


def sensitivity(counts: Counts, k: int) -> float | None:
    """Share of class k's images that were called k; None without such images."""
    return class_share(counts, k, "sensitivity")


def specificity(counts: Counts, k: int) -> float | None:
    """Share of the other classes' images that were not called k; None without such images."""
    return class_share(counts, k, "specificity")


def ppv(counts: Counts, k: int) -> float | None:
    """Positive predictive value: share of class k in the images called k; None if none was."""
    return class_share(counts, k, "ppv")


def npv(counts: Counts, k: int) -> float | None:
    """Negative predictive value: share of other classes in the images not called k, or None."""
    return class_share(counts, k, "npv")


def class_auroc(counts: Counts, k: int) -> float | None:
    """Area under the ROC curve of class k against the rest, ties one half; None if undefined."""
    return _number(_aurocs(counts)[k])


def average_precision(counts: Counts, k: int) -> float | None:
    """Precision of class k, averaged over its images by falling score; None without such images.

    The step-wise area under the precision-recall curve, by the scores' bins. By chance it is the
    share of the class in the images, not one half.
    """
    right = counts.positive[k, ::-1].cumsum()
    called = right + counts.negative[k, ::-1].cumsum()
    precision = _ratio(right, called)
    precision[called == 0] = 0
    return _number(_ratio(counts.positive[k, ::-1] @ precision, counts.positive[k].sum()))


def macro_average_precision(counts: Counts) -> float | None:
    """Mean of `average_precision` over the classes that have images; None without scores."""
    found = [average_precision(counts, k) for k in range(counts.classes)]
    return _macro(np.array(found, np.float64))


def _accuracy(counts: Counts) -> float | None:
    """By the most probable class; where scores are withheld, by the class that was called."""
    right = np.trace(counts.confusion) if counts.noise else counts.right.sum()
    return _number(_share(right, counts.n))


def _balanced_accuracy(counts: Counts) -> float | None:
    return _macro(_recalls(counts))


def _f1(counts: Counts) -> float | None:
    """Macro F1 over the classes that have images."""
    right = np.diagonal(counts.confusion)
    true, called = counts.confusion.sum(axis=1), counts.confusion.sum(axis=0)
    return _macro(np.where(true > 0, _share(2 * right, true + called), np.nan))


def _auroc(counts: Counts) -> float | None:
    """Macro one-vs-rest; two classes share one curve, which is counted once."""
    areas = _aurocs(counts)
    return _macro(areas[1:] if counts.classes == 2 else areas)


def _loss(counts: Counts) -> float | None:
    # Losses are withheld with the scores.
    return _number(_ratio(counts.loss_sum, counts.positive.sum()))


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", _accuracy, macro=False),
    "balanced_accuracy": Metric("balanced accuracy", _balanced_accuracy),
    "f1": Metric("macro F1", _f1),
    "auroc": Metric("AUROC", _auroc),
    "loss": Metric("loss", _loss, higher=False, range=(0.0, math.inf), macro=False),
}
"""What a study can select and report. A class without images is left out of every mean."""


def brier_score(counts: Counts) -> float | None:
    """Squared distance of probabilities from the truth, 0 to 2 an image (Brier 1950).

    None without scores. Within 1e-4, as the scores are in bins.
    """
    p = np.exp(-np.logaddexp(0, -CENTRES))
    squares = counts.positive @ (1 - p) ** 2 + counts.negative @ p**2
    return _number(_ratio(squares.sum(), counts.positive.sum()))


def value(counts: Counts, name: str) -> float | None:
    """The metric called `name`, one of METRICS; None where the counts leave it undefined."""
    return METRICS[name].of(counts)


def label_metric(metric: str) -> str:
    """A metric's label, or the words themselves where there is no metric of that name."""
    known = METRICS.get(metric)
    return known.label if known else metric.replace("_", " ")


def better(name: str, a: float | None, b: float | None) -> bool:
    """Whether `a` beats `b` in the metric called `name`; an undefined value beats nothing."""
    if a is None or b is None:
        return a is not None
    return a > b if METRICS[name].higher else a < b


def _recalls(counts: Counts) -> Floats:
    return _share(np.diagonal(counts.confusion), counts.confusion.sum(axis=1))


def _aurocs(counts: Counts) -> Floats:
    """Per class, the chance that its image outscores another's: Mann and Whitney's U."""
    below = counts.negative.cumsum(axis=1) - counts.negative / 2
    pairs = counts.positive.sum(axis=1, dtype=np.float64) * counts.negative.sum(axis=1)
    return _ratio((counts.positive * below).sum(axis=1), pairs)


def _share(part: object, whole: object) -> Floats:
    """The ratio of counts; noise may take it out of 0 to 1, so it is cut."""
    cut: Floats = _ratio(part, whole).clip(0, 1)
    return cut


def _ratio(part: object, whole: object) -> Floats:
    """The share of `part` in `whole`, NaN where that is 0; NaN never leaves this file."""
    above, below = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    shares: Floats = np.full(above.shape, np.nan)
    np.divide(above, below, out=shares, where=below > 0)
    return shares


def _macro(values: Floats) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def _number(ratio: Floats) -> float | None:
    return None if np.isnan(ratio) else float(ratio)
