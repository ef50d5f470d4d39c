"""Counts of what a model did on images; they add up over sites, and hold no image."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import ContractError

if TYPE_CHECKING:
    from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Sparse = dict[str, int | float | list[int] | list[float]]

BINS = 2048
REACH = 8.0
"""Histograms are uniform in asinh(log-odds) over ±REACH: bins of 1/128 near even odds, 1 % apart
in the tails, up to log-odds of ±1490. A clip at ±16 would tie most scores of a confident model."""

CENTRES: Floats = np.sinh((np.arange(BINS) + 0.5) * (2 * REACH / BINS) - REACH)
"""The log-odds in the middle of each bin."""

MOST = 10**9
"""More images than one site can hold; larger counts are refused before they can overflow a sum."""


@dataclass(frozen=True, eq=False)
class Counts:
    """What a model did on some images; `a + b` is what it did on both sets together.

    Attributes:
      confusion: int64 [K, K], images by true class (row) and the class they were called (column).
      positive: int64 [K, BINS], for each class, its images by the log-odds given to that class.
      negative: int64 [K, BINS], the same for the images of all other classes. Both are empty for
        images whose scores are withheld: figures of scores are then of the other images alone.
      loss_sum: cross-entropy in nats, summed over the images with scores.
      right: int64 [K], for each class, its images to which the model gives it the highest
        probability. Where probabilities know how common a class is, and decisions do not, that is
        more than the diagonal of `confusion`. Of the images with scores alone.
      noise: Standard deviation of what noise or rounding adds to a cell of `confusion`; 0 where
        cells are exact, and just there scores are told. With noise, cells and totals may be
        negative, and shares of them are cut to 0 and 1.
    """

    confusion: Ints
    positive: Ints
    negative: Ints
    loss_sum: float
    right: Ints
    noise: float = 0.0

    @property
    def n(self) -> int:
        """How many images were counted; with noise, about how many."""
        return int(self.confusion.sum())

    @property
    def classes(self) -> int:
        """K, the number of classes."""
        return len(self.confusion)

    @classmethod
    def zero(cls, classes: int) -> Self:
        """The counts of no images."""
        square, wide = (classes, classes), (classes, BINS)
        confusion, positive, negative = (np.zeros(s, np.int64) for s in (square, wide, wide))
        return cls(confusion, positive, negative, 0.0, np.zeros(classes, np.int64))

    @staticmethod
    def of(logits: "Tensor", labels: "Tensor", scores: "Tensor | None" = None) -> "Counts":
        """Count one batch.

        Args:
          logits: Float [n, K]; the class with the highest is called.
          labels: Int [n], in 0..K-1.
          scores: Float [n, K], of whose softmax the probabilities are; without them, the logits.
        """
        given = logits if scores is None else scores
        return Answers.of(_numbers(logits), _numbers(given), labels.cpu().long().numpy()).count()

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.confusion + other.confusion,
            self.positive + other.positive,
            self.negative + other.negative,
            self.loss_sum + other.loss_sum,
            self.right + other.right,
            math.hypot(self.noise, other.noise),
        )

    def coarse(self, confusion: Ints, noise: float) -> Self:
        """These counts without scores and losses, with a confusion matrix that is not exact."""
        nothing = np.zeros_like(self.positive)
        return type(self)(confusion, nothing, nothing, 0.0, np.zeros_like(self.right), noise)

    def sparse(self) -> Sparse:
        """These counts for the wire: each array as [index, count, …] of its non-zero cells."""
        return {
            "confusion": _pairs(self.confusion),
            "positive": _pairs(self.positive),
            "negative": _pairs(self.negative),
            "loss_sum": self.loss_sum,
            "right": _pairs(self.right),
            "noise": self.noise,
        }

    @classmethod
    def from_sparse(
        cls,
        record: Mapping[str, object],
        classes: int,
        *,
        scored: bool = True,
    ) -> Self:
        """The counts another machine sent, trusting none of it.

        Args:
          record: what `sparse` gave there.
          classes: K as agreed at join; sizes come from here, never from the record.
          scored: Whether it must be exact, with the scores of all images, or coarse with none.

        Raises:
          ContractError: a key, type, index, count or total is not what `sparse` could have given.
        """
        keys = {"confusion", "positive", "negative", "loss_sum", "right", "noise"}
        if set(record) != keys:
            raise _bad("", f"the keys {sorted(keys)}", f"{len(record)} keys that are not those")
        least = 1 if scored else -MOST
        confusion = _dense("confusion", record["confusion"], classes, classes, least=least)
        positive = _dense("positive", record["positive"], classes, BINS)
        negative = _dense("negative", record["negative"], classes, BINS)
        images = confusion.sum(axis=1) * scored
        if (positive.sum(axis=1) != images).any():
            raise _bad("positive", "as many images of each class as in confusion", "others")
        if (negative.sum(axis=1) != images.sum() - images).any():
            raise _bad("negative", "as many images outside each class as in confusion", "others")
        loss_sum = _loss_sum(record["loss_sum"], int(images.sum()))
        right = _dense("right", record["right"], classes, 1)[:, 0]
        if (right > images).any():
            raise _bad("right", "no more images of a class than in confusion", "more")
        noise = _noise(record["noise"], scored=scored)
        return cls(confusion, positive, negative, loss_sum, right, noise)


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model said of each of n images: what is counted of them, and stays at the site.

    Attributes:
      truth: int [n], the classes of the images.
      called: int [n], the classes that were decided for.
      likeliest: int [n], the classes of the highest probability.
      bins: int [n, K], for each class, the bin of the log-odds given to it.
      losses: float [n], cross-entropy in nats.
      width: How many bins there are.
    """

    truth: Ints
    called: Ints
    likeliest: Ints
    bins: Ints
    losses: Floats
    width: int = BINS

    @classmethod
    def of(cls, logits: Floats, scores: Floats, labels: Ints) -> Self:
        """The answers of logits [n, K] that decide, and scores [n, K] of probabilities.

        An image with a logit that is no finite number counts as wrong, for sure: an error would
        tell the server that there is such an image.
        """
        called = _finite(logits, labels).argmax(1)
        z = _finite(scores, labels)
        log_p, log_odds = _log_scores(z)
        bins = np.floor((np.arcsinh(log_odds) + REACH) * (BINS / (2 * REACH)))
        bins = np.clip(bins, 0, BINS - 1).astype(np.int64)
        losses = -log_p[np.arange(len(z)), labels]
        return cls(labels, called, z.argmax(1), bins, losses)

    def compact(self) -> Self:
        """The same without empty bins: counts of it have figures sooner, but do not add."""
        used, bins = np.unique(self.bins, return_inverse=True)
        return replace(self, bins=bins.reshape(self.bins.shape), width=len(used))

    def count(self, times: Ints | None = None) -> Counts:
        """The counts of all images, or of each so many times, [n] from 0."""
        n, classes = self.bins.shape
        times = np.ones(n, np.int64) if times is None else times
        wide = np.broadcast_to(times[:, None], (n, classes))
        cells = self.bins + np.arange(classes) * self.width
        own = np.arange(classes) == self.truth[:, None]
        right = self.likeliest == self.truth
        return Counts(
            _histogram(self.truth * classes + self.called, times, classes, classes),
            _histogram(cells[own], wide[own], classes, self.width),
            _histogram(cells[~own], wide[~own], classes, self.width),
            float(self.losses @ times),
            _histogram(self.truth[right], times[right], classes, 1)[:, 0],
        )


def _numbers(tensor: "Tensor") -> Floats:
    numbers: Floats = tensor.detach().cpu().double().numpy()
    return numbers


def _finite(z: Floats, truth: Ints) -> Floats:
    """Logits [n, K], with those of a row that is not finite as wrong as a histogram can show."""
    good = np.isfinite(z).all(axis=1, keepdims=True)
    wrong = np.eye(z.shape[1])[(truth + 1) % z.shape[1]] * math.sinh(REACH)
    return np.where(good, z, wrong)


def _log_scores(z: Floats) -> tuple[Floats, Floats]:
    """Log-probability and log-odds of every class [n, K], exact even where a probability is 1.

    The log-odds of class k are z_k - logsumexp(z of the others).
    """
    rows, top = np.arange(len(z)), z.argmax(1)
    z = z - z[rows, top][:, None]
    others = z.copy()
    others[rows, top] = -np.inf
    rest = np.logaddexp.reduce(others, axis=1)
    log_p = z - np.logaddexp(0, rest)[:, None]
    with np.errstate(divide="ignore"):
        log_odds = log_p - np.log1p(-np.exp(log_p))
    log_odds[rows, top] = -rest
    return log_p, log_odds


def _histogram(cells: Ints, times: Ints, rows: int, columns: int) -> Ints:
    counts = np.bincount(cells, times, minlength=rows * columns)
    return counts.reshape(rows, columns).astype(np.int64)


def _pairs(counts: Ints) -> list[int]:
    flat = counts.ravel()
    (at,) = flat.nonzero()
    pairs: list[int] = np.stack([at, flat[at]], axis=1).ravel().tolist()
    return pairs


def _bad(key: str, expected: str, got: object) -> ContractError:
    where = f"counts: {key}" if key else "counts"
    return ContractError(where, expected=expected, got=got)


def _dense(key: str, pairs: object, rows: int, columns: int, *, least: int = 1) -> Ints:
    """The array [rows, columns] behind `_pairs`, or a ContractError."""
    size = rows * columns
    if not isinstance(pairs, list) or len(pairs) % 2 or len(pairs) > 2 * size:
        raise _bad(key, f"a list of at most {size} pairs", type(pairs).__name__)
    if any(type(number) is not int or not -MOST <= number <= MOST for number in pairs):
        raise _bad(key, f"whole numbers up to {MOST}", "something else")
    at, count = np.array(pairs, np.int64).reshape(-1, 2).T
    if (np.diff(at) <= 0).any() or ((at < 0) | (at >= size)).any():
        raise _bad(key, f"rising indices from 0, below {size}", "others")
    if (count < least).any() or not count.all() or abs(count.sum()) > rows * MOST:
        expected = f"counts from {least}, none of them 0, {rows * MOST} together at most"
        raise _bad(key, expected, "others")
    flat = np.zeros(size, np.int64)
    flat[at] = count
    return flat.reshape(rows, columns)


def _loss_sum(value: object, n: int) -> float:
    if not isinstance(value, float) or not np.isfinite(value) or value < 0 or (n == 0 and value):
        raise _bad("loss_sum", "a finite sum of losses, at least 0, and 0 without scores", value)
    return value


def _noise(value: object, *, scored: bool) -> float:
    if not isinstance(value, float) or not 0 <= value <= MOST or (value == 0) != scored:
        raise _bad("noise", "none" if scored else "a deviation above 0", value)
    return value
