"""Evidence of a site: by patient, paired, and the same after JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from common.metrics import by_patient
from common.metrics.by_patient import Evidence, compare_ways, mcnemar
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value

pytestmark = pytest.mark.numbers

WAYS = {"federated": 1.6, "local": 1.0}
PAIR = ("federated", "local")


def draw_site(
    patients: int, classes: int = 3, *, seed: int, images: tuple[int, int] = (1, 9)
) -> by_patient.Tested:
    """A site with so many images a patient, which are alike in half of their variance."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(patients), rng.integers(images[0], images[1] + 1, patients))
    labels = rng.integers(0, classes, patients)[owner]
    alike = rng.normal(size=(patients, classes))[owner] + rng.normal(size=(len(owner), classes))
    logits = {
        way: 0.6 * alike + 0.5 * rng.normal(size=alike.shape) + signal * np.eye(classes)[labels]
        for way, signal in WAYS.items()
    }
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


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(3, 12) == pytest.approx(stats.binomtest(3, 15).pvalue) == mcnemar(12, 3)
