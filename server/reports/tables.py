"""The tables of a finished run: figures on test patients, by site and way of training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from common.metrics.counts import Counts
from common.metrics.metrics import (
    METRICS,
    SHARE_LABELS,
    SHARES,
    brier_score,
    find_cells,
    macro_average_precision,
)
from common.support.tables import FittedTable
from common.support.terminal import console, table
from server.runs.results import (
    FEDERATED,
    READ_OUTS,
    Results,
    compute_calibration_error,
    compute_sensitivities,
    describe_gaps,
    list_sites,
    unite_sites,
)

UNDEFINED, WITHHELD = "–", "×"
SIGNS = {
    UNDEFINED: "no test images of the class, or none called so",
    WITHHELD: "withheld by the site",
}
"""What stands in a table instead of a figure, and why."""

_FEW = 5
_MOST_SITES = 8
_OVERALL = "overall"
_DECISIONS = ("balanced_accuracy", "f1")

_SCORES: Mapping[str, Callable[[Counts], float | None]] = {
    "AUROC": METRICS["auroc"].of,
    "average precision": macro_average_precision,
    "Brier score": brier_score,
    "calibration error": compute_calibration_error,
}
"""Figures of probabilities, which a site may withhold."""


def show_results(
    results: Results, classes: Sequence[str], withheld: Mapping[str, str], where: Path
) -> None:
    """Print the tables of a finished run."""
    way = FEDERATED if FEDERATED in results else next(iter(results))
    tables = {
        "test images": _tabulate_figures(results, withheld, len(classes)),
        "sensitivity per class": _tabulate_sensitivities(results, withheld, classes),
        f"decisions per class, {way}": _tabulate_classes(results, way, classes),
    }
    for title, shown in tables.items():
        console.print(f"\n{title}", style="bold")
        console.print(shown)
    if below := describe_gaps(results, withheld):
        console.print(below, style="dim")
    console.print(READ_OUTS, style="dim")
    if few := describe_few(results, classes):
        console.print(few, style="dim")
    console.print(f"\nrun folder: {where}")


def describe_few(results: Results, classes: Sequence[str]) -> str:
    """Name the classes with so few test images that one of them moves a sensitivity by a fifth.

    Empty where there are none, or where numbers are not told exactly.
    """
    (way, *_) = results
    told = {**results[way], _OVERALL: unite_sites(results, len(classes))[way]}
    lines = []
    for site, counts in told.items():
        images = counts.confusion.sum(axis=1) if not counts.noise else ()
        if few := [f"{c} {n}" for c, n in zip(classes, images, strict=False) if 0 < n < _FEW]:
            lines.append(f"{site}: {', '.join(few)}")
    if not lines:
        return ""
    said = "fewer than five test images, so sensitivity and balanced accuracy say little"
    return f"{said}: {'; '.join(lines)}"


def _tabulate_figures(results: Results, withheld: Mapping[str, str], classes: int) -> FittedTable:
    decisions = [METRICS[name] for name in _DECISIONS]
    columns = ("accuracy", *(metric.label for metric in decisions), *_SCORES)
    shown = table("", *columns, left=("",), signs=SIGNS)

    def figures_of(counts: Counts) -> Iterator[str]:
        for metric in (METRICS["accuracy"], *decisions):
            yield format_figure(metric.of(counts))
        for figure in _SCORES.values():
            yield format_figure(figure(counts), told=not counts.noise)

    _fill(shown, results, withheld, classes, figures_of)
    return shown


def _tabulate_sensitivities(
    results: Results, withheld: Mapping[str, str], classes: Sequence[str]
) -> FittedTable:
    shown = table("", *classes, left=("",), signs=SIGNS)

    def figures_of(counts: Counts) -> Iterator[str]:
        return map(format_figure, compute_sensitivities(counts))

    _fill(shown, results, withheld, len(classes), figures_of)
    return shown


def _fill(
    shown: FittedTable,
    results: Results,
    withheld: Mapping[str, str],
    classes: int,
    figures_of: Callable[[Counts], Iterator[str]],
) -> None:
    """Each site, then all of them, with one row for each way of training."""
    for site in sorted(list_sites(results) | set(withheld)):
        ways = {way: sites[site] for way, sites in results.items() if site in sites}
        _fill_site(shown, site, ways, "", figures_of)
    _fill_site(shown, _OVERALL, unite_sites(results, classes), "bold", figures_of)


def _fill_site(
    shown: FittedTable,
    site: str,
    ways: Mapping[str, Counts],
    style: str,
    figures_of: Callable[[Counts], Iterator[str]],
) -> None:
    told = [count_images(counts) for counts in ways.values()] or [
        "all figures withheld by the site"
    ]
    shown.add_heading(f"{site}: {told[0]}", style=style)
    for way, counts in ways.items():
        shown.add_row(f"  {way}", *figures_of(counts), style=style)


def count_images(counts: Counts) -> str:
    """How many test images were counted, in words."""
    return f"{'about ' if counts.noise else ''}{counts.n} test images"


def _tabulate_classes(results: Results, way: str, classes: Sequence[str]) -> FittedTable:
    """How one way of training decides about each class, at each site and overall."""
    sites, together = results[way], unite_sites(results, len(classes))[way]
    shown = table("", *(SHARE_LABELS.get(name, name) for name in SHARES), left=("",), signs=SIGNS)
    apart = sites if 1 < len(sites) <= _MOST_SITES else {}
    for site, counts in {**dict(sorted(apart.items())), _OVERALL: together}.items():
        style = "bold" if site == _OVERALL else ""
        shown.add_heading(f"{site}: {count_images(counts)}", style=style)
        for k, name in enumerate(classes):
            shown.add_row(f"  {name}", *_format_shares(counts, k), style=style)
    return shown


def _format_shares(counts: Counts, k: int) -> Iterator[str]:
    """Each share with its images; where these have noise, the share alone."""
    cells = find_cells(counts, k)
    for split in SHARES.values():
        right, wrong = split(cells)
        if right + wrong <= 0:
            yield UNDEFINED
            continue
        share = format_figure(min(max(right / (right + wrong), 0.0), 1.0))
        yield share if counts.noise else f"{share} {right}/{right + wrong}"


def format_figure(number: float | None, *, told: bool = True) -> str:
    """A figure to three places; a sign where there is none, of two kinds: see SIGNS.

    Args:
      number: The figure.
      told: Whether it would be told, if there were one.
    """
    if number is None:
        return UNDEFINED if told else WITHHELD
    return f"{number:.3f}"
