"""Intervals cover, and t quantiles are scipy's."""

import numpy as np
import pytest
import torch
from scipy import stats

from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, npv, ppv, sensitivity, specificity, value
from common.metrics.statistics import (
    _t,
    class_shares,
    difference,
    gap_closed,
    intervals,
    t_interval,
    wilson,
)
from tests.builders import count_scores, draw_scores

pytestmark = pytest.mark.numbers


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("classes", [2, 4])
def test_an_interval_is_as_wide_as_resampling_the_images(name: str, classes: int) -> None:
    logits, labels = draw_scores(240, classes, 1)
    counts, rng = Counts.of(logits, labels), np.random.default_rng(0)
    groups = [np.flatnonzero(labels.numpy() == k) for k in range(classes)]
    exact = []
    for _ in range(400):
        rows = np.concatenate([rng.choice(group, len(group)) for group in groups])
        exact.append(value(Counts.of(logits[rows], labels[rows]), name))
    low, high = np.quantile(np.array(exact, float), (0.025, 0.975))
    found = intervals(counts, [name], seed=0, draws=400)[name]
    assert found is not None
    assert found.value == value(counts, name)
    assert found.low < found.value < found.high
    ratio = (found.high - found.low) / (high - low)
    slack = 0.25 if name == "auroc" and classes > 2 else 0.15
    assert 1 - slack < ratio < 1.15, ratio


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth = value(count_scores(100_000, 2, 999), "auroc")
    hits = 0
    for seed in range(60):
        found = intervals(count_scores(120, 2, seed), ["auroc"], seed=seed, draws=100)["auroc"]
        hits += found is not None and found.low <= truth <= found.high
    assert 52 <= hits <= 60


def test_intervals_follow_the_seed_and_shrink_with_images() -> None:
    small, large = count_scores(100, 3, 0), count_scores(1600, 3, 0)
    names = list(METRICS)
    first = intervals(small, names, seed=1, draws=100)
    assert first == intervals(small, names, seed=1, draws=100)
    assert first != intervals(small, names, seed=2, draws=100)
    for name, wide in first.items():
        narrow = intervals(large, [name], seed=1, draws=100)[name]
        assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)


def test_undefined_figures_have_no_interval() -> None:
    assert intervals(Counts.zero(3), list(METRICS), seed=0, draws=10) == dict.fromkeys(METRICS)
    one = Counts.of(torch.randn(20, 3), torch.zeros(20, dtype=torch.long))
    found = intervals(one, ["auroc", "accuracy"], seed=0, draws=10)
    assert found["auroc"] is None
    assert found["accuracy"] is not None
    assert intervals(one, [], seed=0, draws=10) == {}


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 30), (30, 30), (7, 9), (450, 1000)])
def test_wilson_is_scipys(successes: int, n: int) -> None:
    exact = stats.binomtest(successes, n).proportion_ci(method="wilson")
    found = wilson(successes, n)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-6)
    assert found.value == successes / n
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_shares_of_a_class_have_a_width_where_nothing_went_wrong() -> None:
    assert wilson(0, 0) is None
    counts = Counts.of(torch.eye(3)[[0, 0, 1, 1, 0]], torch.tensor([0, 0, 1, 1, 1]))
    found = class_shares(counts)
    assert {name: [e and e.value for e in shares] for name, shares in found.items()} == {
        name: [of(counts, k) for k in range(3)]
        for name, of in {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ppv": ppv,
            "npv": npv,
        }.items()
    }
    assert found["sensitivity"][0].low == pytest.approx(wilson(2, 2).low)
    assert found["sensitivity"][0].low < found["sensitivity"][0].high == 1
    assert found["sensitivity"][2] is None
    withheld = counts.coarse(counts.confusion, 1.0)
    assert class_shares(withheld)["ppv"] == [None] * 3


@pytest.mark.parametrize("freedom", [*range(1, 41), 100, 1000, 10**6])
def test_t_quantiles_are_scipys(freedom: int) -> None:
    assert _t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4)


def test_t_interval_is_scipys() -> None:
    values = [0.71, 0.74, 0.69, 0.78, 0.73]
    found = t_interval([*values, None])
    assert found is not None
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((0.73, low, high), abs=1e-4)
    wild = t_interval([0.2, 0.9], METRICS["auroc"].range)
    assert (wild.low, wild.high) == (0, 1)
    assert t_interval([2.0, 9.0], METRICS["loss"].range).high > 9
    assert t_interval([0.7]) is None
    assert t_interval([0.7, None]) is None
    assert t_interval([]) is None


def test_a_difference_is_paired_by_seed() -> None:
    a, b = [0.60, 0.75, 0.90, None, 0.3], [0.58, 0.74, 0.87, 0.1, None]
    found = difference(a, b)
    assert found is not None
    assert found.value == pytest.approx(0.02)
    assert 0 < found.high - found.low < 0.06
    unpaired = t_interval(a[:3])
    assert unpaired is not None
    assert unpaired.high - unpaired.low > 0.5
    with pytest.raises(ValueError, match="zip"):
        difference([0.1, 0.2], [0.1])


def test_gap_closed() -> None:
    assert gap_closed("auroc", local=0.6, federated=0.75, pooled=0.8) == pytest.approx(0.75)
    assert gap_closed("loss", local=1.0, federated=0.7, pooled=0.6) == pytest.approx(0.75)
    assert gap_closed("auroc", local=0.6, federated=0.5, pooled=0.8) == pytest.approx(-0.5)
    assert gap_closed("auroc", local=0.8, federated=0.9, pooled=0.8) is None
    assert gap_closed("auroc", local=0.8, federated=0.9, pooled=0.7) is None
    assert gap_closed("loss", local=0.6, federated=0.7, pooled=1.0) is None
    for hole in ("local", "federated", "pooled"):
        known = {"local": 0.1, "federated": 0.2, "pooled": 0.3}
        assert gap_closed("auroc", **(known | {hole: None})) is None


# --- where scores are withheld ---


def test_without_scores_the_other_intervals_stay() -> None:
    counts = count_scores(120, 3, 0)
    withheld = counts.coarse(counts.confusion, 1.0)
    found = intervals(withheld, list(METRICS), seed=0, draws=50)
    assert {name for name, estimate in found.items() if estimate} == {
        "accuracy",
        "balanced_accuracy",
        "f1",
    }


def test_auroc_is_of_the_images_with_scores() -> None:
    one, other = count_scores(120, 3, 0), count_scores(90, 3, 1)
    together = one + other.coarse(other.confusion, 1.0)
    found = intervals(together, ["auroc", "accuracy", "loss"], seed=0, draws=50)
    assert found["accuracy"].value == value(one + other, "accuracy")
    for name in ("auroc", "loss"):
        alone = intervals(one, [name], seed=0, draws=200)[name]
        assert found[name].value == alone.value
        assert found[name].high - found[name].low == pytest.approx(alone.high - alone.low, rel=0.3)
