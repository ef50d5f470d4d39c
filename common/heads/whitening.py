"""A head from two noised sums: of outer products in a small space, then of whitened prototypes.

Each patient counts with one row of bounded length, whatever the model: features of length 1 are
projected onto a few public directions and scaled to length 1 again. The first sum gives their mean
and covariance, by which the server whitens; the second adds up each class's whitened features, from
which class means and their discriminant follow. Both are one step of the Gaussian mechanism, so all
of the budget goes into two draws of noise, where descent by gradients spends it on dozens; and rare
classes decide, which clipped gradients of weighted losses take from them.

Prototypes after Snell, Swersky and Zemel (2017), shrunk as James and Stein (1961), here with the
variance known.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.heads.registry import LinearHead
from common.metrics.counts import Floats

MOMENTS_SHARE = 0.2
"""Of the budget, for the first sum; .1 to .35 do the same within two points."""
_TOTAL, _COUNT = 0.5, 0.25
"""How the mean and the number of patients are weighed in a row of the first sum, beside outer
products of length 1."""
_LABEL = 0.3
"""How the label is weighed in a row of the second sum, beside features of length 1."""
MOMENTS_NORM = math.sqrt(1 + _TOTAL**2 + _COUNT**2)
PROTOTYPES_NORM = math.sqrt(1 + _LABEL**2)
"""The length of a row of each, and so their sensitivity to one patient."""
_FLOOR = 0.5
"""Of the noise's largest eigenvalue, what is added to all before they are inverted."""
_LEAST_SPREAD = 0.01
"""The same where there is hardly any noise: of the mean eigenvalue."""
_SHRINKAGE = 0.5
"""Of what James and Stein take off; whole, it costs AUROC where noise is strong."""
_ROOT = math.sqrt(2)
_FEWEST = 5.0
"""Patients of a class at least, as noise can make any number."""


WHITENING = ("basis", "centre", "matrix")
"""What a whitening is made of."""


@dataclass(frozen=True, eq=False)
class Noised:
    """A sum of rows over sites, with noise.

    Attributes:
      numbers: [m].
      deviation: Of the noise in each of them.
    """

    numbers: Floats
    deviation: float

    def scaled(self, factor: float) -> "Noised":
        """Of the same patients, each counting for so much of one."""
        return Noised(factor * self.numbers, factor * self.deviation)


@dataclass(frozen=True, eq=False)
class Whitening:
    """Features u [d] of length 1 become z = unit(basis @ u), and then unit(matrix @ (z - centre)).

    Attributes:
      basis: [r, d].
      centre: [r].
      matrix: [r, r].
    """

    basis: Floats
    centre: Floats
    matrix: Floats

    @classmethod
    def begin(cls, basis: Floats) -> "Whitening":
        """Before anything is known of the features: z as it is."""
        return cls(basis, np.zeros(len(basis)), np.eye(len(basis)))


def find_basis(classifier: Floats | None, width: int, directions: int, seed: int) -> Floats:
    """Public directions [r, d] in which images differ.

    Those in which the classifier of the backbone's own weights differs most between its classes;
    where it has none, random ones, which do nearly as well.

    Args:
      classifier: Its weights [n, d]; None where there is none.
      width: d.
      directions: r.
      seed: Draws the random ones.
    """
    drawn = np.random.default_rng(seed).normal(size=(directions, width))
    if classifier is not None:
        own = np.linalg.svd(classifier - classifier.mean(axis=0), full_matrices=False)[2]
        drawn[: len(own)] = own[:directions]
    basis: Floats = np.linalg.qr(drawn.T)[0].T
    return basis


def count_moments(directions: int) -> int:
    """How many numbers a row of the first sum has."""
    return directions * (directions + 1) // 2 + directions + 1


def make_moments(z: Tensor) -> Tensor:
    """A row of the first sum: float32, at most `MOMENTS_NORM` long, of features z [r] of length 1.

    The upper triangle of z zᵀ, its off-diagonal numbers times √2; z; and a constant.
    """
    z = z.double()
    outer = torch.outer(z, z) * torch.full((len(z), len(z)), _ROOT).double().fill_diagonal_(1.0)
    above = outer[tuple(torch.triu_indices(len(z), len(z)))]
    return torch.cat([above, _TOTAL * z, torch.tensor([_COUNT]).double()]).float()


def count_prototypes(classes: int, directions: int) -> int:
    """How many numbers a row of the second sum has."""
    return classes * (directions + 1)


def make_prototype(x: Tensor, label: int, classes: int) -> Tensor:
    """A row of the second sum: float32, at most `PROTOTYPES_NORM` long, of whitened x [r].

    In the place of the patient's class x, and a constant.
    """
    row = torch.zeros(classes, len(x) + 1)
    row[label, :-1] = x.float()
    row[label, -1] = _LABEL
    return row.flatten()


def whiten(basis: Floats, moments: Noised) -> Whitening:
    """Take off the mean, and scale to the same spread in all directions as far as noise allows."""
    r = len(basis)
    above, rest = np.split(moments.numbers, [r * (r + 1) // 2])
    number = max(float(rest[-1]) / _COUNT, 10.0)
    second = np.zeros((r, r))
    second[np.triu_indices(r)] = above / number
    second = np.diag(np.diagonal(second)) + (np.triu(second, 1) + np.triu(second, 1).T) / _ROOT
    mean = rest[:-1] / _TOTAL / number
    mean /= max(float(np.linalg.norm(mean)), 1.0)  # as of features of length 1
    values, vectors = np.linalg.eigh(second - np.outer(mean, mean))
    floor = _FLOOR * moments.deviation * math.sqrt(2 * r) / number
    least = _LEAST_SPREAD * max(float(values.mean()), 1e-9)
    roots = (np.maximum(values, 0.0) + max(floor, least)) ** -0.5
    matrix: Floats = (vectors * roots) @ vectors.T
    return Whitening(basis, mean, matrix / np.abs(matrix).max())


def solve_prototypes(prototypes: Noised, classes: int) -> tuple[LinearHead, Floats]:
    """A head that reads whitened features, and about how many patients each class has [K].

    As all directions spread alike, the discriminant of means M is r M x - r |M|² / 2. Classes count
    as equally likely; whose mean is mostly noise is drawn to the mean of all.
    """
    rows = prototypes.numbers.reshape(classes, -1)
    totals, r = rows[:, :-1], rows.shape[1] - 1
    counts = np.maximum(rows[:, -1] / _LABEL, max(_FEWEST, prototypes.deviation / _LABEL))
    means = totals / counts[:, None]
    whole = totals.sum(axis=0) / counts.sum()
    apart = means - whole
    noise = r * (prototypes.deviation / counts) ** 2
    kept = 1 - _SHRINKAGE * noise / np.maximum((apart**2).sum(axis=1), np.finfo(float).tiny)
    means = whole + np.clip(kept, 0.02, 1.0)[:, None] * apart
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1.0)  # as of unit features
    return LinearHead(r * means, -0.5 * r * (means**2).sum(axis=1)), counts
