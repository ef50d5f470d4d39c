"""What a site tells of its patients, and how it coarsens numbers before it does.

Numbers that may not leave as they are leave by controlled rounding (Cox and Ernst 1982), from the
total down: the images of a part to the nearest multiple of the base; those of each class to one of
the two multiples around the true number, so that together they are that total; and in the same way
the cells of the confusion matrix in the row of each class. So all that is told adds up: within one
study, no sum or difference of it says more about a small cell than the cell itself does. The
rounding is fixed: asking again, with the same model or another, averages nothing out.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self, get_args

import numpy as np
from pydantic import Field, StrictInt

from common.config.yaml import Section
from common.metrics.metrics import Counts

CountsLevel = Literal["exact", "rounded", "none"]
MetricsLevel = Literal["every_round", "final", "none"]

_LEAST_BASE = 10


class Disclosure(Section):
    """What leaves a site beside trained tensors; later levels tell less."""

    counts: CountsLevel | None = None
    """Numbers of patients and images: `exact`, `rounded` to multiples of 10 or more, or `none`; if
    the site does not say, rounded in a study with differential privacy, and exact in any other."""
    metrics: MetricsLevel = "every_round"
    """Training loss and counts behind the metrics: each round, at the end only, or never."""
    min_cell: Annotated[StrictInt, Field(ge=1, le=1000)] = 1
    """Above 1, no number from 1 to below this can be derived: all are rounded to multiples."""

    @property
    def base(self) -> int:
        """What every number told is a multiple of."""
        return self.min_cell if self.counts == "exact" else max(_LEAST_BASE, self.min_cell)

    def resolved(self, *, private: bool) -> Self:
        """What it comes down to in a study: metrics are made of counts, and wait under privacy."""
        counts, metrics = self.counts or ("rounded" if private else "exact"), self.metrics
        if counts == "none":
            metrics = "none"
        elif private and metrics == "every_round":
            metrics = "final"
        return self.model_copy(update={"counts": counts, "metrics": metrics})

    def within(self, other: Self) -> bool:
        """Whether it tells nothing that `other` does not."""
        levels = get_args(CountsLevel), get_args(MetricsLevel)
        return (
            levels[0].index(self.counts) >= levels[0].index(other.counts)
            and levels[1].index(self.metrics) >= levels[1].index(other.metrics)
            and (self.counts == "none" or self.base >= other.base)
        )

    def number(self, n: int) -> int | None:
        """A number of patients or images as it is told; None if it is not."""
        return None if self.counts == "none" else _nearest(n, self.base)

    def numbers(self, images: Sequence[int]) -> tuple[int, ...] | None:
        """Images of each class as they are told; None if they are not."""
        return None if self.counts == "none" else self._rows(images)

    @property
    def tells_scores(self) -> bool:
        """Whether scores and losses are told where metrics are.

        With a base above 1 they are not: nearly all cells of a histogram are small, and the loss of
        a model made for it tells the number of images in a class, however it is rounded.
        """
        return self.base == 1

    def coarse(self, counts: Counts) -> Counts:
        """Counts as they are told where metrics are."""
        if self.tells_scores:
            return counts
        rows = self._rows(counts.confusion.sum(axis=1).tolist())
        told = [
            _apportion(row, total, self.base)
            for row, total in zip(counts.confusion.tolist(), rows, strict=True)
        ]
        return counts.unscored(np.array(told, np.int64))

    @property
    def tells(self) -> bool:
        """Whether it tells any number at all."""
        return self.counts != "none"

    @property
    def withheld(self) -> str:
        """What a reader of the results misses, in words; nothing if all is told."""
        if self.metrics == "none":
            return "all figures"
        parts = ["figures of single rounds"] * (self.metrics == "final")
        if self.base > 1:
            parts.append(f"scores, losses, and numbers finer than multiples of {self.base}")
        return ", ".join(parts)

    def _rows(self, images: Sequence[int]) -> tuple[int, ...]:
        return _apportion(images, _nearest(sum(images), self.base), self.base)


def _nearest(n: int, base: int) -> int:
    return (n + base // 2) // base * base


def _apportion(numbers: Sequence[int], total: int, base: int) -> tuple[int, ...]:
    """Each number to a multiple next to it, together `total`; the largest remainders go up.

    `total` is one of the two multiples next to the sum. Of equal remainders the first goes up.
    """
    down = [n - n % base for n in numbers]
    up = (total - sum(down)) // base
    order = sorted(range(len(numbers)), key=lambda i: (-(numbers[i] % base), i))
    raised = set(order[:up])
    return tuple(n + base if i in raised else n for i, n in enumerate(down))
