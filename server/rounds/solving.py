"""A head solved from sums over sites, and the strength that validates best over all of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.config.study import Study
from common.heads.registry import HEADS, LinearHead
from common.heads.sums import Sums, balance
from common.metrics.metrics import Counts, Floats, better, value
from common.model import backbones
from common.protocol.tensors import Tensors
from server.runs.results import unite_counts


@dataclass(frozen=True)
class Solved:
    """The head that was solved, and how.

    Attributes:
      head: Its name.
      strength: Of its shrinkage or penalty.
      validation: The select metric of each strength, on the validation patients of all sites that
        tell; empty where none does.
      sites: Whose sums are in it, by name.
    """

    head: str
    strength: float
    validation: Mapping[float, float | None]
    sites: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """For the run's files."""
        return {
            "head": self.head,
            "strength": self.strength,
            "validation": {f"{strength:g}": told for strength, told in self.validation.items()},
            "sites": list(self.sites),
        }


def place_head(study: Study, head: LinearHead, centre: Floats) -> Tensors:
    """The tensors of the study's network that hold a head and its centre, float32."""
    place = backbones.get(study.model.backbone).head
    numbers = {"linear.weight": head.weight, "linear.bias": head.bias}
    if study.model.feature_mean is None:
        numbers["centre.mean"] = centre
    return {
        f"{place}.{name}": torch.tensor(value, dtype=torch.float32).contiguous()
        for name, value in numbers.items()
    }


def find_centre(means: Iterable[tuple[int, Floats]]) -> Floats:
    """The mean [d] of the features of all sites' images, rounded to float32 as it travels.

    Args:
      means: The number of images and the sum of their features, of each site.
    """
    told = list(means)
    total = np.sum([total for _, total in told], axis=0)
    mean = total / max(sum(images for images, _ in told), 1)
    return np.asarray(mean.astype(np.float32), np.float64)


def choose_weights(study: Study, images: Sequence[Sequence[int] | None]) -> Floats:
    """The weight of an image of each class [K], the same at every site.

    The study's own, where it has any; else classes are balanced by the training images that sites
    tell at join.
    """
    if study.train.class_weights:
        own: Floats = np.array(study.train.class_weights, np.float64)
        return np.asarray(own / own.max(), np.float64)
    counts: Floats = np.zeros(len(study.classes))
    for told in images:
        counts = counts + np.array(told or 0, np.float64)
    return balance(counts if counts.any() else np.ones(len(study.classes)))


def solve_candidates(study: Study, sums: Mapping[str, Sums]) -> dict[float, LinearHead]:
    """The head of each strength, from the sums of all sites, added in the order of names."""
    kind = HEADS[study.model.solved_head or ""]
    first, *rest = (sums[name] for name in sorted(sums))
    total = sum(rest, first)
    return {strength: kind.solve(total, strength) for strength in kind.strengths}


def choose_strength(
    study: Study, told: Sequence[Sequence[Counts]]
) -> tuple[float, dict[float, float | None]]:
    """The strength with the best select metric over the validation patients of all sites.

    Args:
      study: That names head and metric.
      told: Of each site that tells, the counts of each strength.

    Returns:
      The strength, the default one where no site tells; and the metric of each.
    """
    kind, metric, classes = HEADS[study.model.solved_head or ""], study.select, len(study.classes)
    if not told:
        return kind.default, {}
    scores = {
        strength: value(unite_counts((site[i] for site in told), classes), metric)
        for i, strength in enumerate(kind.strengths)
    }
    best = kind.default
    for strength, score in scores.items():
        if better(metric, score, scores[best]):
            best = strength
    return best, scores
