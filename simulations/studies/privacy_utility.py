"""The cost of privacy: one study at several ε and without, on the same holdouts."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, permutations
from pathlib import Path
from statistics import mean

from rich.table import Table

from client.ledger.spending import MEANING
from common.config.study import Private, Study
from common.errors import StudyError
from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, class_auroc, value
from common.metrics.statistics import FEWEST_SEEDS
from common.support import files
from common.support.terminal import console, table
from server.reports.titles import title_runs
from server.runs.results import (
    FEDERATED,
    READ_OUTS,
    Results,
    compute_sensitivities,
    read_results,
    unite_sites,
)
from server.runs.run_folder import RunFolder
from simulations.engines.base import Engine
from simulations.sites import virtual_sites
from simulations.studies import plots, subgroups
from simulations.studies.audit import read_audit
from simulations.studies.epsilons import label_epsilon, run_epsilons
from simulations.studies.over_seeds import (
    SHARE,
    SIGNS,
    describe_seeds,
    format_change,
    join_seeds,
    subtract_seeds,
)
from simulations.studies.pages import write_page
from simulations.studies.runner import Source
from simulations.studies.subgroups import Subgroup

Figure = Callable[[Counts], float | None]
PerEpsilon = Mapping[float | None, Mapping[str, list[float | None]]]
"""Figures by ε and by name, one for each seed."""
Grouped = Mapping[float | None, Sequence[Mapping[str, Subgroup]]]
"""The groups of one column by ε, for each seed."""


def compare_epsilons(
    study: Study,
    source: Source,
    folder: Path,
    *,
    epsilons: Sequence[float | None],
    seeds: Sequence[int],
    of: str | None,
    by: Sequence[str] = (),
    audit: Path | None = None,
    cache: Path,
    engine: Engine,
) -> None:
    """Run the study at each ε, on each seed; print and plot the results of the released models.

    Runs that are there already are only read, so that an interrupted series goes on.

    Args:
      study: A study with privacy; everything but ε is the same in all runs.
      source: The source of the hospitals.
      folder: One folder in it for each ε, and in that one for each seed.
      epsilons: None is the study without privacy.
      seeds: Each draws another holdout.
      of: A class whose own AUROC is wanted as well.
      by: Columns of the manifests, by which groups of test patients are shown as well.
      audit: The folder of an audit of this study, whose bounds are drawn in as well.
      cache: The folder of prepared images.
      engine: The engine in which the hospitals compute.

    Raises:
      StudyError: the study is not private, or has no such class; no manifest has such a column.
      RunError: there is no such audit.
    """
    wanted = _figures(study, of)
    if not isinstance(study.privacy, Private):
        raise study.error("privacy", expected="a mechanism", got="none")
    groups = subgroups.find_groups(by, source.list_hospitals(study), study) if by else {}
    shown = read_audit(audit) if audit else {}
    runs = run_epsilons(
        study,
        source,
        folder,
        epsilons=epsilons,
        seeds=seeds,
        cache=cache,
        make_engine=lambda: engine,
    )
    counted = {
        epsilon: [subgroups.count_groups(run, groups, engine.runtime) for run in paths]
        for epsilon, paths in (runs if groups else {}).items()
    }
    grouped = {
        column: {epsilon: [found[column] for found in each] for epsilon, each in counted.items()}
        for column in groups
    }
    console.print()
    with console.keep() as told:
        _report(study, runs, grouped, wanted, shown, folder)
    title = f"{study.name}: what privacy costs"
    write_page(folder, title, told, [("Figures by ε", "utility.png")])
    console.print(f"run folder: {folder}, with utility.json and utility.png")


def _figures(study: Study, of: str | None) -> dict[str, Figure]:
    """The figures to measure, by name, on the test images of all sites together."""
    shown = ("balanced_accuracy", "auroc")
    found: dict[str, Figure] = {METRICS[name].label: partial(value, name=name) for name in shown}
    if of is not None:
        if of not in study.classes:
            known = ", ".join(study.classes)
            raise StudyError("--class", expected=f"one of {known}", got=of)
        k = study.classes.index(of)
        found[f"AUROC of {of}"] = partial(class_auroc, k=k)
    return found


def _report(
    study: Study,
    runs: Mapping[float | None, Sequence[Path]],
    grouped: Mapping[str, Grouped],
    wanted: dict[str, Figure],
    shown: Mapping[str, float],
    folder: Path,
) -> None:
    results = {
        epsilon: [read_results(run, len(study.classes))[0] for run in paths]
        for epsilon, paths in runs.items()
    }
    together = {
        epsilon: [unite_sites(each, len(study.classes))[FEDERATED] for each in found]
        for epsilon, found in results.items()
    }
    figures_of = {
        epsilon: {name: [figure(c) for c in counts] for name, figure in wanted.items()}
        for epsilon, counts in together.items()
    }
    told = {label_epsilon(e): by_name for e, by_name in figures_of.items()}
    estimates = {
        name: {e: join_seeds(by_name[name], SHARE) for e, by_name in figures_of.items()}
        for name in wanted
    }
    by_class = {
        epsilon: {
            name: [compute_sensitivities(c)[k] for c in counts]
            for k, name in enumerate(study.classes)
        }
        for epsilon, counts in together.items()
    }
    by_site = {
        epsilon: {
            site: [value(run[FEDERATED][site], "auroc") for run in found]
            for site in found[0][FEDERATED]
        }
        for epsilon, found in results.items()
    }
    seeds = len(next(iter(runs.values())))
    console.print(f"released models, {describe_seeds(seeds)}", style="bold")
    console.print(_table("privacy", figures_of))
    console.print(_table("sensitivity of each class", by_class))
    console.print(_table("AUROC at each site", by_site))
    by_group = {column: _show_groups(column, each, wanted) for column, each in grouped.items()}
    console.print(READ_OUTS, style="dim")
    if None in runs:
        console.print("in brackets: the difference to no privacy, paired by seed")
        if grouped:
            enough = "groups that lose more are shown; of their pairs, one in twenty by luck alone"
            few = f"fewer than {FEWEST_SEEDS} seeds do not tell which groups lose more"
            console.print(few if seeds < FEWEST_SEEDS else enough)
    _positives(study, results[next(iter(runs))])
    spent = {label_epsilon(e): _spent(paths) for e, paths in runs.items() if e is not None}
    for label, paid in spent.items():
        each = ", ".join(f"{site} {epsilon:.2f}" for site, epsilon in paid.items())
        console.print(f"{label}: spent by the ledger, the most of any seed: {each}")
    console.print(MEANING, style="dim")
    content = {
        "figures": told,
        "classes": {label_epsilon(e): by_name for e, by_name in by_class.items()},
        "sites": {label_epsilon(e): by_name for e, by_name in by_site.items()},
        "groups": by_group,
        "spent": spent,
    }
    files.write(folder / "utility.json", json.dumps(content, indent=1))
    bounds = {epsilon: shown.get(label_epsilon(epsilon)) for epsilon in runs}
    images = [counts.n for each in together.values() for counts in each]
    title = title_runs([*map(RunFolder, chain(*runs.values()))], "what privacy costs", images)
    plots.plot_privacy_utility(estimates, bounds, folder / "utility.png", title)


def _table(first: str, figures_of: PerEpsilon) -> Table:
    """Each ε with its figures, and how far they are from those without privacy."""
    names = list(next(iter(figures_of.values())))
    shown = table(first, *names, left=(first,), signs=SIGNS)
    plain = figures_of.get(None, {})
    for epsilon, by_name in figures_of.items():
        base = plain if epsilon else {}
        cells = (format_change(by_name[name], base.get(name)) for name in names)
        shown.add_row(label_epsilon(epsilon), *cells)
    return shown


def _show_groups(
    column: str, grouped: Grouped, wanted: Mapping[str, Figure]
) -> dict[str, Mapping[str, object]]:
    """Print each figure by group, but for groups of few patients; returns what was printed."""
    found = next(iter(grouped.values()))
    patients = {name: [groups[name].patients for groups in found] for name in found[0]}
    shown = {name: each for name, each in patients.items() if mean(each) >= subgroups.LEAST}
    told: dict[str, Mapping[str, object]] = {"patients": shown}
    for label, figure in wanted.items():
        figures_of = {
            epsilon: {name: [figure(groups[name].counts) for groups in each] for name in shown}
            for epsilon, each in grouped.items()
        }
        console.print(f"\n{label} by {column}", style="bold")
        console.print(_table_of_groups(column, shown, figures_of))
        for line in _compare_losses(figures_of):
            console.print(line)
        told[label] = {label_epsilon(epsilon): by_name for epsilon, by_name in figures_of.items()}
    if few := [name for name, each in patients.items() if any(each) and name not in shown]:
        least = f"fewer than {subgroups.LEAST} test patients"
        console.print(f"{column}: left out, with {least}: {len(few)} ({', '.join(few)})")
    return told


def _table_of_groups(
    column: str, patients: Mapping[str, Sequence[int]], figures_of: PerEpsilon
) -> Table:
    """Each group with its test patients, the mean of seeds, and its figure at each ε."""
    columns = (column, "patients", *map(label_epsilon, figures_of))
    shown = table(*columns, left=(column,), signs=SIGNS)
    plain = figures_of.get(None, {})
    for name, each in patients.items():
        cells = [
            format_change(by_name[name], plain.get(name) if epsilon else None)
            for epsilon, by_name in figures_of.items()
        ]
        shown.add_row(name, f"{mean(each):.1f}", *cells)
    return shown


def _compare_losses(figures_of: PerEpsilon) -> Iterator[str]:
    """Say which groups lose more than others, where the 95 % interval, paired by seed, tells."""
    plain = figures_of.get(None, {})
    for epsilon, by_name in figures_of.items():
        losses = {
            name: [
                None if a is None or b is None else a - b for a, b in zip(base, found, strict=True)
            ]
            for name, found in by_name.items()
            if epsilon and (base := plain.get(name))
        }
        for more, less in permutations(losses, 2):
            gap = subtract_seeds(losses[more], losses[less]).estimate
            if gap and gap.low > 0:
                by = f"{gap.value:.3f} ({gap.low:.3f} to {gap.high:.3f})"
                yield f"{label_epsilon(epsilon)}: {more} loses {by} more than {less}"


def _positives(study: Study, found: Sequence[Results]) -> None:
    """Test images of each class and site, the mean over seeds: few of them make a rough figure."""
    first = "test images, mean of seeds"
    shown = table(first, *study.classes, left=(first,))
    for site in found[0][FEDERATED]:
        rows = [run[FEDERATED][site].confusion.sum(axis=1).tolist() for run in found]
        shown.add_row(site, *(f"{mean(column):.1f}" for column in zip(*rows, strict=True)))
    console.print(shown)


def _spent(runs: Sequence[Path]) -> dict[str, float]:
    """ε that each site's ledger adds up to: the most of all runs."""
    spent: dict[str, float] = {}
    for run in runs:
        site_files = virtual_sites.find_site_files(run)
        for name, epsilon in virtual_sites.read_spending(site_files).items():
            spent[name] = max(epsilon, spent.get(name, 0.0))
    return spent
