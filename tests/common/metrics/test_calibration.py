"""Calibration is the exact one, and tells chance from a model that is too sure."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import one_hot

from common.metrics.calibration import (
    brier_interval,
    calibration,
    calibration_slope,
    expected_error_if_perfect,
)
from common.metrics.counts import Counts
from common.metrics.metrics import brier_score
from tests.builders import count_scores, draw_scores

pytestmark = pytest.mark.numbers


def exact_error(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> float:
    probability = torch.softmax(logits.double(), 1).numpy()
    errors = []
    for k in range(logits.shape[1]):
        p, true = probability[:, k], labels.numpy() == k
        group = np.minimum((p * bins).astype(int), bins - 1)
        gaps = [abs(true[group == b].sum() - p[group == b].sum()) for b in range(bins)]
        errors.append(sum(gaps) / len(p))
    return float(np.mean(errors))


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("scale", [0.3, 1.0, 10.0])
def test_calibration_is_the_exact_one(classes: int, scale: float) -> None:
    logits, labels = draw_scores(3000, classes, 3)
    found = calibration(Counts.of(logits * scale, labels))
    assert found is not None
    assert found.error == pytest.approx(exact_error(logits * scale, labels, 10), abs=0.005)
    assert found.images.sum(axis=1).tolist() == [3000] * classes
    filled = found.images > 0
    for part in (found.predicted, found.observed):
        assert ((part[filled] >= 0) & (part[filled] <= 1)).all()
        assert np.isnan(part[~filled]).all()


def test_calibration_tells_honest_from_overconfident() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 2, generator=generator)
    labels = torch.bernoulli(torch.softmax(logits, 1)[:, 1], generator=generator).long()
    honest = calibration(Counts.of(logits, labels))
    loud = calibration(Counts.of(4 * logits, labels))
    assert honest is not None
    assert loud is not None
    assert honest.error < 0.02
    assert loud.error > 0.15
    assert calibration(Counts.zero(2)) is None


def test_calibration_leaves_out_a_class_without_images() -> None:
    logits, labels = draw_scores(300, 2, 0)
    padded = torch.cat([logits, torch.full((300, 1), -50.0)], dim=1)
    without, padded_one = (calibration(Counts.of(z, labels)) for z in (logits, padded))
    assert without is not None
    assert padded_one is not None
    assert padded_one.error == pytest.approx(without.error, abs=1e-9)
    assert not math.isnan(padded_one.error)


def test_calibration_is_of_the_images_with_scores() -> None:
    one, other = count_scores(120, 3, 0), count_scores(90, 3, 1)
    withheld = other.coarse(other.confusion, 1.0)
    assert calibration(withheld) is None
    assert calibration(one + withheld).error == pytest.approx(calibration(one).error)


def perfect(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and classes drawn from just their probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, 3, generator=generator)
    drawn = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)
    return logits, drawn[:, 0]


def test_the_error_of_a_perfect_model_is_what_chance_makes_of_it() -> None:
    shown = [calibration(Counts.of(*perfect(150, seed))) for seed in range(40)]
    counts = Counts.of(*perfect(150, 99))
    expected = expected_error_if_perfect(counts, seed=0)
    assert expected == expected_error_if_perfect(counts, seed=0)
    assert expected == pytest.approx(np.mean([each.error for each in shown]), rel=0.1)
    assert expected > 0.03
    squares = np.mean([each.debiased**2 for each in shown])
    assert squares < 0.5 * np.mean([each.error for each in shown]) ** 2
    assert expected_error_if_perfect(Counts.zero(3), seed=0) is None


def test_the_debiased_error_does_not_hang_on_the_number_of_images() -> None:
    logits, labels = perfect(60_000, 0)
    truth = calibration(Counts.of(2.5 * logits, labels)).debiased
    parts = zip((2.5 * logits).split(300), labels.split(300), strict=True)
    few = [calibration(Counts.of(*part)) for part in parts]
    assert np.mean([c.debiased**2 for c in few]) == pytest.approx(truth**2, rel=0.05)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 30.0])
def test_the_slope_is_scikit_learns(scale: float) -> None:
    logits, labels = perfect(800, 1)
    p = torch.softmax(logits.double(), 1).numpy()
    for k in range(3):
        given = scale * logit(p[:, k])
        two = torch.from_numpy(np.stack([0 * given, given], axis=1))
        own = labels == k
        found = calibration_slope(Counts.of(two, own.long()), 1)
        exact = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
        exact.fit(given[:, None] / scale, own)
        slope, intercept = exact.coef_[0, 0] / scale, exact.intercept_[0]
        assert found == pytest.approx((slope, intercept), rel=0.02, abs=0.01)
        assert found[0] == pytest.approx(1 / scale, rel=0.2)


def test_a_slope_that_has_no_end_is_undefined() -> None:
    apart = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    for counts in (
        Counts.of(apart, labels),
        Counts.of(-apart, labels),
        Counts.of(apart * 0, labels),
        Counts.of(apart[:2], labels[:2]),
        Counts.zero(2),
    ):
        assert calibration_slope(counts, 0) is None
    wild = torch.tensor([[700.0, 0.0], [0.0, 700.0], [0.0, 1e-3], [1e-3, 0.0]])
    slope, intercept = calibration_slope(Counts.of(wild, torch.tensor([0, 1, 0, 1])), 0)
    assert 0 < slope < 10
    assert abs(intercept) < 0.1


@pytest.mark.parametrize("classes", [2, 5])
def test_the_brier_interval_is_that_of_the_images(classes: int) -> None:
    logits, labels = draw_scores(400, classes, 0)
    squares = (torch.softmax(logits.double(), 1) - one_hot(labels, classes)).square().sum(1).numpy()
    counts = Counts.of(logits, labels)
    found = brier_interval(counts)
    assert found.value == brier_score(counts)
    half = 1.96 * squares.std(ddof=1) / math.sqrt(400)
    assert found.high - found.value == pytest.approx(half, rel=0.05)
    assert found.value - found.low == pytest.approx(half, rel=0.05)
    assert brier_interval(Counts.zero(classes)) is None
    assert brier_interval(Counts.of(logits[:2] * 0, labels[:2])).low >= 0
