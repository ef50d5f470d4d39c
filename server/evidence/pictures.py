"""The pictures of a report: whom federating helped, and how the released model does."""

from collections.abc import Iterator

from common.metrics.metrics import value
from common.page.blocks import Figure
from common.page.plots_of_counts import (
    plot_confusion,
    plot_decision_curves,
    plot_reliability,
    plot_roc,
)
from common.page.plots_of_rounds import plot_learning
from common.page.plots_of_sites import plot_cross_sites, plot_differences, plot_estimates
from common.protocol.evidence import LOCAL
from server.evidence.facts import RunFacts
from server.evidence.performance import OVERALL, Estimates
from server.evidence.verdicts import list_gains
from server.runs.results import FEDERATED


def draw_gains(facts: RunFacts, estimates: Estimates) -> Iterator[Figure]:
    """Draw whom federating helped, and how each way of training does at each site."""
    select = facts.study.select
    by_way = {
        way: {
            None if site == OVERALL else site: found[way][select]
            for site, found in estimates.items()
            if way in found
        }
        for way in facts.results
    }
    yield from _there(
        plot_differences(list_gains(facts), select, (facts.own_way, LOCAL), "test patients"),
        plot_estimates(by_way, select, "test patients"),
        _draw_cross(facts),
    )


def draw_released(facts: RunFacts) -> Iterator[Figure]:
    """Draw how the released model does on the test images of all sites."""
    study, of = facts.study, "the released model on test images"
    counts = facts.united[FEDERATED]
    yield from _there(
        plot_confusion(counts, study.classes, of),
        plot_roc(counts, study.classes, of),
        plot_reliability(counts, study.classes, of, seed=study.seed),
        plot_decision_curves(counts, study.classes, of),
    )


def draw_rounds(facts: RunFacts) -> Iterator[Figure]:
    """Draw how the released model was found."""
    rows = [{**line, "loss": line["train_loss"]} for line in facts.history]
    yield from _there(plot_learning(rows, facts.study.select, facts.study.name))


def _draw_cross(facts: RunFacts) -> Figure | None:
    """Each site's own model, and the released one, on the test patients of every site."""
    if not facts.cross:
        return None
    select, ways = facts.study.select, {**facts.cross, FEDERATED: facts.results[FEDERATED]}
    matrix = {
        trained: {site: value(counts, select) for site, counts in at.items()}
        for trained, at in ways.items()
    }
    return plot_cross_sites(matrix, select, "one site's model on test patients of another")


def _there(*figures: Figure | None) -> Iterator[Figure]:
    yield from (figure for figure in figures if figure is not None)
