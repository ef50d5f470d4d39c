"""What a site says it tells, what that comes down to in a study, and which tells less."""

import itertools

import pytest

from common.protocol.disclosure import Disclosure

EXACT = Disclosure(counts="exact")
ROUNDED = Disclosure(counts="rounded")
NONE = Disclosure(counts="none", metrics="none")
EVERY = [
    Disclosure(counts=counts, metrics=metrics, min_cell=cell, epsilon=epsilon)
    for counts in ("exact", "rounded", "none")
    for metrics in ("every_round", "final", "none")
    for cell in (1, 5, 50)
    for epsilon in (None, 1.0)
]


def of_base(base: int) -> Disclosure:
    return Disclosure(counts="exact", min_cell=base)


def test_what_numbers_are_multiples_of() -> None:
    assert (EXACT.base, ROUNDED.base, of_base(25).base) == (1, 10, 25)
    assert Disclosure(counts="rounded", min_cell=5).base == 10  # never finer than rounded
    assert Disclosure(counts="rounded", min_cell=25).base == 25
    assert EXACT.tells_scores
    assert not ROUNDED.tells_scores


# --- what a study comes down to ---


@pytest.mark.parametrize("private", [False, True])
def test_metrics_are_made_of_counts_and_wait_under_privacy(*, private: bool) -> None:
    for given_ in EVERY:
        resolved = given_.resolved(private=private)
        assert resolved.within(given_)
        assert resolved == resolved.resolved(private=private)
        if given_.counts == "none":
            assert resolved.metrics == "none"
        elif private or not given_.tells_scores:  # a bounded answer is told once
            assert resolved.metrics != "every_round"
        else:
            assert resolved == given_.model_copy(update={"sums": resolved.sums})


def test_who_does_not_say_tells_exactly_unless_in_privacy() -> None:
    assert Disclosure().resolved(private=False).counts == "exact"
    private = Disclosure().resolved(private=True)
    assert (private.counts, private.metrics, private.base) == ("rounded", "final", 10)
    assert Disclosure(counts="exact").resolved(private=True).counts == "exact"


def test_with_an_epsilon_nothing_is_told_of_held_out_patients_but_noise() -> None:
    noised = Disclosure(counts="exact", epsilon=0.5).resolved(private=False)
    assert (noised.metrics, noised.tells, noised.tells_held_out) == ("final", True, False)
    assert not noised.tells_scores
    assert noised.within(Disclosure(counts="exact"))
    assert noised.within(Disclosure(counts="exact", epsilon=1.0))
    assert not Disclosure(counts="exact").within(noised)
    assert not Disclosure(counts="exact", epsilon=1.0).within(noised)
    assert Disclosure(counts="none", epsilon=0.5).resolved(private=False).epsilon is None


def test_within_orders_by_what_is_told() -> None:
    for one, other in itertools.product(EVERY, EVERY):
        if one.within(other):
            assert one.tells <= other.tells
            if one.tells:
                assert one.base >= other.base
                assert one.epsilon is not None or other.epsilon is None
            ranks = [("every_round", "final", "none").index(d.metrics) for d in (one, other)]
            assert ranks[0] >= ranks[1]
        if one.within(other) and other.within(one) and one.counts != "none":
            assert (one.base, one.epsilon) == (other.base, other.epsilon)
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
    noised = Disclosure(counts="exact", epsilon=0.5).resolved(private=False)
    assert noised.withheld == (
        "figures of single rounds, scores, losses, and counts without noise (ε 0.5)"
    )


def test_sums_hold_exact_numbers_so_who_rounds_tells_none_unless_he_says_so() -> None:
    def sums(**said: object) -> object:
        return Disclosure.model_validate(said).resolved(private=False).sums

    assert sums() == sums(counts="exact") == 10
    assert sums(counts="rounded") == sums(counts="none") == sums(min_cell=5) == "none"
    assert sums(counts="rounded", sums=20) == 20
    assert sums(sums="none") == "none"
