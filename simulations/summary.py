"""What several runs, or several ways of training, say together: tables and pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from rich.table import Table

from common import files
from common.evidence import Estimate, difference, gap_closed, intervals, t_interval
from common.metrics import METRICS, Counts, value
from common.study import Study
from server import figures
from server.checkpoint import RunFolder
from server.report import FEDERATED, Results, console, load_results, union

_MOST_SITES_DRAWN = 20


def picture(study: Study, results: Results, path: Path) -> None:
    """Each way of training by site, with bootstrap intervals."""
    name, classes = study.select, len(study.classes)
    estimates: dict[str, dict[str | None, Estimate | None]] = {}
    for way, sites in results.items():
        shown: dict[str | None, Counts] = {None: union(sites.values(), classes)}
        if len(sites) <= _MOST_SITES_DRAWN:
            shown.update(sites.items())
        estimates[way] = {
            site: intervals(counts, [name], seed=study.seed, draws=300)[name] if counts.n else None
            for site, counts in shown.items()
        }
    figures.comparison(estimates, name, path)


def over_seeds(folder: Path, seeds: Sequence[int]) -> None:
    """Mean ± sd over seeds of the overall figures, and what federating gained, paired by seed."""
    study = RunFolder(folder / f"seed-{seeds[0]}").study
    classes = len(study.classes)
    runs = [load_results(folder / f"seed-{seed}", classes)[0] for seed in seeds]
    overall = {
        way: {
            metric: [value(union(run[way].values(), classes), metric) for run in runs]
            for metric in METRICS
        }
        for way in runs[0]
    }
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column(f"{len(seeds)} seeds")
    for metric in METRICS.values():
        table.add_column(metric.label, justify="right")
    for way, by_metric in overall.items():
        table.add_row(way, *(_mean_sd(values) for values in by_metric.values()))
    console.print()
    console.print(table)
    summary = {"seeds": list(seeds), "overall": overall, **_gains(study, overall)}
    files.write(folder / "summary.json", json.dumps(summary, indent=1))
    _picture_of_seeds(study, runs, folder / "comparison.png")
    console.print(f"\nrun folder: {folder}")


def _gains(study: Study, overall: dict[str, dict[str, list[float | None]]]) -> dict[str, object]:
    """Federated against local and pooled in the study's metric; printed, and returned."""
    name = study.select
    gains: dict[str, object] = {}
    label = METRICS[name].label
    told = {way: t_interval(by_metric[name]) for way, by_metric in overall.items()}
    for way, estimate in told.items():
        if estimate:
            console.print(f"{label}, {way}: {_interval(estimate)}")
    for other in set(overall) & {"local", "pooled"}:
        gain = difference(overall[FEDERATED][name], overall[other][name])
        if gain:
            gains[f"federated - {other}"] = [gain.value, gain.low, gain.high]
            console.print(f"{label}, federated − {other}: {_interval(gain)}")
    means = {way: estimate.value for way, estimate in told.items() if estimate}
    if {"local", "pooled", FEDERATED} <= means.keys():
        closed = gap_closed(
            name, local=means["local"], federated=means[FEDERATED], pooled=means["pooled"]
        )
        gains["gap closed"] = closed
        if closed is not None:
            console.print(f"{label}, gap between local and pooled closed: {closed:.0%}")
    return {"gains": gains}


def _picture_of_seeds(study: Study, runs: Sequence[Results], path: Path) -> None:
    name, classes = study.select, len(study.classes)
    estimates: dict[str, dict[str | None, Estimate | None]] = {}
    for way in runs[0]:
        sites = sorted(set.intersection(*(set(run[way]) for run in runs)))
        shown = sites if len(sites) <= _MOST_SITES_DRAWN else []
        estimates[way] = {
            None: t_interval([value(union(r[way].values(), classes), name) for r in runs])
        }
        estimates[way] |= {s: t_interval([value(r[way][s], name) for r in runs]) for s in shown}
    figures.comparison(estimates, name, path)


def _mean_sd(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    spread = f" ± {stdev(known):.3f}" if len(known) > 1 else ""
    return f"{mean(known):.3f}{spread}"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} (95 % {estimate.low:.3f} to {estimate.high:.3f})"
