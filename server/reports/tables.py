"""The tables of a finished run: figures on test patients, by site and way of training."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from common.metrics.counts import Counts
from common.metrics.metrics import METRICS, brier_score, value
from common.support.terminal import console, table
from server.runs.results import (
    READ_OUTS,
    Results,
    compute_calibration_error,
    compute_sensitivities,
    describe_gaps,
    list_sites,
    unite_sites,
)

_FEW = 5
_COLUMNS = ("accuracy", "balanced_accuracy", "f1", "auroc")


def show_results(
    results: Results, classes: Sequence[str], withheld: Mapping[str, str], where: Path
) -> None:
    """Print the tables of a finished run."""
    tables = _results_tables(results, classes, withheld)
    for title, shown in zip(("test images", "sensitivity per class"), tables, strict=True):
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
    told = {**results[way], "overall": unite_sites(results, len(classes))[way]}
    lines = []
    for site, counts in told.items():
        images = counts.confusion.sum(axis=1) if not counts.noise else ()
        if few := [f"{c} {n}" for c, n in zip(classes, images, strict=False) if 0 < n < _FEW]:
            lines.append(f"{site}: {', '.join(few)}")
    if not lines:
        return ""
    said = "fewer than five test images, so sensitivity and balanced accuracy say little"
    return f"{said}: {'; '.join(lines)}"


def _results_tables(
    results: Results, classes: Sequence[str], withheld: Mapping[str, str]
) -> tuple[Table, Table]:
    """Per site and overall, one row for each way of training: metrics, and sensitivities.

    A site that withheld everything has a row of dashes.
    """
    metrics = [*(METRICS[name].label for name in _COLUMNS), "Brier score", "calibration error"]

    def figures_of(counts: Counts) -> list[float | None]:
        figures = [value(counts, name) for name in _COLUMNS]
        return [*figures, brier_score(counts), compute_calibration_error(counts)]

    return (
        _table(results, withheld, len(classes), metrics, figures_of),
        _table(results, withheld, len(classes), classes, compute_sensitivities),
    )


def _table(
    results: Results,
    withheld: Iterable[str],
    classes: int,
    columns: Sequence[str],
    figures_of: Callable[[Counts], list[float | None]],
) -> Table:
    shown = table("site", "images", "trained", *columns, left=("site", "trained"))
    sites = sorted(list_sites(results) | set(withheld))
    rows = [(site, {w: s[site] for w, s in results.items() if site in s}, "") for site in sites]
    rows.append(("overall", unite_sites(results, classes), "bold"))
    for site, ways, style in rows:
        if not ways:
            shown.add_row(site, *[format_figure(None)] * (len(columns) + 2), style=style)
        for i, (way, counts) in enumerate(ways.items()):
            first = ("", "") if i else (site, str(counts.n))
            shown.add_row(*first, way, *map(format_figure, figures_of(counts)), style=style)
    return shown


def format_figure(number: float | None) -> str:
    """A figure to three places; a dash where there is none."""
    return "–" if number is None else f"{number:.3f}"
