"""Tables and plots of several runs, or of several ways of training, together."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config.study import Study
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, value
from common.metrics.statistics import gap_closed, intervals
from common.support import files
from common.support.plot_style import Title
from common.support.terminal import console, table
from server.reports.tables import count_images
from server.reports.titles import title_run, title_runs
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
from simulations.studies.over_seeds import (
    SIGNS,
    Seeded,
    describe_seeds,
    format_metric,
    format_seeds,
    join_seeds,
    subtract_seeds,
)
from simulations.studies.pages import write_page

SUMMARY = "summary.json"
_MOST_SITES_DRAWN = 20


def plot_results(run: RunFolder, results: Results, facts: Mapping[str, Any]) -> None:
    """Plot each way of training by site, with bootstrap intervals."""
    study = run.study
    name, together = study.select, unite_sites(results, len(study.classes))
    found: dict[str, dict[str | None, Seeded]] = {}
    for way, sites in results.items():
        shown: dict[str | None, Counts] = {None: together[way]}
        if len(sites) <= _MOST_SITES_DRAWN:
            shown.update(sites.items())
        found[way] = {site: _bootstrap(counts, name, study.seed) for site, counts in shown.items()}
    images = count_images(next(iter(together.values())))
    title = title_run(
        run, "ways of training, with intervals by image", facts["released_round"], images
    )
    plots.plot_comparison(found, name, run.path / "comparison.png", title)


def _bootstrap(counts: Counts, name: str, seed: int) -> Seeded:
    found = intervals(counts, [name], seed=seed, draws=300)[name] if counts.n else None
    return Seeded((found.value,), found) if found else Seeded(())


def read_seeds(folder: Path) -> list[int]:
    """The seeds of runs that were summarised in a folder."""
    seeds: list[int] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["seeds"]
    return seeds


def summarise_seeds(folder: Path, seeds: Sequence[int]) -> None:
    """Print the overall figures, and the gains of federating, over seeds or of each of a few."""
    folders = [RunFolder(folder / f"seed-{seed}") for seed in seeds]
    study = folders[0].study
    with console.keep() as shown:
        _summarise(study, folder, folders)
    title = f"{study.name}: what federating gave, over {len(seeds)} seeds"
    write_page(folder, title, shown, [("Ways of training, by site", "comparison.png")])
    console.print(f"run folder: {folder}")


def _summarise(study: Study, folder: Path, folders: Sequence[RunFolder]) -> None:
    seeds = [run.study.seed for run in folders]
    classes = len(study.classes)
    loaded = [read_results(run.path, classes) for run in folders]
    runs = [results for results, _ in loaded]
    together = [unite_sites(run, classes) for run in runs]
    figures_of = {
        way: {metric: [value(each[way], metric) for each in together] for metric in METRICS}
        for way in runs[0]
        if all(way in run for run in runs)
    }
    shown = table("", *(metric.label for metric in METRICS.values()), left=("",), signs=SIGNS)
    for way, by_metric in figures_of.items():
        shown.add_row(way, *(format_metric(values, name) for name, values in by_metric.items()))
    console.print(f"\nall test images, {describe_seeds(len(seeds))}", style="bold")
    console.print(shown)
    console.print(READ_OUTS, style="dim")
    if below := describe_gaps(runs[0], loaded[0][1].get("withheld", {})):
        console.print(below, style="dim")
    told: dict[str, object] = {"seeds": list(seeds), "overall": figures_of}
    told["gains"] = _gains(study.select, {w: f[study.select] for w, f in figures_of.items()})
    figures = collect_figures(runs, classes, study.select)
    gains = find_gains(figures)
    show_gains(figures, gains, len(seeds))
    told["sites"] = figures
    told["differences"] = [gain.facts() for gain in gains]
    files.write(folder / SUMMARY, json.dumps(told, indent=1))
    images = [next(iter(each.values())).n for each in together]
    title = title_runs(folders, "ways of training, by site", images)
    _plot_seeds(study, runs, folder / "comparison.png", title)


def _gains(name: str, figures_of: Mapping[str, Sequence[float | None]]) -> dict[str, object]:
    """Federated against local and pooled in the study's metric; printed, and returned."""
    label = METRICS[name].label
    gains: dict[str, object] = {}
    for other in ("local", "pooled"):
        if other in figures_of:
            gain = subtract_seeds(figures_of[FEDERATED], figures_of[other])
            told = format_seeds(gain, signed=True)
            console.print(f"{label}, federated − {other}, paired by seed: {told}")
            if found := gain.estimate:
                gains[f"federated - {other}"] = [found.value, found.low, found.high]
    means = {way: found.value for way, x in figures_of.items() if (found := join_seeds(x).estimate)}
    if {"local", "pooled", FEDERATED} <= means.keys():
        local, federated, pooled = (means[way] for way in ("local", FEDERATED, "pooled"))
        closed = gap_closed(name, local=local, federated=federated, pooled=pooled)
        gap = subtract_seeds(figures_of["pooled"], figures_of["local"]).estimate
        if gap is None or gap.low <= 0 <= gap.high:  # then its share means nothing
            closed, text = None, "these seeds do not tell pooled from local"
        elif closed is None:
            text = "pooled training is not better than local"
        else:
            text = f"{closed:.0%}"
        gains["gap closed"] = closed
        console.print(f"{label}, gap between local and pooled closed: {text}")
    return gains


def _plot_seeds(study: Study, runs: Sequence[Results], path: Path, title: Title) -> None:
    name, classes = study.select, len(study.classes)
    found: dict[str, dict[str | None, Seeded]] = {}
    for way in (w for w in runs[0] if all(w in run for run in runs)):
        sites = sorted(set.intersection(*(set(run[way]) for run in runs)))
        shown = sites if len(sites) <= _MOST_SITES_DRAWN else []
        whole = [value(unite_sites(run, classes)[way], name) for run in runs]
        figures: dict[str | None, list[float | None]] = {None: whole}
        figures |= {site: [value(run[way][site], name) for run in runs] for site in shown}
        found[way] = {site: join_seeds(x, METRICS[name].range) for site, x in figures.items()}
    plots.plot_comparison(found, name, path, title)
