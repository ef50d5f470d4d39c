"""For whom federating pays: ways of training compared site by site, paired over seeds.

What one seed tells of a site is a handful of patients. Each seed draws another holdout and trains
anew, so the differences of two ways on the same test patients, over seeds, tell how sure they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from common.metrics.by_patient import Evidence
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value
from common.metrics.statistics import Estimate
from common.metrics.verdicts import judge_difference, judge_own
from common.support.terminal import console, table
from server.runs.results import FEDERATED, Results, list_sites, sort_ways, unite_sites
from simulations.studies.over_seeds import (
    SIGNS,
    Seeded,
    describe_seeds,
    format_seeds,
    join_seeds,
    subtract_seeds,
)

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
    """What one way gains over another at one site, in one metric, on the seeds that have both."""

    site: str
    way: str
    other: str
    metric: str
    found: Seeded

    def facts(self) -> dict[str, object]:
        """The same as JSON."""
        found = self._asdict()
        values, estimate = found.pop("found")
        return {**found, "values": values, "estimate": vars(estimate) if estimate else None}


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
    """Every difference of `PAIRS`, at every site, in every metric."""

    def differences() -> Iterator[Gain]:
        for site, ways in figures.items():
            for way, other in PAIRS:
                for metric in ways.get(way, {}) if other in ways else ():
                    gain = subtract_seeds(ways[way][metric], ways[other][metric])
                    if gain.known:
                        yield Gain(site, way, other, metric, gain)

    return list(differences())


def show_gains(figures: Figures, gains: Sequence[Gain], seeds: int) -> None:
    """Print each way at each site, the differences, and what they say in words."""
    if len(figures) > _MOST_SITES:
        figures = {OVERALL: figures[OVERALL]}
    metrics = list(dict.fromkeys(gain.metric for gain in gains))
    labels = [METRICS[metric].label for metric in metrics]
    shown, apart = (table("", *labels, left=("",), signs=SIGNS) for _ in range(2))
    for site, ways in figures.items():
        shown.add_heading(site)
        for way, found in ways.items():
            joined = (join_seeds(found[metric], METRICS[metric].range) for metric in metrics)
            shown.add_row(f"  {way}", *map(format_seeds, joined))
        apart.add_heading(site)
        there = {(g.way, g.other, g.metric): g.found for g in gains if g.site == site}
        for way, other in dict.fromkeys((way, other) for way, other, _ in there):
            cells = (there.get((way, other, metric), Seeded(())) for metric in metrics)
            differences = (format_seeds(found, signed=True) for found in cells)
            apart.add_row(f"  {way} − {other}", *differences)
    for title, made in (("by site", shown), ("differences, paired by seed", apart)):
        console.print(f"\n{title}, {describe_seeds(seeds)}", style="bold")
        console.print(made)
    for line in judge_gains(gains):
        console.print(line)


def judge_gains(gains: Sequence[Gain]) -> list[str]:
    """One sentence a site: whether its adapted, or else the federated, model beats its own.

    None where there are too few seeds to say.
    """
    lines = []
    for site in dict.fromkeys(gain.site for gain in gains if gain.site != OVERALL):
        against = [g for g in gains if g.site == site and g.other == "local" and g.found.estimate]
        way = "adapted" if any(g.way == "adapted" for g in against) else FEDERATED
        told = [_say(g, g.found.estimate) for g in against if g.way == way and g.found.estimate]
        if told:
            lines.append(f"{site}, {way} against its own model alone. {'; '.join(told)}.")
    return lines


def show_verdicts(evidence: Mapping[str, Evidence], select: str) -> None:
    """Print a sentence for each site: whether its model beats its own alone, on these patients."""
    told = {site: judge_own(found, select) for site, found in sorted(evidence.items())}
    for site, verdict in list(told.items())[:_MOST_SITES]:
        if verdict:
            console.print(f"{site}: {verdict[1]}")


def _say(gain: Gain, found: Estimate) -> str:
    verdict = judge_difference(found, gain.metric)
    told = "these holdouts cannot tell" if verdict == "unsure" else verdict
    return f"{METRICS[gain.metric].label}: {told}, {format_seeds(gain.found, signed=True)}"
