"""Tables and plots of several runs, or of several ways of training, together."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from common.config.study import Study
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value
from common.metrics.statistics import Estimate, difference, gap_closed, intervals, t_interval
from common.support import files
from common.support.terminal import console, table
from server.runs.results import (
    FEDERATED,
    READ_OUTS,
    Results,
    describe_gaps,
    read_results,
    unite_sites,
)
from server.runs.run_folder import RunFolder
from simulations.studies import plots
from simulations.studies.gains import collect_figures, find_gains, show_gains
from simulations.studies.pages import write_page

SUMMARY = "summary.json"
_MOST_SITES_DRAWN = 20


def plot_results(study: Study, results: Results, path: Path) -> None:
    """Plot each way of training by site, with bootstrap intervals."""
    name, together = study.select, unite_sites(results, len(study.classes))
    estimates: dict[str, dict[str | None, Estimate | None]] = {}
    for way, sites in results.items():
        shown: dict[str | None, Counts] = {None: together[way]}
        if len(sites) <= _MOST_SITES_DRAWN:
            shown.update(sites.items())
        estimates[way] = {
            site: intervals(counts, [name], seed=study.seed, draws=300)[name] if counts.n else None
            for site, counts in shown.items()
        }
    plots.plot_comparison(estimates, name, path)


def read_seeds(folder: Path) -> list[int]:
    """The seeds of runs that were summarised in a folder."""
    seeds: list[int] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["seeds"]
    return seeds


def summarise_seeds(folder: Path, seeds: Sequence[int]) -> None:
    """Print mean ± sd over seeds of the overall figures, and the gain of federating, by seed."""
    study = RunFolder(folder / f"seed-{seeds[0]}").study
    with console.keep() as shown:
        _summarise(study, folder, seeds)
    title = f"{study.name}: what federating gave, over {len(seeds)} seeds"
    write_page(folder, title, shown, [("Ways of training, by site", "comparison.png")])
    console.print(f"run folder: {folder}")


def _summarise(study: Study, folder: Path, seeds: Sequence[int]) -> None:
    classes = len(study.classes)
    loaded = [read_results(folder / f"seed-{seed}", classes) for seed in seeds]
    runs = [results for results, _ in loaded]
    together = [unite_sites(run, classes) for run in runs]
    figures_of = {
        way: {metric: [value(each[way], metric) for each in together] for metric in METRICS}
        for way in runs[0]
        if all(way in run for run in runs)
    }
    ways = f"{len(seeds)} seeds"
    shown = table(ways, *(metric.label for metric in METRICS.values()), left=(ways,))
    for way, by_metric in figures_of.items():
        shown.add_row(way, *(format_mean_sd(values) for values in by_metric.values()))
    console.print()
    console.print(shown)
    console.print(READ_OUTS, style="dim")
    if below := describe_gaps(runs[0], loaded[0][1].get("withheld", {})):
        console.print(below, style="dim")
    told: dict[str, object] = {"seeds": list(seeds), "overall": figures_of}
    told["gains"] = _gains(study.select, {w: f[study.select] for w, f in figures_of.items()})
    figures = collect_figures(runs, classes, study.select)
    gains = find_gains(figures)
    show_gains(figures, gains)
    told["sites"] = figures
    told["differences"] = [{**gain._asdict(), "estimate": vars(gain.estimate)} for gain in gains]
    files.write(folder / SUMMARY, json.dumps(told, indent=1))
    _plot_seeds(study, runs, folder / "comparison.png")


def _gains(name: str, figures_of: dict[str, list[float | None]]) -> dict[str, object]:
    """Federated against local and pooled in the study's metric; printed, and returned."""
    label = METRICS[name].label
    gains: dict[str, object] = {}
    means = {way: found for way, values in figures_of.items() if (found := t_interval(values))}
    for way, found in means.items():
        console.print(f"{label}, {way}: {_interval(found)}")
    for other in ("local", "pooled"):
        if other in means and (gain := difference(figures_of[FEDERATED], figures_of[other])):
            gains[f"federated - {other}"] = [gain.value, gain.low, gain.high]
            console.print(f"{label}, federated − {other}: {_interval(gain)}")
    if {"local", "pooled", FEDERATED} <= means.keys():
        local, federated, pooled = (means[way].value for way in ("local", FEDERATED, "pooled"))
        closed = gap_closed(name, local=local, federated=federated, pooled=pooled)
        gap = difference(figures_of["pooled"], figures_of["local"])
        if gap is None or gap.low <= 0 <= gap.high:  # then its share means nothing
            closed, text = None, "these seeds do not tell pooled from local"
        elif closed is None:
            text = "pooled training is not better than local"
        else:
            text = f"{closed:.0%}"
        gains["gap closed"] = closed
        console.print(f"{label}, gap between local and pooled closed: {text}")
    return gains


def _plot_seeds(study: Study, runs: Sequence[Results], path: Path) -> None:
    name, classes = study.select, len(study.classes)
    estimates: dict[str, dict[str | None, Estimate | None]] = {}
    for way in (w for w in runs[0] if all(w in run for run in runs)):
        sites = sorted(set.intersection(*(set(run[way]) for run in runs)))
        shown = sites if len(sites) <= _MOST_SITES_DRAWN else []
        estimates[way] = {
            None: t_interval([value(unite_sites(run, classes)[way], name) for run in runs])
        }
        estimates[way] |= {s: t_interval([value(r[way][s], name) for r in runs]) for s in shown}
    plots.plot_comparison(estimates, name, path)


def format_mean_sd(values: Sequence[float | None]) -> str:
    """Format mean ± standard deviation of the figures that are defined; a dash without any."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    spread = f" ± {stdev(known):.3f}" if len(known) > 1 else ""
    return f"{mean(known):.3f}{spread}"


def format_gain(values: Sequence[float | None], base: Sequence[float | None] | None) -> str:
    """Format the mean of figures, and its paired difference to `base` with a 95 % interval."""
    known = [figure for figure in values if figure is not None]
    text = f"{mean(known):.3f}" if known else "–"
    gain = difference(values, base) if base else None
    return f"{text} ({gain.value:+.3f}, {gain.low:+.3f} to {gain.high:+.3f})" if gain else text


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} (95 % {estimate.low:.3f} to {estimate.high:.3f})"
