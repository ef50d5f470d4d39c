"""The figures of a run on test patients: tables with intervals, and pictures."""

from collections.abc import Iterator, Mapping, Sequence

from common.metrics.by_patient import Joint
from common.metrics.calibration import (
    brier_interval,
    calibration,
    calibration_slope,
    expected_error_if_perfect,
)
from common.metrics.counts import Counts
from common.metrics.curves import apply_threshold, choose_threshold
from common.metrics.metrics import (
    METRICS,
    brier_score,
    value,
)
from common.metrics.statistics import Estimate, intervals, wilson
from common.page.blocks import Table
from common.page.tables import format_estimate, format_figure, tabulate_classes
from server.evidence.facts import RunFacts
from server.runs.results import FEDERATED, compute_calibration_error

OVERALL = "overall"
_DRAWS = 200
_SENSITIVITIES = (0.8, 0.9, 0.95)
_RANKS = "auroc"


Estimates = Mapping[str, Mapping[str, Mapping[str, Estimate | None]]]
"""Site, or `overall` → way of training → metric → its figure with an interval."""


def estimate_figures(facts: RunFacts) -> Estimates:
    """Estimate the study's metric, and AUROC beside it, of every way of training at every site.

    By patient where a site tells that; else by image.
    """
    names = list(dict.fromkeys((facts.study.select, _RANKS)))
    return {
        site: {way: _estimate(facts, site, way, counts, names) for way, counts in ways.items()}
        for site, ways in _by_site(facts).items()
    }


def tabulate_sites(facts: RunFacts, estimates: Estimates) -> Table:
    """Every way of training at every site, with intervals."""
    names = list(dict.fromkeys((facts.study.select, _RANKS)))
    rows = [
        [
            "" if i else site,
            way,
            f"about {max(counts.n, 0)}" if counts.noise else str(counts.n),
            *(format_estimate(estimates[site][way][name]) for name in names),
            *map(format_figure, (value(counts, "accuracy"), brier_score(counts))),
            format_figure(compute_calibration_error(counts)),
        ]
        for site, ways in _by_site(facts).items()
        for i, (way, counts) in enumerate(ways.items())
    ]
    labels = [METRICS[name].label for name in names]
    heads = ("site", "trained", "test images", *labels, "accuracy", "Brier score", "ECE")
    caption = "Test patients; 95 % intervals, by patient where the site tells them, else by image"
    return Table(heads, rows, left=2, caption=caption)


def tabulate_pairs(facts: RunFacts) -> Iterator[Table]:
    """On how many images of the same patients each of two ways is right, over sites that tell."""
    pairs = [pair for found in facts.evidence.values() for pair in found.pairs]
    joints: dict[tuple[str, str], list[Joint]] = {}
    for pair in pairs:
        joints.setdefault((pair.first, pair.second), []).append(pair.joint)
    rows = [
        [*ways, *map(str, map(sum, zip(*found, strict=True)))] for ways, found in joints.items()
    ]
    if rows:
        heads = ("first", "second", "both right", "only the first", "only the second", "neither")
        yield Table(heads, rows, left=2, caption="Test images of all sites, by which way is right")


def show_classes(facts: RunFacts) -> Iterator[Table]:
    """How the released model calls each class, over all sites."""
    counts = facts.united[FEDERATED]
    if counts.n <= 0:
        return
    of = "The released model on test images of all sites"
    yield tabulate_classes(counts, facts.study.classes, of)
    yield from _tabulate_thresholds(facts)
    yield from _tabulate_calibration(facts, counts)


def _tabulate_thresholds(facts: RunFacts) -> Iterator[Table]:
    """What thresholds of probability give on test images that were chosen on validation images."""
    counts = facts.united[FEDERATED]
    rows = [
        [name, f"{wanted:.0%}", f"{threshold:.4f}", *_judge_threshold(counts, k, threshold)]
        for k, name in enumerate(facts.study.classes)
        for wanted in _SENSITIVITIES
        if counts.positive[k].any()
        and (threshold := choose_threshold(facts.validation, k, wanted)) is not None
    ]
    if rows:
        heads = ("class", "sensitivity wanted", "threshold", "sensitivity", "specificity")
        about = f"chosen on {facts.validation.n} validation images, tried on test images"
        yield Table(heads, rows, caption=f"Operating points of the released model: {about}")


def _judge_threshold(counts: Counts, k: int, threshold: float) -> list[str]:
    cells = apply_threshold(counts, k, threshold)
    found = wilson(cells.tp, cells.tp + cells.fn), wilson(cells.tn, cells.tn + cells.fp)
    return [format_estimate(share) for share in found]


def _tabulate_calibration(facts: RunFacts, counts: Counts) -> Iterator[Table]:
    """How true the released model's probabilities are, where scores are told."""
    found = calibration(counts)
    if found is None:
        return
    perfect = expected_error_if_perfect(counts, seed=facts.study.seed)
    rows = [
        ["Brier score (0 is perfect)", format_estimate(brier_interval(counts))],
        ["calibration error (ECE, by class)", format_figure(found.error)],
        ["that of a perfect model on so few images", format_figure(perfect)],
        ["root mean square error, without chance", format_figure(found.debiased)],
    ]
    for k, name in enumerate(facts.study.classes):
        slope, at = calibration_slope(counts, k) or (None, None)
        rows.append(
            [
                f"{name}: slope and intercept (1 and 0)",
                f"{format_figure(slope)}, {format_figure(at)}",
            ]
        )
    yield Table(("probabilities", "of the released model"), rows, caption="Calibration")


def _by_site(facts: RunFacts) -> Mapping[str, Mapping[str, Counts]]:
    sites = sorted({name for way in facts.results.values() for name in way})
    found = {s: {w: r[s] for w, r in facts.results.items() if s in r} for s in sites}
    return {**found, OVERALL: facts.united}


def _estimate(
    facts: RunFacts, site: str, way: str, counts: Counts, names: Sequence[str]
) -> Mapping[str, Estimate | None]:
    evidence = facts.evidence.get(site)
    if evidence and way in evidence.figures:
        return evidence.figures[way]
    return intervals(counts, names, seed=facts.study.seed, draws=_DRAWS)
