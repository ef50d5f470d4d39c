"""How models compare arrives as it was told, if it is something that the counts beside it allow."""

import math

import numpy as np
import pytest
from flwr.app import RecordDict

from common.errors import ContractError
from common.metrics.by_patient import Tested, compare_ways
from common.metrics.counts import Answers
from common.protocol.disclosure import Disclosure
from common.protocol.evidence import (
    EVIDENCE,
    FEDERATED,
    LOCAL,
    PAIRS,
    read_evidence,
    tells_evidence,
    write_evidence,
)

WAYS = (FEDERATED, "adapted", LOCAL)
JOINT, GAIN = "adapted-local joint", "adapted-local auroc"


def make_tested(classes=3, images=40):
    rng = np.random.default_rng(1)
    labels = np.arange(images) % classes
    right = np.eye(classes)[labels]
    logits = {w: right + k + rng.normal(size=right.shape) for k, w in enumerate(WAYS)}
    return Tested(labels, np.arange(images) // 2, logits, logits)


TESTED = make_tested()
COUNTS = {w: Answers.of(z, z, TESTED.labels).count() for w, z in TESTED.logits.items()}
FOUND = compare_ways(TESTED, "balanced_accuracy", PAIRS, seed=1, draws=100)


def sent(spoil=lambda told: None):
    told = write_evidence(FOUND, COUNTS)
    spoil(told)
    return RecordDict({EVIDENCE: told})


def read(record, select="balanced_accuracy"):
    return read_evidence(record, COUNTS, select, FOUND.patients)


def test_it_arrives_with_three_decimals_of_its_intervals():
    told = read(sent())
    assert (told.images, told.patients) == (FOUND.images, FOUND.patients) == (40, 20)
    for pair, found in zip(told.pairs, FOUND.pairs, strict=True):
        assert pair.joint == found.joint
        for metric, estimate in pair.differences.items():
            known = found.differences[metric]
            assert estimate.value == pytest.approx(known.value)
            assert known.low - 0.001 <= estimate.low <= known.low
            assert known.high <= estimate.high <= known.high + 0.001
            assert estimate.low == round(estimate.low, 3)


def put(key, value):
    return lambda told: told.__setitem__(key, value)


SPOILT = {
    "a field too few": lambda told: told.pop(JOINT),
    "a field too many": put("adapted-pooled auroc", [0.0, 0.1]),
    "images that are not there": lambda told: told.__setitem__(
        JOINT, [n + (k == 3) for k, n in enumerate(told[JOINT])]
    ),
    "another number right": lambda told: told.__setitem__(
        JOINT, [told[JOINT][0] + 1, told[JOINT][1] - 1, *told[JOINT][2:]]
    ),
    "a negative cell": lambda told: told.__setitem__(
        JOINT, [n + d for n, d in zip(told[JOINT], (50, -50, -50, 50), strict=True)]
    ),
    "three cells": put(JOINT, [1, 2, 3]),
    "no whole numbers": put(JOINT, [1.0, 2.0, 3.0, 4.0]),
    "a number": put(JOINT, 4),
    "no number": put(GAIN, [math.nan, math.nan]),
    "an infinite end": put(GAIN, [-math.inf, math.inf]),
    "beyond the range": put(GAIN, [-1.5, 0.9]),
    "ends the other way": put(GAIN, [0.9, -0.9]),
    "beside the value": put(GAIN, [0.998, 0.999]),
    "one end": put(GAIN, [0.1]),
    "whole ends": put(GAIN, [0, 1]),
    "an interval below 0": put("local auroc", [-0.1, 0.9]),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_the_counts_do_not_allow_is_refused(what):
    with pytest.raises(ContractError):
        read(sent(SPOILT[what]))


def test_it_is_of_the_studys_own_metric():
    with pytest.raises(ContractError, match="other fields"):
        read(sent(), select="accuracy")


@pytest.mark.parametrize(
    ("disclosure", "patients", "tells"),
    [
        (Disclosure(counts="exact"), 3, True),
        (Disclosure(counts="exact"), 2, False),
        (Disclosure(counts="exact", min_cell=5), 30, False),
        (Disclosure(counts="exact", epsilon=1.0), None, False),
        (Disclosure(counts="rounded"), 30, False),
    ],
)
def test_only_exact_counts_of_three_patients_are_compared(disclosure, patients, tells):
    assert tells_evidence(disclosure.resolved(private=False), patients) == tells
