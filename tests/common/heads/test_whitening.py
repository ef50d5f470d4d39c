"""The head of two noised sums: rows of bounded length, whitening, prototypes."""

import math

import numpy as np
import pytest
import torch

from common.heads.whitening import (
    MOMENTS_NORM,
    PROTOTYPES_NORM,
    Noised,
    Whitening,
    count_moments,
    count_prototypes,
    find_basis,
    make_moments,
    make_prototype,
    solve_prototypes,
    whiten,
)

pytestmark = pytest.mark.numbers

R, K = 6, 3
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(4000, R)) * np.array([3.0, 1, 1, 0.5, 0.3, 0.3]) + 0.5
LABELS = RNG.integers(0, K, len(FEATURES))
FEATURES += np.eye(K, R)[LABELS]
FEATURES /= np.linalg.norm(FEATURES, axis=1, keepdims=True)
BASIS = np.eye(R)


def add(rows: list[torch.Tensor], deviation: float = 0.0, seed: int = 1) -> Noised:
    numbers = torch.stack(rows).double().sum(0).numpy()
    noise = deviation * np.random.default_rng(seed).normal(size=numbers.shape)
    return Noised(numbers + noise, deviation)


def moments(deviation: float = 0.0) -> Noised:
    return add([make_moments(torch.from_numpy(z)) for z in FEATURES], deviation)


def read(whitening: Whitening, z: np.ndarray) -> np.ndarray:
    x = (z - whitening.centre) @ whitening.matrix.T
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def prototypes(whitening: Whitening, deviation: float = 0.0) -> Noised:
    x = torch.from_numpy(read(whitening, FEATURES))
    return add([make_prototype(x[i], int(LABELS[i]), K) for i in range(len(x))], deviation)


@pytest.mark.parametrize("size", [1.0, 0.999, 0.0])
def test_a_row_is_no_longer_than_its_sensitivity_says(size: float) -> None:
    for z in size * FEATURES[:200]:
        assert make_moments(torch.from_numpy(z)).double().norm() <= MOMENTS_NORM * (1 + 1e-6)
        row = make_prototype(torch.from_numpy(z), 2, K)
        assert row.double().norm() <= PROTOTYPES_NORM * (1 + 1e-6)
    assert len(make_moments(torch.from_numpy(FEATURES[0]))) == count_moments(R)
    assert len(row) == count_prototypes(K, R)


def test_moments_without_noise_whiten_as_the_covariance_does() -> None:
    whitening = whiten(BASIS, moments())
    assert np.allclose(whitening.centre, FEATURES.mean(axis=0), atol=1e-6)
    spread = np.cov((FEATURES - whitening.centre) @ whitening.matrix.T, rowvar=False)
    spread /= np.trace(spread) / R
    least = np.linalg.eigvalsh(np.cov(FEATURES, rowvar=False)).min()
    assert least > 0.01
    assert np.allclose(spread, np.eye(R), atol=0.4)  # all but the floor under small eigenvalues
    assert np.abs(whitening.matrix).max() == 1.0


def test_prototypes_without_noise_find_every_class_and_its_number() -> None:
    whitening = whiten(BASIS, moments())
    head, counts = solve_prototypes(prototypes(whitening), K)
    assert np.allclose(counts, np.bincount(LABELS), rtol=1e-5)
    decided = (read(whitening, FEATURES) @ head.weight.T + head.bias).argmax(axis=1)
    assert (decided == LABELS).mean() > 0.5  # 0.33 by chance


def test_noise_costs_accuracy_and_breaks_nothing() -> None:
    right = []
    for deviation in (1.0, 30.0, 1e4):
        whitening = whiten(BASIS, moments(deviation))
        head, counts = solve_prototypes(prototypes(whitening, deviation), K)
        decided = (read(whitening, FEATURES) @ head.weight.T + head.bias).argmax(axis=1)
        right.append((decided == LABELS).mean())
        assert np.isfinite(head.weight).all()
        assert (counts > 0).all()
        assert np.abs(head.weight).max() <= 1e4
    assert right[0] > right[1] > 0.35
    assert right[0] > right[2]


@pytest.mark.parametrize("huge", [1e9, -1e9])
def test_whatever_a_site_sends_gives_a_head_that_can_travel(huge: float) -> None:
    whitening = whiten(BASIS, Noised(np.full(count_moments(R), huge), 1.0))
    assert np.isfinite(whitening.matrix).all()
    assert np.abs(whitening.matrix).max() <= 1
    head, counts = solve_prototypes(Noised(np.full(count_prototypes(K, R), huge), 1.0), K)
    assert np.isfinite(counts).all()
    assert np.abs(head.weight).max() <= 1e4
    assert np.abs(head.bias).max() <= 1e4


@pytest.mark.parametrize("rows", [None, 2, 40])
def test_a_basis_is_of_so_many_directions_at_right_angles(rows: int | None) -> None:
    classifier = None if rows is None else RNG.normal(size=(rows, 20))
    basis = find_basis(classifier, 20, 8, seed=3)
    assert basis.shape == (8, 20)
    assert np.allclose(basis @ basis.T, np.eye(8))
    assert np.array_equal(basis, find_basis(classifier, 20, 8, seed=3))
    if rows == 40:
        own = np.linalg.svd(classifier - classifier.mean(0))[2][:8]
        assert math.isclose(np.linalg.norm(basis @ own.T), math.sqrt(8), rel_tol=1e-9)
