"""Virtual hospitals: one pool of patients cut into sites, alike or not.

`dirichlet` after Hsu, Qi and Brown (arXiv:1909.06335), `label` and `quantity` after Li et al.
(Federated learning on non-IID data silos, ICDE 2022); all by patient instead of by image.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.data.records import Record
from common.errors import StudyError, did_you_mean
from common.support.seeds import derive

Numbers = NDArray[np.int64]
"""One number per patient, [patients]: its label, or the site it goes to."""

KINDS = "iid, dirichlet:<α>, label:<k> or quantity:<α>"


def _iid(labels: Numbers, sites: int, _: float, rng: np.random.Generator) -> Numbers:
    """Sites of equal size, patients at random."""
    return rng.permutation(np.arange(len(labels)) % sites)


def _dirichlet(labels: Numbers, sites: int, alpha: float, rng: np.random.Generator) -> Numbers:
    """Each class is shared out by its own Dir(α): small α, sites that see few classes."""
    chosen = np.empty_like(labels)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members] = _shared(len(members), rng.dirichlet([alpha] * sites))
    return chosen


def _label(labels: Numbers, sites: int, k: float, rng: np.random.Generator) -> Numbers:
    """Each site gets patients of at most k classes."""
    classes, chosen, k = np.unique(labels), np.empty_like(labels), int(k)
    if not len(classes) / sites <= k <= len(classes):
        raise StudyError(
            f"partition label:{k}",
            expected=f"every one of {len(classes)} classes at one of {sites} sites",
            got=f"{k} classes a site",
            remedy=f"Take k from {math.ceil(len(classes) / sites)} to {len(classes)}.",
        )
    order = rng.permutation(classes)
    held = [{order[(site * k + i) % len(order)] for i in range(k)} for site in range(sites)]
    for label in classes:
        members = rng.permutation(np.flatnonzero(labels == label))
        holders = np.array([site for site in range(sites) if label in held[site]])
        chosen[members] = holders[np.arange(len(members)) % len(holders)]
    return chosen


def _quantity(labels: Numbers, sites: int, alpha: float, rng: np.random.Generator) -> Numbers:
    """Alike but of unequal size, by one Dir(α)."""
    return rng.permutation(_shared(len(labels), rng.dirichlet([alpha] * sites)))


def _shared(members: int, shares: NDArray[np.float64]) -> Numbers:
    """`members` places, in a row, to sites by their shares."""
    cuts = np.round(np.cumsum(shares)[:-1] * members)
    return np.searchsorted(cuts, np.arange(members), side="right").astype(np.int64)


@dataclass(frozen=True)
class Partition:
    """The way in which a pool becomes sites: a rule and its one number."""

    rule: Callable[[Numbers, int, float, np.random.Generator], Numbers]
    amount: float = 0.0


def parse_partition(spec: str) -> Partition:
    """Parse the partition that a word such as `dirichlet:0.3` asks for.

    Raises:
      StudyError: no such word, or a number it cannot take.
    """
    rules = {"iid": _iid, "dirichlet": _dirichlet, "label": _label, "quantity": _quantity}
    kind, _, number = spec.partition(":")
    if kind not in rules:
        remedy = did_you_mean(kind, rules)
        raise StudyError("partition", expected=KINDS, got=repr(spec), remedy=remedy)
    if spec == "iid":
        return Partition(_iid)
    try:
        amount = float(int(number)) if kind == "label" else float(number)
    except ValueError:
        amount = math.nan
    if kind == "iid" or not 0 < amount < math.inf:
        raise StudyError("partition", expected=KINDS, got=repr(spec))
    return Partition(rules[kind], amount)


def label_patients(records: Iterable[Record]) -> dict[str, int]:
    """Label each patient by its most frequent label; of equals the lowest."""
    counts: dict[str, Counter[int]] = {}
    for record in records:
        counts.setdefault(record.patient, Counter())[record.label] += 1
    return {
        patient: min(labels, key=lambda label: (-labels[label], label))
        for patient, labels in counts.items()
    }


def cut_patients(labels: Mapping[str, int], sites: int, spec: str, seed: int) -> list[list[str]]:
    """Give every patient to exactly one of `sites` sites, none of them empty.

    Args:
      labels: each patient's label, see `label_patients`.
      sites: how many virtual hospitals.
      spec: `iid`, `dirichlet:<α>`, `label:<k>` or `quantity:<α>`.
      seed: decides the cut, whatever the order of `labels`.

    Returns:
      sorted patient ids, a list per site. A site left empty by its draw gets one patient of the
      largest site.

    Raises:
      StudyError: a bad spec, or more sites than patients.
    """
    chosen = parse_partition(spec)
    if not 1 <= sites <= len(labels):
        expected = f"1 to {len(labels)} sites, one patient at least in each"
        raise StudyError("sites", expected=expected, got=sites)
    patients = sorted(labels)
    rng = np.random.default_rng(derive(seed, "partition"))
    array: Numbers = np.array([labels[patient] for patient in patients], dtype=np.int64)
    site = chosen.rule(array, sites, chosen.amount, rng)
    sizes = np.bincount(site, minlength=sites)
    while not sizes.all():
        site[np.flatnonzero(site == sizes.argmax())[0]] = sizes.argmin()
        sizes = np.bincount(site, minlength=sites)
    return [[patients[i] for i in np.flatnonzero(site == s)] for s in range(sites)]
