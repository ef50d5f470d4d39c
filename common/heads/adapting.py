"""A site's own fit of a solved head, from the sums of all sites and its own images.

The class means of all sites are drawn to the site's own, and the covariance within classes becomes
a mixture of both. How far is chosen by the site's own cross-validation, the federated head as it
is among the choices; so a site that gains nothing keeps that.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from common.heads.registry import HEADS, LinearHead, discriminate_all, solve_discriminant
from common.heads.sums import Sums, balance
from common.metrics.counts import Counts, Floats, Ints
from common.metrics.metrics import class_auroc

Mask = NDArray[np.bool_]

_PULL = 100.0
"""As many images of a class weigh as much as all sites together in its mean."""
_FOLDS = 5
_LEAST = 5
"""Images of a class without which its AUROC tells nothing."""


class Fit(NamedTuple):
    """How a site's own images enter its head.

    Attributes:
      pull: Whether class means are drawn to its own.
      shift: Whether all of them move with what its images have in common, as of one camera.
      share: Of its own covariance in the mixture.
    """

    pull: bool = False
    shift: bool = False
    share: float = 0.0


FITS = (Fit(), *(Fit(True, shift, share) for shift in (True, False) for share in (0.0, 0.25, 0.5)))
"""Those to choose from: the federated head first."""


@dataclass(frozen=True, eq=False)
class OwnImages:
    """The training images of one site.

    Attributes:
      views: Mapped features [n, d] of each view of every image, the images themselves first.
      labels: [n], in 0..K-1.
      patients: [n], a number for each patient; all images of one are in one fold.
    """

    views: Sequence[Floats]
    labels: Ints
    patients: Ints

    def sums(self, weights: Floats, some: Mask | None = None) -> Sums:
        """The sums of all images, or of some [n]."""
        at = slice(None) if some is None else some
        return Sums.mean([Sums.of(view[at], self.labels[at], weights) for view in self.views])

    def folds(self, seed: int) -> Iterator[Mask]:
        """Masks [n] of five folds by patient, each with its part of every class."""
        names, first, owner = np.unique(self.patients, return_index=True, return_inverse=True)
        order = np.lexsort((np.random.default_rng(seed).random(len(names)), self.labels[first]))
        fold = np.empty(len(names), np.int64)
        fold[order] = np.arange(len(names)) % _FOLDS
        return (mask for k in range(_FOLDS) if (mask := fold[owner] == k).any())


@dataclass(frozen=True)
class Adapted:
    """A head for one site.

    Attributes:
      head: The head itself; None where that of all sites is best as it is.
      fit: How the site's own images entered it.
      scores: The AUROC of each choice by cross-validation, over the classes with five images or
        more; None where there are no two of them.
    """

    head: LinearHead | None
    fit: Fit
    scores: Mapping[Fit, float | None]


def adapt_head(total: Sums, own: OwnImages, shrinkage: float, *, seed: int) -> Adapted:
    """Fit a discriminant to one site.

    Hierarchical means with a common shift, after the James-Stein view of Efron and Morris (1973);
    the mixture of covariances is Friedman's (1989).

    Args:
      total: Of all sites, this one's included.
      own: This one's.
      shrinkage: That of the federated head.
      seed: Draws the folds.
    """
    mine = own.sums(total.weights)
    logits = {fit: np.zeros((len(own.labels), len(total.counts))) for fit in FITS}
    for mask in own.folds(seed):
        left_out = own.sums(total.weights, mask)
        heads = _fit_all(total - left_out, mine - left_out, shrinkage)
        for fit, head in heads:
            logits[fit][mask] = own.views[0][mask] @ head.weight.T + head.bias
    scores = {fit: _score(found, own.labels) for fit, found in logits.items()}
    best = max(FITS, key=lambda fit: (scores[fit] or 0.0, -FITS.index(fit)))
    gains = best != FITS[0]
    return Adapted(dict(_fit_all(total, mine, shrinkage))[best] if gains else None, best, scores)


def solve_local(own: OwnImages, classes: int, *, seed: int) -> tuple[LinearHead, float]:
    """The discriminant of one site's images alone, its shrinkage by its own cross-validation."""
    kind = HEADS["discriminant"]
    counts = np.bincount(own.labels, minlength=classes).astype(np.float64)
    mine = own.sums(balance(counts))
    logits = {a: np.zeros((len(own.labels), classes)) for a in kind.strengths}
    for mask in own.folds(seed):
        rest = mine - own.sums(mine.weights, mask)
        for a in kind.strengths:
            head = solve_discriminant(rest, a)
            logits[a][mask] = own.views[0][mask] @ head.weight.T + head.bias
    scores = {a: _score(found, own.labels) or 0.0 for a, found in logits.items()}
    best = max(scores, key=lambda a: (scores[a], a == kind.default))
    return solve_discriminant(mine, best), best


def _fit_all(total: Sums, own: Sums, shrinkage: float) -> Iterator[tuple[Fit, LinearHead]]:
    within, own_within = total.within, own.within
    for share in dict.fromkeys(fit.share for fit in FITS):
        mixture = (1 - share) * within + share * own_within
        alike = [fit for fit in FITS if fit.share == share]
        means = [_draw(total.means, own, fit) for fit in alike]
        yield from zip(
            alike, discriminate_all(means, mixture, total.counts, shrinkage), strict=True
        )


def _draw(means: Floats, own: Sums, fit: Fit) -> Floats:
    """Class means of all sites, drawn to those of one: more, the more images it has of a class."""
    if not fit.pull:
        return means
    weight = (own.counts / (own.counts + _PULL))[:, None]
    apart = own.means - means
    common = (weight * apart).sum(axis=0) / (weight.sum() + 0.5) if fit.shift else 0.0
    drawn: Floats = means + common + weight * (apart - common)
    return drawn


def _score(logits: Floats, labels: Ints) -> float | None:
    counts = Counts.of(torch.from_numpy(logits), torch.from_numpy(labels))
    enough = np.flatnonzero(counts.confusion.sum(axis=1) >= _LEAST)
    areas = [area for k in enough if (area := class_auroc(counts, int(k))) is not None]
    return float(np.mean(areas)) if areas else None
