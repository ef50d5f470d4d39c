"""Pictures of a run, each written whole or not at all."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.metrics.metrics import METRICS, Counts
from common.metrics.statistics import Estimate
from common.support import files
from common.support.plot_style import COLOURS, GREY, INK, MARKERS, PALEST, STYLE

Row = Mapping[str, Any]

_NOT_FIGURES = ("round", "model_round", "site")


def curves(rows: Sequence[Row], path: Path) -> None:
    """Every measured key over the rounds: overall thick, each site thin.

    Args:
      rows: one per round and site, with the keys `round`, `site` (None for overall), `loss` (of
        training in that round), `model_round` (rounds behind the model that was validated) and any
        validation metrics by name; None where there is no figure.
      path: the PNG to write.
    """
    keys = dict.fromkeys(key for row in rows for key in row if key not in _NOT_FIGURES)
    shown = [key for key in keys if any(row.get(key) is not None for row in rows)]

    def draw(figure: Figure) -> None:
        figure.set_size_inches(1.5 + 4.2 * max(1, len(shown)), 3.6)
        panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
        for axes, key in zip(panels, shown, strict=False):
            _lines(axes, rows, key)
        if shown:
            lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
            named = {n: line for n, line in lines.items() if not str(n).startswith("_")}
            figure.legend(named.values(), named.keys(), loc="outside right upper")
        else:
            panels[0].set_axis_off()
            panels[0].text(0.5, 0.5, "No figures were disclosed.", ha="center")

    _write(draw, path)


def _lines(axes: Axes, rows: Sequence[Row], key: str) -> None:
    by_site: dict[str | None, list[Row]] = {None: []}
    for row in rows:
        by_site.setdefault(row["site"], []).append(row)
    sites = sorted(site for site in by_site if site is not None)
    few = len(sites) <= len(COLOURS)
    _line(axes, by_site[None], key, label="overall", color=INK, lw=2.6, zorder=3)
    for index, site in enumerate(sites):
        if few:
            _line(axes, by_site[site], key, label=site, color=COLOURS[index], lw=1.3)
        else:
            name = "_" if index else "each site"
            _line(axes, by_site[site], key, label=name, color=GREY, lw=0.9, alpha=0.6)
    axes.set_title("Training loss" if key == "loss" else f"Validation {_label(key)}")
    axes.set_xlabel("round" if key == "loss" else "model after round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y")


def _line(axes: Axes, rows: Sequence[Row], key: str, **style: Any) -> None:
    when = "round" if key == "loss" else "model_round"
    mine = sorted(rows, key=lambda row: int(row[when]))
    values = [np.nan if row.get(key) is None else row[key] for row in mine]
    if not np.isnan(values).all():
        marker = "o" if len(mine) <= 10 else ""  # a line cannot show a round that stands alone
        axes.plot([row[when] for row in mine], values, marker=marker, ms=3 * style["lw"], **style)


def confusion(counts: Counts, classes: Sequence[str], path: Path) -> None:
    """Who is taken for whom: shares of each true class as colour, images as numbers."""
    table = counts.confusion
    totals = table.sum(axis=1)
    shares = table / np.maximum(totals, 1)[:, None]
    side = 1.8 + 0.62 * len(classes)

    def draw(figure: Figure) -> None:
        figure.set_size_inches(side + 0.6, side)
        axes = figure.subplots()
        edges = np.arange(len(classes) + 1) - 0.5
        axes.pcolormesh(edges, edges, shares, cmap="Blues", vmin=0, vmax=1, ec="white", lw=1.5)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_xticks(
            range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor"
        )
        rows = [f"{name}  ({total})" for name, total in zip(classes, totals, strict=True)]
        axes.set_yticks(range(len(classes)), rows)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true (images)")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        for (row, column), images in np.ndenumerate(table):
            share = shares[row, column]
            ink = "white" if share > 0.6 else INK if images else GREY
            text = f"{images}\n{share:.0%}" if images else "0"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)

    _write(draw, path)


def comparison(
    results: Mapping[str, Mapping[str | None, Estimate | None]],
    metric: str,
    path: Path,
    *,
    spread: str = "95 % interval",
) -> None:
    """One metric by site and way of training: dots with their 95 % intervals.

    Args:
      results: way of training ("local", "federated", "pooled", …; at most six) → site (None for
        overall, if there is one) → estimate, None where it is undefined.
      metric: its name in METRICS, or in words.
      path: the PNG to write.
      spread: what `low` and `high` of the estimates are.
    """
    found = dict.fromkeys(site for by_site in results.values() for site in by_site)
    rows = sorted(found, key=lambda site: site is not None)

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7, 1.4 + (0.12 + 0.16 * len(results)) * len(rows))
        axes = figure.subplots()
        for index, (setting, by_site) in enumerate(results.items()):
            shift = (index - (len(results) - 1) / 2) * 0.7 / len(results)
            _dots(axes, rows, by_site, shift, setting, COLOURS[index], MARKERS[index])
        axes.set_yticks(range(len(rows)), [site or "overall" for site in rows])
        if None in found:
            axes.axhspan(-0.5, 0.5, color=PALEST, zorder=0, lw=0)
            axes.get_yticklabels()[0].set_fontweight("bold")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{_label(metric)} (with {spread})")
        axes.grid(axis="x")
        figure.legend(loc="outside upper center", ncols=len(results))

    _write(draw, path)


def utility(results: Mapping[str, Mapping[float | None, Estimate | None]], path: Path) -> None:
    """What each ε costs: a line for each figure, with 95 % intervals.

    Args:
      results: figure → ε (None without privacy) → estimate, None where it is undefined.
      path: the PNG to write.
    """
    levels = sorted({e for by in results.values() for e in by}, key=lambda e: (e is None, e or 0))
    names = ["none" if level is None else f"{level:g}" for level in levels]

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7, 4)
        axes = figure.subplots()
        for index, (name, by_level) in enumerate(results.items()):
            known = [(x, f) for x, level in enumerate(levels) if (f := by_level.get(level))]
            x, colour = [place for place, _ in known], COLOURS[index]
            axes.vlines(x, [f.low for _, f in known], [f.high for _, f in known], color=colour)
            heights = [f.value for _, f in known]
            axes.plot(x, heights, MARKERS[index], ls="-", lw=1.8, color=colour, label=name)
        axes.set_xticks(range(len(levels)), names)
        axes.set_xlabel("ε of the study")
        axes.set_ylabel("on the test images of all sites")
        axes.grid(axis="y")
        figure.legend(loc="outside upper center", ncols=len(results))

    _write(draw, path)


def sweep(
    scores: Mapping[str, Sequence[float | None]],
    metric: str,
    path: Path,
    *,
    keys: str,
    chosen: str | None,
) -> None:
    """Validation score by setting: a dot for each seed, a diamond for their mean.

    Args:
      scores: setting → score of each seed, None where it was not disclosed.
      metric: its name in METRICS.
      path: the PNG to write.
      keys: what the settings are values of.
      chosen: the best setting.
    """

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7, 1.6 + 0.34 * len(scores))
        axes = figure.subplots()
        axes.set_yticks(range(len(scores)), list(scores))
        for y, (name, values) in enumerate(scores.items()):
            known = [x for x in values if x is not None]
            colour = COLOURS[0] if name == chosen else INK
            named = ("_", "_") if y else ("each seed", "mean")
            axes.plot(
                known, [y] * len(known), "o", color=colour, ms=6, mew=0, alpha=0.35, label=named[0]
            )
            middle = [np.mean(known)] if known and len(known) == len(values) else []
            axes.plot(
                middle, [y] * len(middle), "D", color=colour, ms=8, mec="white", label=named[1]
            )
            if name == chosen:
                axes.axhspan(y - 0.5, y + 0.5, color=PALEST, zorder=0, lw=0)
                axes.get_yticklabels()[y].set_fontweight("bold")
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_title(keys)
        axes.set_xlabel(f"validation {_label(metric)}")
        axes.grid(axis="x")
        figure.legend(loc="outside upper center", ncols=2)

    _write(draw, path)


def _dots(
    axes: Axes,
    rows: Sequence[str | None],
    by_site: Mapping[str | None, Estimate | None],
    shift: float,
    setting: str,
    colour: str,
    marker: str,
) -> None:
    known = [(y + shift, found) for y, site in enumerate(rows) if (found := by_site.get(site))]
    heights, values = [y for y, _ in known], [found.value for _, found in known]
    axes.hlines(
        heights, [f.low for _, f in known], [f.high for _, f in known], color=colour, lw=1.8
    )
    axes.plot(values, heights, marker, color=colour, ms=6, mec="white", mew=0.8, label=setting)


def _label(metric: str) -> str:
    known = METRICS.get(metric)
    return known.label if known else metric.replace("_", " ")


def _write(draw: Callable[[Figure], None], path: Path) -> None:
    """Draw on a fresh figure and put the PNG in place in one step."""
    drawn = BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        draw(figure)
        figure.savefig(drawn, format="png")
    files.write(path, drawn.getvalue())
