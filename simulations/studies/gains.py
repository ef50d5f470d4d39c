"""For whom federating pays: ways of training compared site by site, paired over seeds.

What one seed tells of a site is a handful of patients. Each seed draws another holdout and trains
anew, so the differences of two ways on the same test patients, over seeds, tell how sure they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import NamedTuple

from common.metrics.by_patient import Evidence
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value
from common.metrics.statistics import Estimate, difference
from common.metrics.verdicts import judge_difference, judge_own
from common.support.terminal import console, table
from server.reports.tables import format_figure
from server.runs.results import FEDERATED, Results, list_sites, sort_ways, unite_sites

PAIRS = (
    (FEDERATED, "local"),
    ("adapted", "local"),
    ("adapted", FEDERATED),
    (FEDERATED, "fedavg"),
    (FEDERATED, "pooled"),
)
"""The ways that are compared: the first less the second."""
_RANKS = "auroc"
OVERALL = "overall"
_MOST_SITES = 20


Figures = Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]]
"""Site, or `overall` → way → metric → its figure on each seed."""


class Gain(NamedTuple):
    """What one way gains over another at one site, in one metric."""

    site: str
    way: str
    other: str
    metric: str
    estimate: Estimate


def collect_figures(runs: Sequence[Results], classes: int, select: str) -> Figures:
    """Collect the study's metric, and the AUROC beside it, of all sites and ways.

    Args:
      runs: The results of each seed.
      classes: How many classes.
      select: The study's metric.
    """
    counted = [_by_site(run, classes) for run in runs]
    sites = [site for site in counted[0] if all(site in run for run in counted)]
    return {
        site: {
            way: {
                metric: [value(run[site][way], metric) for run in counted]
                for metric in dict.fromkeys((select, _RANKS))
            }
            for way in counted[0][site]
            if all(way in run[site] for run in counted)
        }
        for site in sites
    }


def _by_site(run: Results, classes: int) -> dict[str, dict[str, Counts]]:
    ways = sort_ways(run)
    found = {site: {w: s[site] for w, s in ways.items() if site in s} for site in list_sites(run)}
    return {**dict(sorted(found.items())), OVERALL: unite_sites(ways, classes)}


def find_gains(figures: Figures) -> list[Gain]:
    """Every difference of `PAIRS`, at every site, in every metric, that has an interval."""

    def differences() -> Iterator[Gain]:
        for site, ways in figures.items():
            for way, other in PAIRS:
                for metric in ways.get(way, {}) if other in ways else ():
                    if gain := difference(ways[way][metric], ways[other][metric]):
                        yield Gain(site, way, other, metric, gain)

    return list(differences())


def show_gains(
    figures: Figures,
    gains: Sequence[Gain],
) -> None:
    """Print each way's mean at each site, the differences, and what they say in words."""
    if len(figures) > _MOST_SITES:
        figures = {OVERALL: figures[OVERALL]}
    metrics = list(dict.fromkeys(gain.metric for gain in gains))
    labels = [METRICS[metric].label for metric in metrics]
    left, pairs = ("site", "mean over seeds"), ("site", "difference (95 % interval)")
    shown, apart = table(*left, *labels, left=left), table(*pairs, *labels, left=pairs)
    for site, ways in figures.items():
        for i, (way, found) in enumerate(ways.items()):
            means = [format_figure(_mean(found[metric])) for metric in metrics]
            shown.add_row("" if i else site, way, *means)
        there = [gain for gain in gains if gain.site == site]
        for i, (way, other) in enumerate(dict.fromkeys((g.way, g.other) for g in there)):
            found_gains = {g.metric: g.estimate for g in there if (g.way, g.other) == (way, other)}
            cells = [_signed(found_gains.get(metric)) for metric in metrics]
            apart.add_row("" if i else site, f"{way} − {other}", *cells)
    console.print()
    console.print(shown)
    console.print()
    console.print(apart)
    for line in judge_gains(gains):
        console.print(line)


def judge_gains(gains: Sequence[Gain]) -> list[str]:
    """One sentence a site: whether its adapted, or else the federated, model beats its own."""
    lines = []
    for site in dict.fromkeys(gain.site for gain in gains if gain.site != OVERALL):
        against = [g for g in gains if g.site == site and g.other == "local"]
        way = "adapted" if any(g.way == "adapted" for g in against) else FEDERATED
        told = [_say(g) for g in against if g.way == way]
        if told:
            lines.append(f"{site}, {way} against its own model alone. {'; '.join(told)}.")
    return lines


def show_verdicts(evidence: Mapping[str, Evidence], select: str) -> None:
    """Print a sentence for each site: whether its model beats its own alone, on these patients."""
    told = {site: judge_own(found, select) for site, found in sorted(evidence.items())}
    for site, verdict in list(told.items())[:_MOST_SITES]:
        if verdict:
            console.print(f"{site}: {verdict[1]}")


def _say(gain: Gain) -> str:
    verdict = judge_difference(gain.estimate, gain.metric)
    told = "these holdouts cannot tell" if verdict == "unsure" else verdict
    return f"{METRICS[gain.metric].label}: {told}, {_signed(gain.estimate)}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def _signed(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"
