"""Calibration is the exact one."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from common.metrics.calibration import calibration
from common.metrics.counts import Counts

pytestmark = pytest.mark.numbers


def scores(n: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    noise = torch.randn(n, classes, generator=generator)
    return 1.5 * noise + 1.5 * one_hot(labels, classes), labels


def counted(n: int, classes: int, seed: int) -> Counts:
    return Counts.of(*scores(n, classes, seed))


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
    logits, labels = scores(3000, classes, 3)
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
    logits, labels = scores(300, 2, 0)
    padded = torch.cat([logits, torch.full((300, 1), -50.0)], dim=1)
    without, padded_one = (calibration(Counts.of(z, labels)) for z in (logits, padded))
    assert without is not None
    assert padded_one is not None
    assert padded_one.error == pytest.approx(without.error, abs=1e-9)
    assert not math.isnan(padded_one.error)


def test_calibration_is_of_the_images_with_scores() -> None:
    one, other = counted(120, 3, 0), counted(90, 3, 1)
    withheld = other.coarse(other.confusion, 1.0)
    assert calibration(withheld) is None
    assert calibration(one + withheld).error == pytest.approx(calibration(one).error)
