"""Few seeds are listed; five or more have a mean, and an interval within the figure's range."""

import pytest

from common.metrics.statistics import FEWEST_SEEDS
from simulations.studies.gains import find_gains, judge_gains
from simulations.studies.over_seeds import (
    describe_seeds,
    format_change,
    format_metric,
    join_seeds,
    subtract_seeds,
)

WILD = [0.1, 1.0, 0.9, 1.0, 0.2]


@pytest.mark.parametrize("seeds", range(1, FEWEST_SEEDS))
def test_few_seeds_are_listed_without_an_interval(seeds: int) -> None:
    few = WILD[:seeds]
    assert join_seeds(few).estimate is None
    listed = ", ".join(f"{value:.3f}" for value in few)
    assert format_metric(few, "auroc") == listed
    changes = ", ".join(["+0.000"] * seeds)
    assert format_change(few, few) == f"{listed} ({changes})"


def test_five_seeds_have_an_interval_cut_to_the_range_of_the_metric() -> None:
    assert format_metric(WILD, "auroc") == "0.640 (0.081 to 1.000)"
    assert format_metric(WILD, "loss") == "0.640 (0.081 to 1.199)"
    lower = [value - 0.1 for value in WILD]
    assert format_change(WILD, lower) == "0.640 (+0.100, +0.100 to +0.100)"
    assert format_change(WILD, None) == "0.640 (0.081 to 1.000)"


def test_a_seed_without_a_figure_makes_too_few_of_five() -> None:
    some = [*WILD[:4], None]
    assert format_metric(some, "auroc") == "0.100, 1.000, 0.900, 1.000, –"
    assert subtract_seeds(some, WILD).values == (0, 0, 0, 0, None)
    assert format_metric([None, None], "auroc") == "–"


def test_a_table_says_of_how_many_seeds_it_is() -> None:
    assert "fewer than 5 make no interval" in describe_seeds(2)
    assert describe_seeds(5) == "means of 5 seeds, with 95 % intervals"


def test_no_site_is_judged_by_fewer_than_five_seeds() -> None:
    better, alone = [0.9, 0.92, 0.91, 0.93, 0.9], [0.8, 0.8, 0.81, 0.8, 0.79]
    for seeds in (2, 4, 5):
        ways = {"federated": better[:seeds], "local": alone[:seeds]}
        gains = find_gains({"north": {way: {"auroc": found} for way, found in ways.items()}})
        (gain,) = gains
        assert gain.facts()["values"] == gain.found.values
        lines = judge_gains(gains)
        assert len(lines) == (seeds == 5)
        assert (gain.facts()["estimate"] is None) == (seeds < 5)
    assert lines[0].startswith("north, federated against its own model alone. AUROC: better, +0.1")
