"""What a site tells of its patients adds up, and says nothing exact about few of them."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.metrics.metrics import BINS, METRICS, Counts, value
from common.protocol.disclosure import Disclosure

EXACT = Disclosure(counts="exact")
ROUNDED = Disclosure(counts="rounded")
NONE = Disclosure(counts="none", metrics="none")
EVERY = [
    Disclosure(counts=counts, metrics=metrics, min_cell=cell)
    for counts in ("exact", "rounded", "none")
    for metrics in ("every_round", "final", "none")
    for cell in (1, 5, 50)
]


def of_base(base: int) -> Disclosure:
    return Disclosure(counts="exact", min_cell=base)


def confusion(cells: Sequence[Sequence[int]]) -> Counts:
    """Counts of these cells, with scores and a loss to match."""
    table = np.array(cells, np.int64)
    positive, negative = (np.zeros((len(table), BINS), np.int64) for _ in range(2))
    positive[:, 1100] = table.sum(axis=1)
    negative[:, 900] = table.sum() - table.sum(axis=1)
    return Counts(table, positive, negative, float(table.sum()) / 3)


def told_rows(disclosure: Disclosure, images: Sequence[int]) -> tuple[int, ...]:
    told = disclosure.numbers(images)
    assert told is not None
    return told


bases = st.integers(2, 40)
rows = st.lists(st.one_of(st.integers(0, 12), st.integers(0, 300)), min_size=2, max_size=7)
tables = st.integers(2, 5).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 60), min_size=k, max_size=k), min_size=k, max_size=k)
)


# --- rounding ---


def test_what_each_level_tells() -> None:
    images = (3, 24, 26)
    assert (EXACT.number(53), EXACT.numbers(images)) == (53, images)
    assert (ROUNDED.number(53), ROUNDED.numbers(images)) == (50, (0, 20, 30))
    assert (NONE.number(53), NONE.numbers(images)) == (None, None)
    assert of_base(25).numbers(images) == (0, 25, 25)
    assert Disclosure(counts="rounded", min_cell=5).base == 10  # never finer than rounded
    assert Disclosure(counts="rounded", min_cell=25).base == 25


@given(bases, st.integers(0, 10**9))
def test_a_number_is_told_as_the_nearest_multiple(base: int, n: int) -> None:
    told = of_base(base).number(n)
    assert told is not None
    assert told % base == 0
    assert abs(told - n) <= base / 2


@given(bases, rows)
def test_classes_are_multiples_next_to_the_truth_that_add_up(base: int, images: list[int]) -> None:
    told = told_rows(of_base(base), images)
    assert all(n % base == 0 for n in told)
    assert all(abs(n - m) < base for n, m in zip(told, images, strict=True))
    assert sum(told) == of_base(base).number(sum(images))
    assert told == told_rows(of_base(base), images)  # nothing is drawn, so nothing averages out
    assert told_rows(of_base(base), told) == told


@given(bases, tables)
def test_the_confusion_matrix_adds_up_to_the_classes(base: int, cells: list[list[int]]) -> None:
    disclosure, counts = of_base(base), confusion(cells)
    told = disclosure.coarse(counts)
    assert (told.confusion % base == 0).all()
    assert (abs(told.confusion - counts.confusion) < base).all()
    assert tuple(told.confusion.sum(axis=1)) == told_rows(disclosure, [sum(row) for row in cells])
    # Again, or of what was told: the same.
    for again in (disclosure.coarse(confusion(cells)), disclosure.coarse(told)):
        assert again.sparse() == told.sparse()


@given(bases, tables)
def test_scores_are_withheld_where_cells_are(base: int, cells: list[list[int]]) -> None:
    """Losses too: a model made for it would put the number of images of a class into them."""
    told = of_base(base).coarse(confusion(cells))
    assert not told.positive.any()
    assert not told.negative.any()
    assert told.loss_sum == 0
    assert value(told, "auroc") is None
    assert value(told, "loss") is None


def test_all_is_told_at_base_one() -> None:
    counts = Counts.of(torch.randn(9, 3), torch.arange(9) % 3)
    assert EXACT.coarse(counts) is counts
    assert EXACT.tells_scores
    assert not ROUNDED.tells_scores


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
    assert derived(base, classes, of_base(base).numbers) == []


@pytest.mark.parametrize("base", [2, 3])
def test_no_small_cell_follows_from_all_that_is_told(base: int) -> None:
    def tell(cells: tuple[int, ...]) -> tuple[int, ...]:
        told = of_base(base).coarse(confusion([cells[:2], cells[2:]]))
        return tuple(told.confusion.ravel().tolist())

    assert derived(base, 4, tell) == []


@settings(max_examples=300)
@given(st.integers(2, 12), st.lists(st.integers(0, 60), min_size=2, max_size=6), st.data())
def test_who_knows_all_other_classes_but_one_still_cannot_tell(
    base: int, images: list[int], data: st.DataObject
) -> None:
    """Another number of patients in a small class would be told in the same way."""
    at = data.draw(st.integers(0, len(images) - 1))
    images[at] = data.draw(st.integers(1, base - 1))
    told = told_rows(of_base(base), images)
    assert any(
        told_rows(of_base(base), other) == told
        for other in _others(images, at, base)
        if other[at] != images[at]
    )


def _others(images: Sequence[int], at: int, base: int) -> Iterator[list[int]]:
    """Worlds that differ in one class, or in that and one more."""
    for n in sorted(range(base + 1), key=lambda n: abs(n - images[at])):
        changed = [*images[:at], n, *images[at + 1 :]]
        yield changed
        for more in range(len(images)):
            for by in range(-base, base + 1) if more != at else ():
                other = [m + by * (i == more) for i, m in enumerate(changed)]
                if min(other) >= 0:
                    yield other


def test_the_difference_of_total_and_other_classes_is_the_class_as_told() -> None:
    """Each rounded on its own, 97 and 94 would be 100 and 90: so the other class has somebody."""
    told = told_rows(ROUNDED, (94, 3))
    assert told == (100, 0)
    total = ROUNDED.number(97)
    assert total is not None
    assert total - told[0] == told[1]
    assert told == told_rows(ROUNDED, (96, 1)) == told_rows(ROUNDED, (97, 0))


# --- what a study comes down to ---


@pytest.mark.parametrize("private", [False, True])
def test_metrics_are_made_of_counts_and_wait_under_privacy(*, private: bool) -> None:
    for given_ in EVERY:
        resolved = given_.resolved(private=private)
        assert resolved.within(given_)
        assert resolved == resolved.resolved(private=private)
        if given_.counts == "none":
            assert resolved.metrics == "none"
        elif private:
            assert resolved.metrics != "every_round"
        else:
            assert resolved == given_


def test_who_does_not_say_tells_exactly_unless_in_privacy() -> None:
    assert Disclosure().resolved(private=False).counts == "exact"
    private = Disclosure().resolved(private=True)
    assert (private.counts, private.metrics, private.base) == ("rounded", "final", 10)
    assert Disclosure(counts="exact").resolved(private=True).counts == "exact"


def test_within_orders_by_what_is_told() -> None:
    for one, other in itertools.product(EVERY, EVERY):
        if one.within(other):
            assert other.number(7) is not None or one.number(7) is None
            if one.number(7) is not None:
                assert one.base >= other.base
            ranks = [("every_round", "final", "none").index(d.metrics) for d in (one, other)]
            assert ranks[0] >= ranks[1]
        if one.within(other) and other.within(one) and one.counts != "none":
            assert one.base == other.base
            assert (one.counts, one.metrics) == (other.counts, other.metrics)
    assert all(one.within(one) and NONE.within(one) and one.within(EXACT) for one in EVERY)
    assert not EXACT.within(of_base(2))
    assert not ROUNDED.within(Disclosure(counts="rounded", min_cell=11))
    assert not EXACT.within(Disclosure(counts="exact", metrics="final"))


def test_what_is_missing_is_told_in_words() -> None:
    assert EXACT.withheld == ""
    assert NONE.withheld == "all figures"
    assert Disclosure(counts="rounded", metrics="none").withheld == "all figures"
    final = Disclosure(counts="exact", metrics="final")
    assert final.withheld == "figures of single rounds"
    both = Disclosure(counts="rounded", metrics="final", min_cell=20)
    assert both.withheld == (
        "figures of single rounds, scores, losses, and numbers finer than multiples of 20"
    )


def test_figures_of_sites_with_and_without_scores_add_up() -> None:
    """Metrics of cells count all images, those of scores only the images that have them."""
    one, other = (
        Counts.of(torch.randn(40, 2, generator=torch.Generator().manual_seed(i)), labels)
        for i, labels in enumerate((torch.arange(40) % 2, torch.arange(40) // 20))
    )
    told = ROUNDED.coarse(other)
    together = one + told
    for name in METRICS:
        of_scores = name in ("auroc", "loss")
        assert (value(told, name) is None) == of_scores
        if of_scores:
            assert value(together, name) == value(one, name)
    assert together.n == one.n + told.n
