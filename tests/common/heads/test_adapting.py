"""A site's own fit: the federated head unless its own cross-validation prefers another."""

import numpy as np
import pytest

from common.heads.adapting import FITS, Fit, OwnImages, adapt_head, solve_local
from common.heads.registry import solve_discriminant
from common.heads.sums import Sums, balance, map_features

pytestmark = pytest.mark.numbers

CLASSES, WIDTH = 3, 12
CENTRES = 0.7 * np.random.default_rng(1).normal(size=(CLASSES, WIDTH))


def images(seed: int, counts: tuple[int, ...], moved: float = 0.0) -> OwnImages:
    """Normal classes; a site whose classes lie elsewhere has other means, each its own way."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), counts)
    apart = moved * np.random.default_rng(seed + 1).normal(size=(CLASSES, WIDTH))
    x = (CENTRES + apart)[labels] + 1.5 * rng.normal(size=(len(labels), WIDTH))
    return OwnImages([map_features(x, None)], labels, np.arange(len(labels)))


WEIGHTS = balance(np.array([500.0, 500, 500]))
OTHERS = images(0, (400, 400, 400)).sums(WEIGHTS)


def test_folds_are_of_patients_and_hold_every_image_once() -> None:
    own = images(2, (20, 20, 20))
    own = OwnImages(own.views, own.labels, np.arange(60) // 3)
    masks = list(own.folds(seed=7))
    assert (sum(mask.astype(int) for mask in masks) == 1).all()
    for mask in masks:
        assert not set(own.patients[mask]) & set(own.patients[~mask])
    again = list(own.folds(seed=7))
    assert all((a == b).all() for a, b in zip(masks, again, strict=True))


def test_a_site_that_gains_nothing_keeps_the_federated_head() -> None:
    own = images(3, (4, 4, 4))
    total = OTHERS + own.sums(WEIGHTS)
    adapted = adapt_head(total, own, 0.2, seed=0)
    assert (adapted.head is None) == (adapted.fit == Fit())
    assert max(s or 0 for s in adapted.scores.values()) == (adapted.scores[adapted.fit] or 0)


def test_a_site_whose_classes_look_otherwise_is_fitted() -> None:
    whole = images(5, (180, 180, 180), 2.0)
    parts = [np.arange(len(whole.labels)) % 2 == k for k in (0, 1)]
    own, later = (
        OwnImages([whole.views[0][at]], whole.labels[at], whole.patients[at]) for at in parts
    )
    total = OTHERS + own.sums(WEIGHTS)
    adapted = adapt_head(total, own, 0.2, seed=0)
    assert adapted.head is not None
    assert adapted.fit.pull
    federated = solve_discriminant(total, 0.2)

    def right(weight: np.ndarray, bias: np.ndarray) -> float:
        return float(((later.views[0] @ weight.T + bias).argmax(1) == later.labels).mean())

    assert right(adapted.head.weight, adapted.head.bias) > right(federated.weight, federated.bias)


def test_what_is_left_out_of_a_fold_is_out_of_all_sums() -> None:
    """By brute force: the federated head of a fold is solved from all other images alone."""
    own = images(6, (10, 10, 10))
    total = OTHERS + own.sums(WEIGHTS)
    mask = next(own.folds(seed=1))
    rest = OwnImages([own.views[0][~mask]], own.labels[~mask], own.patients[~mask])
    direct, taken = OTHERS + rest.sums(WEIGHTS), total - own.sums(WEIGHTS, mask)
    for name in ("counts", "totals", "second"):
        assert np.allclose(getattr(direct, name), getattr(taken, name), atol=1e-12)


def test_views_count_as_one_image() -> None:
    one = images(8, (5, 5, 5))
    thrice = OwnImages([*one.views * 3], one.labels, one.patients)
    for name in ("counts", "totals", "second"):
        assert np.allclose(getattr(one.sums(WEIGHTS), name), getattr(thrice.sums(WEIGHTS), name))


@pytest.mark.parametrize("counts", [(1, 0, 0), (30, 0, 0), (1, 1, 1), (3, 40, 0), (200, 1, 0)])
def test_few_images_or_classes_give_a_head_all_the_same(counts: tuple[int, ...]) -> None:
    own = images(9, counts)
    adapted = adapt_head(OTHERS + own.sums(WEIGHTS), own, 0.2, seed=0)
    local, _ = solve_local(own, CLASSES, seed=0)
    for head in (adapted.head or local, local):
        assert np.isfinite(head.weight).all()
        assert np.isfinite(head.bias).all()
    assert set(adapted.scores) == set(FITS)


def test_a_class_that_nobody_has_is_never_called() -> None:
    own = images(10, (40, 40, 0))
    weights = balance(np.array([40.0, 40, 0]))
    total: Sums = own.sums(weights) + own.sums(weights)
    head = adapt_head(total, own, 0.2, seed=0).head or solve_discriminant(total, 0.2)
    assert ((own.views[0] @ head.weight.T + head.bias).argmax(1) < 2).all()


def test_more_images_than_features_and_fewer_are_both_solved_alone() -> None:
    for counts in ((2, 2, 2), (100, 100, 100)):
        own = images(11, counts)
        head, strength = solve_local(own, CLASSES, seed=3)
        assert 0 < strength < 1
        assert head.weight.shape == (CLASSES, WIDTH)
