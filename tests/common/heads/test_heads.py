"""A head solved from sums over sites is the head of all images together, whatever the split."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.study import Model
from common.heads.registry import HEADS, LinearHead
from common.heads.sums import Sums, balance, map_features
from common.metrics.counts import Floats, Ints

WIDTH, CLASSES, IMAGES = 24, 4, 300


def draw(seed: int = 0, images: int = IMAGES) -> tuple[Floats, Ints]:
    """Features of classes that differ in mean and size, mapped; and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(CLASSES, images, p=(0.6, 0.25, 0.1, 0.05))
    means = 1.5 * rng.normal(size=(CLASSES, WIDTH))
    features = means[labels] + rng.normal(size=(images, WIDTH)) * np.linspace(0.5, 2, WIDTH)
    return map_features(features, features.mean(axis=0)), labels


def solve(name: str, parts: Sequence[tuple[Floats, Ints]], strength: float) -> LinearHead:
    counts = sum(np.bincount(labels, minlength=CLASSES) for _, labels in parts)
    weights = balance(np.asarray(counts, np.float64))
    total = Sums.zero(WIDTH, weights)
    for features, labels in parts:
        total += Sums.of(features, labels, weights)
    return HEADS[name].solve(total, strength)


def apart(a: LinearHead, b: LinearHead) -> float:
    """The largest difference of two heads, relative to the largest number."""
    whole = max(np.abs(a.weight).max(), np.abs(a.bias).max())
    return float(max(np.abs(a.weight - b.weight).max(), np.abs(a.bias - b.bias).max()) / whole)


def right(head: LinearHead, features: Floats, labels: Ints) -> float:
    called = (features @ head.weight.T + head.bias).argmax(axis=1)
    return float(np.mean([(called[labels == k] == k).mean() for k in np.unique(labels)]))


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=IMAGES, max_size=IMAGES), st.randoms())
def test_any_partition_in_any_order_gives_the_pooled_head(name, sites, random) -> None:
    features, labels = draw()
    at = np.array(sites)
    parts = [(features[at == site], labels[at == site]) for site in range(6)]
    random.shuffle(parts)
    strength = HEADS[name].default
    assert apart(solve(name, parts, strength), solve(name, [(features, labels)], strength)) < 1e-9


@pytest.mark.parametrize("name", HEADS)
def test_one_class_a_site_gives_the_pooled_head(name: str) -> None:
    features, labels = draw()
    parts = [(features[labels == k], labels[labels == k]) for k in range(CLASSES)]
    for strength in HEADS[name].strengths:
        pooled = solve(name, [(features, labels)], strength)
        assert apart(solve(name, parts, strength), pooled) < 1e-9


@pytest.mark.parametrize("name", HEADS)
def test_a_site_that_drops_out_leaves_the_head_of_the_others(name: str) -> None:
    features, labels = draw()
    weights = balance(np.bincount(labels, minlength=CLASSES).astype(np.float64))
    whole, part = Sums.of(features, labels, weights), Sums.of(features[:90], labels[:90], weights)
    others = Sums.of(features[90:], labels[90:], weights)
    strength = HEADS[name].default
    solved = [HEADS[name].solve(sums, strength) for sums in (whole - part, others)]
    assert apart(*solved) < 1e-9


@pytest.mark.parametrize("name", HEADS)
def test_a_class_that_nobody_has_is_never_called(name: str) -> None:
    features, labels = draw()
    some = labels != 2
    head = solve(name, [(features[some], labels[some])], HEADS[name].default)
    assert np.isfinite(head.weight).all()
    assert np.abs(head.weight).max() <= 1e4
    assert not ((features @ head.weight.T + head.bias).argmax(axis=1) == 2).any()


@pytest.mark.parametrize("name", HEADS)
def test_it_decides_well_and_rare_classes_count(name: str) -> None:
    features, labels = draw(images=2000)
    head = solve(name, [(features[:1000], labels[:1000])], HEADS[name].default)
    assert right(head, features[1000:], labels[1000:]) > 0.8


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("images", [1, 3, 10])
def test_fewer_images_than_features_are_solved_too(name: str, images: int) -> None:
    features, labels = draw(images=images)
    for strength in HEADS[name].strengths:
        head = solve(name, [(features, labels)], strength)
        assert np.isfinite(head.weight).all()
        assert np.isfinite(head.bias).all()


def test_the_discriminant_is_the_textbooks() -> None:
    """By hand: class means, the mean of class covariances, Fisher's rule with equal priors."""
    features, labels = draw()
    head = solve("discriminant", [(features, labels)], 0.1)
    means = np.array([features[labels == k].mean(axis=0) for k in range(CLASSES)])
    within = np.mean([np.cov(features[labels == k].T, bias=True) for k in range(CLASSES)], axis=0)
    shrunk = 0.9 * within + 0.1 * np.trace(within) / WIDTH * np.eye(WIDTH)
    weight = means @ np.linalg.inv(shrunk)
    assert np.allclose(head.weight, weight)
    assert np.allclose(head.bias, -0.5 * (means * weight).sum(axis=1))


def test_ridge_is_weighted_least_squares() -> None:
    features, labels = draw()
    head = solve("ridge", [(features, labels)], 1e-9)
    weights = balance(np.bincount(labels, minlength=CLASSES).astype(np.float64))[labels]
    design = np.c_[features, np.ones(len(features))] * np.sqrt(weights)[:, None]
    target = np.eye(CLASSES)[labels] * np.sqrt(weights)[:, None]
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    assert np.allclose(head.weight, found[:-1].T, atol=1e-5)
    assert np.allclose(head.bias, found[-1], atol=1e-5)


def test_features_that_are_no_numbers_count_as_nothing() -> None:
    features = np.array([[3.0, 4.0], [np.nan, 1.0], [np.inf, 1.0], [0.0, 0.0]])
    assert map_features(features, None).tolist() == [[0.6, 0.8], [0, 0], [0, 0], [0, 0]]
    assert map_features(features[:1], np.array([3.0, 3.0])).tolist() == [[0.0, 1.0]]


def test_balanced_classes_count_the_same() -> None:
    weights = balance(np.array([10.0, 0.0, 40.0]))
    assert weights.tolist() == [0.05, 0.0, 0.0125]


def test_a_study_can_name_exactly_these_heads() -> None:
    named = get_args(Model.model_fields["head"].annotation)
    assert set(named) == {"linear", *HEADS}
