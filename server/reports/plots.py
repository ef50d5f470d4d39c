"""Plots of a run, each written whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.metrics.counts import Counts
from common.metrics.metrics import label_metric
from common.support.plot_style import COLOURS, GREY, INK, Title, write_plot

Row = Mapping[str, Any]

_NOT_FIGURES = ("round", "model_round", "site")


def plot_curves(rows: Sequence[Row], path: Path, title: Title) -> None:
    """Plot every measured key over the rounds: overall in a thick line, each site in a thin one.

    Where figures of one round alone were told, or none, there is no plot.

    Args:
      rows: one per round and site, with the keys `round`, `site` (None for overall), `loss` (of
        training in that round), `model_round` (rounds behind the model that was validated) and any
        validation metrics by name; None where there is no figure.
      path: the PNG to write.
      title: what stands above it.
    """
    keys = dict.fromkeys(key for row in rows for key in row if key not in _NOT_FIGURES)
    rounds = {key: {x["model_round"] for x in rows if x.get(key) is not None} for key in keys}
    shown = [key for key in keys if rounds[key]]
    if max(map(len, rounds.values()), default=0) < 2:
        path.unlink(missing_ok=True)
        return

    def draw(figure: Figure) -> None:
        figure.set_size_inches(1.5 + 4.2 * len(shown), 4)
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, key in zip(panels, shown, strict=True):
            _lines(axes, rows, key)
        lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
        named = {n: line for n, line in lines.items() if not str(n).startswith("_")}
        figure.legend(named.values(), named.keys(), loc="outside right upper")

    write_plot(draw, path, title)


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
    axes.set_title("Training loss" if key == "loss" else f"Validation {label_metric(key)}")
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


def plot_confusion(counts: Counts, classes: Sequence[str], path: Path, title: Title) -> None:
    """Plot the confusion matrix: shares of each true class as colour, images as numbers.

    Of no images there is no plot.
    """
    if not counts.confusion.any():
        path.unlink(missing_ok=True)
        return
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

    write_plot(draw, path, title)
