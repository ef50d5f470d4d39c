"""Curves are scikit-learn's within a bin, and a chosen threshold keeps what it promised."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch.nn.functional import one_hot

from common.metrics.counts import Counts
from common.metrics.curves import apply_threshold, choose_threshold, net_benefit, roc_curve
from common.metrics.metrics import class_auroc

pytestmark = pytest.mark.numbers


def scores(n: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    noise = torch.randn(n, classes, generator=generator)
    return 1.5 * noise + 1.5 * one_hot(labels, classes), labels


def test_the_roc_curve_is_scikit_learns_and_has_the_area_told() -> None:
    logits, labels = scores(500, 3, 0)
    counts, p = Counts.of(logits, labels), torch.softmax(logits.double(), 1)
    for k in range(3):
        fpr, tpr = roc_curve(counts, k)
        assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
        assert np.trapezoid(tpr, fpr) == pytest.approx(class_auroc(counts, k))
        exact = sk.roc_curve(labels == k, p[:, k], drop_intermediate=False)
        at = np.linspace(0, 1, 50)
        assert np.abs(np.interp(at, fpr, tpr) - np.interp(at, *exact[:2])).max() < 0.02
    assert roc_curve(Counts.zero(3), 0) is None
    assert roc_curve(Counts.of(logits[labels == 0], labels[labels == 0]), 0) is None


def test_net_benefit_is_the_formula_on_the_images() -> None:
    logits, labels = scores(2000, 3, 1)
    counts, p = Counts.of(logits, labels), torch.softmax(logits.double(), 1)[:, 1].numpy()
    own, thresholds = labels.numpy() == 1, [0.05, 0.2, 0.5, 0.9]
    model, everybody = net_benefit(counts, 1, thresholds)
    for t, found, acting in zip(thresholds, model, everybody, strict=True):
        exact = (own & (p >= t)).mean() - (~own & (p >= t)).mean() * t / (1 - t)
        assert found == pytest.approx(exact, abs=0.005)
        assert acting == pytest.approx(own.mean() - (~own).mean() * t / (1 - t))
    assert net_benefit(Counts.zero(3), 1, thresholds) is None


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("wanted", [0.5, 0.9, 1.0])
def test_a_threshold_reaches_the_sensitivity_that_was_asked(scale: float, wanted: float) -> None:
    logits, labels = scores(400, 3, 2)
    logits, own = logits * scale, (labels == 2).numpy()
    validation = Counts.of(logits, labels)
    threshold = choose_threshold(validation, 2, wanted)
    tp, fn, fp, tn = apply_threshold(validation, 2, threshold)
    assert tp + fn == own.sum()
    assert fp + tn == (~own).sum()
    assert tp >= wanted * own.sum()
    called = torch.softmax(logits.double(), 1)[:, 2].numpy() >= threshold
    assert tp == (called & own).sum()
    assert fp == (called & ~own).sum()
    if scale < 100:  # beyond, probabilities are 1 for many
        higher = apply_threshold(validation, 2, threshold + 0.01)
        assert higher.tp < wanted * own.sum() or higher.fp < fp
    if scale == 1:
        assert tp <= wanted * own.sum() + 2
    assert choose_threshold(Counts.zero(3), 2, wanted) is None
