"""How sure figures are at a site, which knows what images share a patient; pairs of models, too."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from common.metrics.counts import Answers, Floats, Ints
from common.metrics.metrics import value
from common.metrics.statistics import Estimate, form_estimate

Figures = Mapping[str, Estimate | None]
"""An estimate for each metric's name; None where it is undefined."""


@dataclass(frozen=True, eq=False)
class Tested:
    """The same images, as several ways of training see them.

    Attributes:
      labels: int [n], in 0..K-1.
      patients: int [n], a number for each patient.
      logits: Of each way, float [n, K]; the class with the highest is called.
      scores: Of each way, float [n, K], of whose softmax the probabilities are.
    """

    labels: Ints
    patients: Ints
    logits: Mapping[str, Floats]
    scores: Mapping[str, Floats]


class Joint(NamedTuple):
    """Images by which of two ways calls their class; they add over sites (McNemar 1947)."""

    both: int
    only_first: int
    only_second: int
    neither: int


@dataclass(frozen=True)
class Pair:
    """Two ways of training on the same images.

    Attributes:
      first: The one.
      second: The other.
      differences: Of the first's figures less the second's.
      joint: Images by which of them is right.
    """

    first: str
    second: str
    differences: Figures
    joint: Joint


@dataclass(frozen=True)
class Evidence:
    """What the test images of one site tell of its models.

    Attributes:
      images: How many there are.
      patients: How many patients they are of.
      figures: Of each way.
      pairs: Ways that were compared.
    """

    images: int
    patients: int
    figures: Mapping[str, Figures]
    pairs: tuple[Pair, ...]

    def facts(self) -> dict[str, Any]:
        """For JSON, as `read` reads them."""
        return asdict(self)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Self:
        """The evidence behind `facts`, also of JSON."""
        pairs = tuple(
            Pair(
                pair["first"],
                pair["second"],
                _read_figures(pair["differences"]),
                Joint(*pair["joint"]),
            )
            for pair in facts["pairs"]
        )
        figures = {way: _read_figures(told) for way, told in facts["figures"].items()}
        return cls(facts["images"], facts["patients"], figures, pairs)


def compare_ways(
    tested: Tested, select: str, pairs: Sequence[tuple[str, str]], *, seed: int, draws: int = 1000
) -> Evidence:
    """Bootstrap by patient: a patient is drawn with all of their images, for all ways at once.

    Each class keeps its number of patients. Intervals are those of `form_estimate`; nominal 95 %
    cover 93 % or more from 30 patients on; of resampled images they cover 70 to 92 %.

    Args:
      tested: The images of one site.
      select: The metric of the study, one of METRICS; AUROC is always told beside it.
      pairs: Ways to compare, the first less the second.
      seed: Of the resampling; equal seeds give equal evidence.
      draws: How often patients are drawn.
    """
    names = list(dict.fromkeys((select, "auroc")))
    owner, classes = _list_strata(tested)
    times = list(_draw_times(owner, classes, seed, draws))
    answers = {
        way: Answers.of(logits, tested.scores[way], tested.labels).compact()
        for way, logits in tested.logits.items()
    }
    # The first row is of the images themselves.
    drawn = {
        way: np.array([_compute(each, names, again) for again in (None, *times)])
        for way, each in answers.items()
    }
    patients = np.bincount(classes)
    return Evidence(
        len(owner),
        len(classes),
        {way: _estimate(names, rows, patients) for way, rows in drawn.items()},
        tuple(
            Pair(
                first,
                second,
                _estimate(names, drawn[first] - drawn[second], patients, difference=True),
                _join(answers[first], answers[second]),
            )
            for first, second in pairs
        ),
    )


def _compute(answers: Answers, names: Sequence[str], times: Ints | None = None) -> Floats:
    """Each metric, NaN where it is undefined."""
    counts = answers.count(times)
    return np.array([value(counts, name) for name in names], np.float64)


def _list_strata(tested: Tested) -> tuple[Ints, Ints]:
    """Of each image, its patient [n] from 0; of each patient, a class.

    Where images of a patient differ, it is the one that is rarest at the site.
    """
    _, owner = np.unique(tested.patients, return_inverse=True)
    order = np.lexsort((np.bincount(tested.labels)[tested.labels], owner))
    _, first = np.unique(owner[order], return_index=True)
    return owner, tested.labels[order][first]


def _draw_times(owner: Ints, classes: Ints, seed: int, draws: int) -> Iterator[Ints]:
    """How often each image is drawn, [n], in thousandths.

    Of m patients of a class m - 1 are drawn, and weigh as m: then the draws vary as figures of
    other patients would, and not less (Rao and Wu 1988).
    """
    rng = np.random.default_rng(seed)
    strata = [np.flatnonzero(classes == k) for k in np.unique(classes)]
    for _ in range(draws):
        times = np.full(len(classes), 1000)
        for some in (s for s in strata if len(s) > 1):
            m = len(some)
            times[some] = rng.multinomial(m - 1, np.full(m, 1 / m)) * round(1000 * m / (m - 1))
        yield times[owner]


def _estimate(
    names: Sequence[str], rows: Floats, patients: Ints, *, difference: bool = False
) -> Figures:
    """An estimate of each metric, from its figure and its draws, [1 + draws, names]."""
    return {
        name: form_estimate(
            name,
            None if np.isnan(figure) else float(figure),
            column,
            patients,
            difference=difference,
        )
        for name, figure, column in zip(names, rows[0], rows[1:].T, strict=True)
    }


def _join(a: Answers, b: Answers) -> Joint:
    first, second = a.called == a.truth, b.called == b.truth
    cells = (first & second, first & ~second, ~first & second, ~first & ~second)
    return Joint(*(int(cell.sum()) for cell in cells))


def _read_figures(told: Mapping[str, Any]) -> Figures:
    return {name: Estimate(**each) if each else None for name, each in told.items()}
