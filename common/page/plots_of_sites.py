"""Plots of what sites gained, by site and way of training.

Each takes `of`, words for the model and the images, which make its title with the metric. Each
gives None where there is nothing to show. Names of sites and ways may be any text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from common.metrics.metrics import METRICS, label_metric
from common.metrics.statistics import Estimate
from common.page.blocks import Figure
from common.page.plots import WIDTH, add_legend, draw_cells, draw_figure
from common.support.names import shorten_names
from common.support.plot_style import COLOURS, INK, MARKERS, PALEST

Site = str | None
"""A site's name; None for all sites together."""

Shown = TypeVar("Shown")

OVERALL = "overall"
_NOTHING = "withheld, or no images of a class"
_DOTS: Any = {"ls": "", "ms": 4}
_ASIDE: Any = {"ha": "center", "va": "center", "fontsize": 7}
_LONGEST = 16
"""Characters of a name beside a plot."""


def plot_differences(
    rows: Sequence[tuple[str, Estimate | None]], metric: str, pair: tuple[str, str], of: str
) -> Figure | None:
    """Plot by site how much the first way of a pair beats the second, with intervals.

    Args:
      rows: site → the metric of the first way less that of the second, None where it is withheld;
        an estimate of a single value, `low` and `high` equal to it, has no interval.
      metric: its name in METRICS.
      pair: the two ways.
      of: what was compared, in words.
    """
    if not any(estimate for _, estimate in rows):
        return None
    names = shorten_names((site for site, _ in rows), _LONGEST)

    def draw(canvas: Canvas) -> None:
        canvas.set_size_inches(WIDTH, 0.9 + 0.2 * len(rows))
        axes = canvas.subplots()
        axes.axvline(0, color=INK, lw=0.8)
        for y, (_, estimate) in enumerate(rows):
            _difference(axes, y, estimate)
        _name_rows(axes, [names[site] for site, _ in rows])
        axes.margins(x=0.08)
        axes.set_xlabel(f"difference of {label_metric(metric)}")
        axes.grid(axis="x")

    first, second = pair
    side = "right" if _is_higher_better(metric) else "left"
    caption = f"{side.capitalize()} of 0 {first} is better. "
    caption += "A full dot has a 95 % interval without 0; a diamond has no interval."
    if any(estimate is None for _, estimate in rows):
        caption += " –: withheld or undefined."
    return draw_figure(draw, f"{_name(metric)}, {first} less {second}: {of}", caption)


def _difference(axes: Axes, y: int, found: Estimate | None) -> None:
    if found is None:
        box = {"fc": "white", "lw": 0, "pad": 1}
        axes.text(0, y, "–", ha="center", va="center", bbox=box)
        return
    single = found.low == found.high
    sure = not found.low <= 0 <= found.high
    if not single:
        axes.hlines(y, found.low, found.high, color=COLOURS[0], lw=1.4)
    face = COLOURS[0] if sure and not single else "white"
    axes.plot(found.value, y, "D" if single else "o", color=COLOURS[0], mfc=face, ms=4.5)


def plot_estimates(
    ways: Mapping[str, Mapping[Site, Estimate | None]],
    metric: str,
    of: str,
    *,
    spread: str = "95 % intervals",
) -> Figure | None:
    """Plot a metric by site, a marker with its interval for each way of training.

    Args:
      ways: way (at most six) → site → estimate, None where it is withheld or undefined; an
        estimate of a single value, `low` and `high` equal to it, has no interval.
      metric: its name in METRICS, or in words.
      of: what was measured, in words.
      spread: what the lines are.
    """
    if not any(found for by_site in ways.values() for found in by_site.values()):
        return None

    def draw(canvas: Canvas) -> None:
        draw_by_site(canvas, ways, label_metric(metric), draw_estimate)

    return draw_figure(draw, f"{_name(metric)} by site: {of}", f"Lines are {spread}.")


def draw_estimate(axes: Axes, y: float, found: Estimate, style: Mapping[str, Any]) -> None:
    """Draw a mark with its interval at a height."""
    axes.hlines(y, found.low, found.high, color=style["color"], lw=1.2)
    axes.plot(found.value, y, **style)


def plot_seeds(
    ways: Mapping[str, Mapping[Site, Sequence[float | None]]], metric: str, of: str
) -> Figure | None:
    """Plot a metric by site, a marker for each seed of each way of training.

    Args:
      ways: way (at most six) → site → the metric of each seed, None where it is not defined.
      metric: its name in METRICS, or in words.
      of: what was measured, in words.
    """
    known = {
        way: {site: [v for v in values if v is not None] for site, values in by_site.items()}
        for way, by_site in ways.items()
    }
    if not any(values for by_site in known.values() for values in by_site.values()):
        return None

    def draw(canvas: Canvas) -> None:
        draw_by_site(canvas, known, label_metric(metric), draw_values)

    return draw_figure(draw, f"{_name(metric)} by site: {of}", "Each mark is one seed.")


def draw_values(axes: Axes, y: float, values: Sequence[float], style: Mapping[str, Any]) -> None:
    """Draw a hollow mark for each value at a height."""
    axes.plot(values, np.full(len(values), y), **{**style, "mfc": "none"})


def draw_by_site(
    canvas: Canvas,
    ways: Mapping[str, Mapping[Site, Shown | None]],
    label: str,
    mark: Callable[[Axes, float, Shown, Mapping[str, Any]], None],
    *,
    below: bool = False,
) -> None:
    """Draw a row for each site, overall first, and in it a line below another for each way.

    Args:
      canvas: to draw on.
      ways: way (at most six) → site → what `mark` draws; nothing, if None or empty.
      label: of the axis.
      mark: draws it on axes, at a height, in the way's style.
      below: Whether the legend stands below the plot.
    """
    found = dict.fromkeys(site for by_site in ways.values() for site in by_site)
    sites = sorted(found, key=lambda site: site is not None)
    names = shorten_names((site for site in sites if site is not None), _LONGEST)
    labels = shorten_names(ways, _LONGEST)
    canvas.set_size_inches(WIDTH, 1 + (0.1 + 0.08 * len(ways)) * len(sites))
    axes = canvas.subplots()
    handles: dict[str, Artist] = {}
    for index, (way, by_site) in enumerate(ways.items()):
        style: dict[str, Any] = {"color": COLOURS[index], "marker": MARKERS[index]} | _DOTS
        (handles[labels[way]],) = axes.plot([], [], **style)
        shift = (index - (len(ways) - 1) / 2) * 0.75 / len(ways)
        for y, site in enumerate(sites):
            if known := by_site.get(site):
                mark(axes, y + shift, known, style)
    for y, site in enumerate(sites):
        if not any(by_site.get(site) for by_site in ways.values()):
            axes.text(0.5, y, _NOTHING, transform=axes.get_yaxis_transform(), **_ASIDE)
    _name_rows(axes, [OVERALL if site is None else names[site] for site in sites])
    if None in found:
        axes.axhspan(-0.5, 0.5, color=PALEST, zorder=0, lw=0)
        axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_xlabel(label)
    axes.grid(axis="x")
    add_legend(canvas, handles, below=below)


def plot_cross_sites(
    values: Mapping[str, Mapping[str, float | None]], metric: str, of: str
) -> Figure | None:
    """Plot how the model of each site does at each site, as a table that is shaded.

    Args:
      values: who trained the model (a site, or a way such as "federated") → site whose images it
        was tested on → the metric, None where it is withheld.
      metric: its name in METRICS.
      of: what was measured, in words.
    """
    tested = list(dict.fromkeys(site for by_site in values.values() for site in by_site))
    table = np.array(
        [[by_site.get(site) for site in tested] for by_site in values.values()], np.float64
    ).reshape(len(values), len(tested))
    if np.isnan(table).all():
        return None
    # Shades end at whole tenths, so that a difference of nothing does not look like much.
    low, high = np.floor(np.nanmin(table) * 10) / 10, np.ceil(np.nanmax(table) * 10) / 10

    shades = (table - low) / max(high - low, 0.1)
    texts = [["–" if np.isnan(v) else f"{v:.2f}".removeprefix("0") for v in row] for row in table]
    names = shorten_names({*values, *tested}, _LONGEST)

    def draw(canvas: Canvas) -> None:
        side = 0.36 if len(tested) <= 8 else 0.3
        canvas.set_size_inches(max(WIDTH, 1.5 + side * len(tested)), 1.4 + 0.3 * len(values))
        axes = canvas.subplots()
        draw_cells(axes, shades, texts, size=7)
        axes.set_xticks(range(len(tested)), [names[site] for site in tested], rotation=90)
        axes.set_yticks(range(len(values)), [names[site] for site in values])
        axes.set_xlabel("tested at")
        axes.set_ylabel("trained at")

    caption = f"The darkest is {high:.1f}, the lightest {low:.1f}."
    if np.isnan(table).any():
        caption += " Hatched, –: withheld."
    return draw_figure(draw, f"{_name(metric)} of models across sites: {of}", caption)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _name(metric: str) -> str:
    label = label_metric(metric)
    return label[:1].upper() + label[1:]


def _is_higher_better(metric: str) -> bool:
    return metric not in METRICS or METRICS[metric].higher
