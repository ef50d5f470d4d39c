"""Rounded numbers add up, are right on average, and tell next to nothing of one patient."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.privacy.rounding import Rounding
from common.metrics.counts import BINS, Counts
from common.metrics.metrics import METRICS, value

SECRET = bytes(range(32))
SECRETS = st.binary(min_size=32, max_size=32)
bases = st.integers(2, 40)
rows = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 300)), min_size=2, max_size=7)
tables = st.integers(2, 5).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 60), min_size=k, max_size=k), min_size=k, max_size=k)
)


def confusion(cells: Sequence[Sequence[int]]) -> Counts:
    """Counts of these cells, with scores and a loss to match."""
    table = np.array(cells, np.int64)
    positive, negative = (np.zeros((len(table), BINS), np.int64) for _ in range(2))
    positive[:, 1100] = table.sum(axis=1)
    negative[:, 900] = table.sum() - table.sum(axis=1)
    return Counts(table, positive, negative, float(table.sum()) / 3, np.diagonal(table).copy())


def secret(k: int) -> bytes:
    return k.to_bytes(32, "big")


# --- what is told adds up ---


@given(SECRETS, bases, st.integers(0, 10**9))
def test_a_number_is_told_as_a_multiple_next_to_it(key: bytes, base: int, n: int) -> None:
    told = Rounding(key, base).round_number(n, "patients", "test")
    assert told % base == 0
    assert abs(told - n) < base


@given(SECRETS, bases, rows)
def test_classes_are_multiples_next_to_the_truth_that_add_up(
    key: bytes, base: int, images: list[int]
) -> None:
    rounding = Rounding(key, base)
    told = rounding.round_images(images, "test")
    assert all(n % base == 0 for n in told)
    assert all(abs(n - m) < base for n, m in zip(told, images, strict=True))
    assert sum(told) == rounding.round_number(sum(images), "images", "test")
    assert told == Rounding(key, base).round_images(images, "test")  # asked again: the same
    assert rounding.round_images(told, "test") == told


@given(SECRETS, bases, tables)
def test_the_confusion_matrix_adds_up_to_the_classes(
    key: bytes, base: int, cells: list[list[int]]
) -> None:
    rounding, counts = Rounding(key, base), confusion(cells)
    told = rounding.round_counts(counts, "test", "model")
    assert (told.confusion % base == 0).all()
    assert (abs(told.confusion - counts.confusion) < base).all()
    images = rounding.round_images([sum(row) for row in cells], "test")
    assert tuple(told.confusion.sum(axis=1)) == images
    for again in (counts, told):  # asked again, or of what was told: the same
        assert rounding.round_counts(again, "test", "model").sparse() == told.sparse()


@given(bases, tables)
def test_scores_are_withheld_where_cells_are(base: int, cells: list[list[int]]) -> None:
    """Losses too: a model made for it would put the number of images of a class into them."""
    told = Rounding(bytes(32), base).round_counts(confusion(cells), "test", "model")
    assert not told.positive.any()
    assert not told.negative.any()
    assert told.loss_sum == 0
    assert value(told, "auroc") is None
    assert value(told, "loss") is None


def test_all_is_told_at_base_one() -> None:
    counts = Counts.of(torch.randn(9, 3), torch.arange(9) % 3)
    rounding = Rounding(bytes(32), 1)
    assert rounding.round_counts(counts, "test", "model") is counts
    assert rounding.round_number(53, "patients", "test") == 53
    assert rounding.round_images((3, 24, 26), "test") == (3, 24, 26)


# --- coins ---


@pytest.mark.parametrize("n", [1, 4, 9, 13])
def test_a_number_is_right_on_average_over_sites(n: int) -> None:
    told = [Rounding(secret(k), 10).round_number(n, "patients", "test") for k in range(4000)]
    assert np.mean(told) == pytest.approx(n, abs=0.4)  # five deviations of the mean


def test_cells_are_right_on_average_over_models() -> None:
    """But for what the total rounded away: here the row is a multiple."""
    cells = [[3, 13, 4, 0], [0, 0, 0, 0], [7, 7, 6, 20], [0, 0, 0, 10]]
    rounding = Rounding(secret(1), 10)
    told = [
        rounding.round_counts(confusion(cells), "test", f"model {k}").confusion for k in range(3000)
    ]
    assert np.mean(told, axis=0) == pytest.approx(np.array(cells), abs=0.5)


def test_the_coins_of_one_model_say_nothing_of_those_of_another() -> None:
    cells = [[5, 5], [5, 5]]
    ups = [
        Rounding(secret(7), 10).round_counts(confusion(cells), "test", f"{k}").confusion[0, 0]
        for k in range(1000)
    ]
    pairs = Counter(itertools.pairwise(ups))
    assert all(180 < count < 320 for count in pairs.values())
    assert len(pairs) == 4


@pytest.mark.parametrize("present", [True, False])
def test_a_threshold_finds_no_patient(present: bool) -> None:
    """Models that differ on one patient alone, whose other cells the attacker knows exactly.

    Rounding to the nearest multiple told the patient's presence with certainty: the attacker moves
    the cell to the edge, by known patients, and sees a whole multiple more or less.
    """
    edge = [[4 + present, 6], [3, 7]]
    told = [
        Rounding(secret(k), 10).round_counts(confusion(edge), "test", "a").confusion[0, 0] == 10
        for k in range(3000)
    ]
    # 4 and 5 in 10: told alike but for one answer in ten, whichever it is.
    assert np.mean(told) == pytest.approx(0.5 if present else 0.4, abs=0.06)


@given(SECRETS, bases, rows, st.data())
def test_one_patient_changes_what_is_told_of_a_part_by_one_base(
    key: bytes, base: int, images: list[int], data: st.DataObject
) -> None:
    more = list(images)
    more[data.draw(st.integers(0, len(images) - 1))] += 1
    rounding = Rounding(key, base)
    before, after = (rounding.round_number(sum(n), "images", "test") for n in (images, more))
    assert after - before in (0, base)


# --- what cannot be derived ---


def sums(cells: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Every cell, and every sum of some of them."""
    for size in range(1, len(cells) + 1):
        for some in itertools.combinations(range(len(cells)), size):
            yield some, sum(cells[i] for i in some)


def derived(base: int, cells: int, tell: object) -> list[object]:
    """Which cells or sums from 1 to below `base` are certain, given all that is told of them.

    Over every world there is whose told cells are at most two bases: whoever knows how numbers are
    rounded can do no better than to list the worlds that would be told in just this way.
    """
    possible: dict[object, dict[object, set[int]]] = defaultdict(lambda: defaultdict(set))
    for world in itertools.product(range(3 * base), repeat=cells):
        told = tell(world)  # type: ignore[operator]
        if max(told) <= 2 * base:
            for some, total in sums(world):
                possible[told][some].add(total)
    assert len(possible) > 3
    return [
        (told, some, found)
        for told, by_sum in possible.items()
        for some, found in by_sum.items()
        if len(found) == 1 and 1 <= min(found) < base
    ]


@pytest.mark.parametrize(("base", "classes"), [(2, 2), (3, 2), (7, 2), (2, 3), (3, 3), (5, 3)])
def test_no_small_class_follows_from_all_that_is_told(base: int, classes: int) -> None:
    """Nor any small sum of classes, so neither does a complement: what all but some classes hold.

    All that is told is the classes, whose sum is the total.
    """
    assert (
        derived(base, classes, lambda world: Rounding(SECRET, base).round_images(world, "test"))
        == []
    )


@pytest.mark.parametrize("base", [2, 3])
def test_no_small_cell_follows_from_all_that_is_told(base: int) -> None:
    def tell(cells: tuple[int, ...]) -> tuple[int, ...]:
        counts = confusion([cells[:2], cells[2:]])
        told = Rounding(SECRET, base).round_counts(counts, "test", "model")
        return tuple(told.confusion.ravel().tolist())

    assert derived(base, 4, tell) == []


def test_figures_of_sites_with_and_without_scores_add_up() -> None:
    """Metrics of cells count all images, those of scores only the images that have them."""
    one, other = (
        Counts.of(torch.randn(40, 2, generator=torch.Generator().manual_seed(i)), labels)
        for i, labels in enumerate((torch.arange(40) % 2, torch.arange(40) // 20))
    )
    told = Rounding(SECRET, 10).round_counts(other, "test", "model")
    together = one + told
    for name in METRICS:
        of_scores = name in ("auroc", "loss")
        assert (value(told, name) is None) == of_scores
        if of_scores:
            assert value(together, name) == value(one, name)
    assert together.n == one.n + told.n
