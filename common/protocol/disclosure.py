"""What a site tells of its patients beside trained tensors, and how coarsely."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, StrictInt

from common.config.study import Epsilon
from common.config.yaml import Section

CountsLevel = Literal["exact", "rounded", "none"]
MetricsLevel = Literal["every_round", "final", "none"]

_LEAST_BASE = 10
_SUMS = 10
"""Patients of a class at least, where a site that tells exact counts says nothing of sums."""


class Disclosure(Section):
    """What leaves a site beside trained tensors; later levels tell less."""

    counts: CountsLevel | None = None
    """Numbers of patients and images: `exact`, `rounded` to multiples of 10 or more, or `none`; if
    the site does not say, rounded in a study with differential privacy, and exact in any other."""
    metrics: MetricsLevel = "every_round"
    """Training loss and counts behind the metrics: each round, at the end only, or never; each
    round only where all counts are exact."""
    min_cell: Annotated[StrictInt, Field(ge=1, le=1000)] = 1
    """Above 1, no number from 1 to below this can be derived: all are rounded to multiples."""
    epsilon: Epsilon | None = None
    """ε, at `policy.delta`, of all that one study tells of a validation or test patient: counts of
    the released model, with noise, and no numbers of these patients at join."""
    sums: Annotated[StrictInt, Field(ge=1, le=10**6)] | Literal["none"] | None = None
    """For a head that is solved from sums of features, without privacy: patients of a class, of
    those that are here, at least; the sum of a class of one *is* a patient's features. Sums hold
    exact numbers of images, so if the site does not say: 10 where counts are exact, else `none`.
    As agreed in a study: `none` where it asks for no sums, or a class here has fewer."""

    adapted: bool = False
    """At the end of a study without privacy, counts of the site's own models on its test patients:
    the released one fitted to it, and one of its patients alone; never the models. Where all counts
    are exact, also how they compare, by patient: intervals, and on how many images one of two is
    right, both, or neither. Where `epsilon` or `metrics: none` says so, none."""

    @property
    def base(self) -> int:
        """What every number told without noise is a multiple of."""
        return self.min_cell if self.counts == "exact" else max(_LEAST_BASE, self.min_cell)

    def resolved(self, *, private: bool) -> Self:
        """What it comes down to in a study: metrics are made of counts, and may have to wait.

        One answer per study is bounded, by noise or rounding; one for each round is not.
        """
        found = self.model_copy(
            update={"counts": self.counts or ("rounded" if private else "exact")}
        )
        if found.sums is None:
            found = found.model_copy(update={"sums": _SUMS if found.base == 1 else "none"})
        if found.counts == "none":
            found = found.model_copy(update={"metrics": "none", "epsilon": None})
        if private or found.metrics == "none" or found.epsilon is not None:
            found = found.model_copy(update={"adapted": False})
        if found.counts == "none":
            return found
        if found.metrics == "every_round" and (private or not found.tells_scores):
            return found.model_copy(update={"metrics": "final"})
        return found

    def within(self, other: Self) -> bool:
        """Whether it tells nothing that `other` does not."""
        levels = get_args(CountsLevel), get_args(MetricsLevel)
        if (other.sums == "none" != self.sums) or self.adapted > other.adapted:
            return False
        return (
            levels[0].index(self.counts) >= levels[0].index(other.counts)
            and levels[1].index(self.metrics) >= levels[1].index(other.metrics)
            and (
                self.counts == "none"
                or (
                    self.base >= other.base
                    and (self.epsilon or float("inf")) <= (other.epsilon or float("inf"))
                )
            )
        )

    @property
    def tells_scores(self) -> bool:
        """Whether scores and losses are told where metrics are.

        With a base above 1 they are not: nearly all cells of a histogram are small, and the loss of
        a model made for it tells the number of images in a class, however it is rounded. Nor are
        they with noise, which would cost them most of what they say.
        """
        return self.base == 1 and self.epsilon is None

    @property
    def tells(self) -> bool:
        """Whether it tells any number at all."""
        return self.counts != "none"

    @property
    def tells_held_out(self) -> bool:
        """Whether it tells at join how many patients are held out."""
        return self.tells and self.epsilon is None

    @property
    def withheld(self) -> str:
        """What a reader of the results misses, in words; nothing if all is told."""
        if self.metrics == "none":
            return "all figures"
        parts = ["figures of single rounds"] * (self.metrics == "final")
        if self.epsilon is not None:
            parts.append(f"scores, losses, and counts without noise (ε {self.epsilon:g})")
        elif self.base > 1:
            parts.append(f"scores, losses, and numbers finer than multiples of {self.base}")
        return ", ".join(parts)
