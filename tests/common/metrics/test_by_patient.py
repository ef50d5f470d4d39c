"""Evidence of a site: by patient, paired, and the same after JSON."""

import json
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from common.metrics import by_patient
from common.metrics.by_patient import Evidence, compare_ways
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value

pytestmark = pytest.mark.numbers

WAYS = {"federated": 1.6, "local": 1.0}
PAIR = ("federated", "local")


def draw_site(
    patients: int,
    classes: int = 3,
    *,
    seed: int,
    images: tuple[int, int] = (1, 9),
    signal: float = 1.0,
) -> by_patient.Tested:
    """A site with so many images a patient, which are alike in half of their variance."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(patients), rng.integers(images[0], images[1] + 1, patients))
    labels = rng.integers(0, classes, patients)[owner]
    shape = (len(owner), classes)
    alike = 0.7 * rng.normal(size=(patients, classes))[owner] + 0.5 * rng.normal(size=shape)
    told = signal * np.eye(classes)[labels]
    logits = {way: alike + 0.5 * rng.normal(size=shape) + more * told for way, more in WAYS.items()}
    return by_patient.Tested(labels, owner, logits, logits)


@pytest.mark.parametrize("select", METRICS)
def test_figures_are_those_of_counts_and_differences_are_paired(select: str) -> None:
    tested = draw_site(60, seed=0)
    found = compare_ways(tested, select, [PAIR], seed=1, draws=100)
    assert found.images == len(tested.labels)
    assert found.patients == 60
    labels = torch.from_numpy(tested.labels)
    for way, logits in tested.logits.items():
        counts = Counts.of(torch.from_numpy(logits), labels)
        for name in (select, "auroc"):
            estimate = found.figures[way][name]
            assert estimate.value == pytest.approx(value(counts, name))
            assert estimate.low < estimate.value < estimate.high
    (pair,) = found.pairs
    first, second = (found.figures[way]["auroc"] for way in PAIR)
    difference = pair.differences["auroc"]
    assert difference.value == pytest.approx(first.value - second.value)
    wide = np.hypot(first.high - first.low, second.high - second.low)
    assert difference.high - difference.low < 0.8 * wide
    right = {way: z.argmax(1) == tested.labels for way, z in tested.logits.items()}
    assert pair.joint.both + pair.joint.only_first == right["federated"].sum()
    assert pair.joint.both + pair.joint.only_second == right["local"].sum()
    assert sum(pair.joint) == found.images


def test_evidence_is_the_same_after_json_and_for_the_same_seed() -> None:
    tested = draw_site(30, seed=2)
    first, again, other = (
        compare_ways(tested, "f1", [PAIR], seed=seed, draws=50) for seed in (1, 1, 2)
    )
    assert Evidence.read(json.loads(json.dumps(first.facts()))) == first == again != other


def test_a_patient_with_many_images_widens_an_interval() -> None:
    tested = draw_site(60, seed=3, images=(6, 6))
    alone = replace(tested, patients=np.arange(len(tested.labels)))
    wide, narrow = (
        compare_ways(t, "accuracy", [], seed=0, draws=300).figures["local"]["accuracy"]
        for t in (tested, alone)
    )
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def test_undefined_figures_stay_undefined() -> None:
    logits = {"local": np.random.default_rng(0).normal(size=(20, 3))}
    tested = by_patient.Tested(np.zeros(20, np.int64), np.arange(20), logits, logits)
    found = compare_ways(tested, "balanced_accuracy", [], seed=0, draws=20)
    assert found.figures["local"]["auroc"] is None
    assert found.figures["local"]["balanced_accuracy"] is not None
    assert Evidence.read(found.facts()) == found
    nothing = by_patient.Tested(
        np.zeros(0, np.int64), np.zeros(0, np.int64), *[{"local": np.zeros((0, 3))}] * 2
    )
    assert compare_ways(nothing, "f1", [], seed=0).figures["local"] == {"f1": None, "auroc": None}


def delong(scores: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs of scores [ways, n], and their covariance (DeLong 1988; Sun and Xu 2014)."""
    positive, negative = scores[:, own], scores[:, ~own]
    m, n = positive.shape[1], negative.shape[1]
    ranks = stats.rankdata(np.concatenate([positive, negative], axis=1), axis=1)
    above = (ranks[:, :m] - stats.rankdata(positive, axis=1)) / n
    below = 1 - (ranks[:, m:] - stats.rankdata(negative, axis=1)) / m
    return above.mean(axis=1), np.cov(above) / m + np.cov(below) / n


def test_the_standard_error_of_an_auroc_is_delongs() -> None:
    tested = draw_site(1000, 2, seed=5, images=(1, 1))
    scores = np.stack([tested.logits[way] @ [-1, 1] for way in PAIR])
    areas, covariance = delong(scores, tested.labels == 1)
    found = compare_ways(tested, "auroc", [PAIR], seed=0)
    for way, area, variance in zip(PAIR, areas, covariance.diagonal(), strict=True):
        estimate = found.figures[way]["auroc"]
        assert estimate.value == pytest.approx(area, abs=0.001)
        assert (estimate.high - estimate.low) / 3.92 == pytest.approx(variance**0.5, rel=0.06)
    difference, contrast = found.pairs[0].differences["auroc"], np.array([1, -1])
    error = (contrast @ covariance @ contrast) ** 0.5
    assert (difference.high - difference.low) / 3.92 == pytest.approx(error, rel=0.06)


def test_a_site_free_of_errors_has_intervals_with_a_width() -> None:
    tested = draw_site(40, seed=6)
    sure = {way: z + 50 * np.eye(3)[tested.labels] for way, z in tested.logits.items()}
    found = compare_ways(
        replace(tested, logits=sure, scores=sure), "balanced_accuracy", [PAIR], seed=0, draws=50
    )
    for name, estimate in found.figures["local"].items():
        assert estimate.value == estimate.high == 1
        assert 0.8 < estimate.low < 0.95, name
    for estimate in found.pairs[0].differences.values():
        assert -0.1 < estimate.low < 0 == estimate.value < estimate.high


# --- coverage ---


def measure_coverage(site: dict[str, Any], *, times: int = 400) -> dict[tuple[str, str], float]:
    """How often nominal 95 % intervals hold the truth, of so many sites drawn.

    Returns:
      The share, by what was resampled (patients or images) and by figure.
    """
    names, hits = ("balanced_accuracy", "auroc"), defaultdict(list)
    many = draw_site(**site | {"patients": 20_000}, seed=0)
    truth = {
        way: [
            value(Counts.of(torch.from_numpy(z), torch.from_numpy(many.labels)), n) for n in names
        ]
        for way, z in many.logits.items()
    }
    for seed in range(1, times + 1):
        tested = draw_site(**site, seed=seed)
        alone = replace(tested, patients=np.arange(len(tested.labels)))
        for unit, each in (("patient", tested), ("image", alone)):
            found = compare_ways(each, names[0], [PAIR], seed=seed, draws=100)
            for at, name in enumerate(names):
                first, second = (truth[way][at] for way in PAIR)
                shown = found.figures["federated"][name]
                difference = found.pairs[0].differences[name]
                hits[unit, name].append(shown.low <= first <= shown.high)
                covers = difference.low <= first - second <= difference.high
                hits[unit, f"{name}, difference"].append(covers)
    return {key: float(np.mean(found)) for key, found in hits.items()}


@pytest.mark.parametrize("select", ["balanced_accuracy", "loss"])
def test_five_patients_decide_nothing(select: str) -> None:
    """All for one of two ways: 2⁻⁴ of equal ways do so by chance, and that is more than 5 %."""
    for patients, sure in ((3, False), (5, False), (8, True)):
        labels = np.arange(patients) % 2
        logits = {way: k * np.eye(2)[labels] for way, k in zip(PAIR, (1.0, -1.0), strict=True)}
        tested = by_patient.Tested(labels, np.arange(patients), logits, logits)
        (pair,) = compare_ways(tested, select, [PAIR], seed=1, draws=100).pairs
        for found in pair.differences.values():
            assert found is not None
            assert (found.low <= 0 <= found.high) != sure


SITES = {
    "30 patients": {"patients": 30},
    "30 patients with one image each": {"patients": 30, "images": (1, 1)},
    "30 patients, two classes, few errors": {"patients": 30, "classes": 2, "signal": 1.5},
    "100 patients, five classes": {"patients": 100, "classes": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_intervals_by_patient_cover(site: str) -> None:
    coverage = measure_coverage(SITES[site])
    alone = SITES[site].get("images") == (1, 1)
    for (unit, figure), share in coverage.items():
        print(f"{site}; by {unit}; {figure}: {share:.3f}")  # noqa: T201
        if unit == "patient" or alone:
            assert share >= 0.93, figure
        else:  # images of a patient are alike
            assert share < coverage["patient", figure] - 0.02, figure
    assert alone or min(coverage.values()) < 0.85
