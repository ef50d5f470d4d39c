"""Plots of how a study went, over its rounds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from common.metrics.metrics import label_metric
from common.page.blocks import Figure
from common.page.plots import WIDTH, add_legend, draw_figure, thin_out
from common.support.names import shorten_names
from common.support.plot_style import COLOURS, GREY, INK

Row = Mapping[str, Any]


def plot_learning(rows: Sequence[Row], metric: str, of: str) -> Figure | None:
    """Plot validation and training loss over the rounds: overall thick, each site thin.

    None where figures of one round alone were told, or none.

    Args:
      rows: one per round and site, with the keys `round`, `site` (None for overall), `loss` (of
        training in that round), `model_round` (rounds behind the model that was validated) and
        `metric`; None where there is no figure.
      metric: the metric of validation, its name in METRICS.
      of: what was trained, in words.
    """
    keys = list_drawn(rows, (metric, "loss"))
    if not keys:
        return None

    def draw(canvas: Canvas) -> None:
        canvas.set_size_inches(WIDTH, 0.6 + 1.9 * len(keys))
        draw_curves(canvas, list(canvas.subplots(len(keys), squeeze=False)[:, 0]), rows, keys)

    return draw_figure(draw, f"Learning over the rounds: {of}")


def list_drawn(rows: Sequence[Row], keys: Iterable[str]) -> list[str]:
    """List the keys that have figures; none where no key has figures of two rounds, a line."""
    rounds = {key: {x["model_round"] for x in rows if x.get(key) is not None} for key in keys}
    return [key for key, found in rounds.items() if found and max(map(len, rounds.values())) > 1]


def draw_curves(
    canvas: Canvas,
    panels: Sequence[Axes],
    rows: Sequence[Row],
    keys: Sequence[str],
    *,
    below: bool = False,
) -> None:
    """Draw each key of `rows` over the rounds on a panel of its own, with one legend for all.

    Args:
      canvas: of the panels.
      panels: one of each key.
      rows: as of `plot_learning`.
      keys: with a figure in some row.
      below: Whether the legend stands below the panels.
    """
    for axes, key in zip(panels, keys, strict=True):
        _draw_key(axes, rows, key)
    lines = {str(line.get_label()): line for axes in panels for line in axes.get_lines()}
    add_legend(canvas, {name: line for name, line in lines.items() if name != "_"}, below=below)


def _draw_key(axes: Axes, rows: Sequence[Row], key: str) -> None:
    by_site: dict[str | None, list[Row]] = {None: []}
    for row in rows:
        by_site.setdefault(row["site"], []).append(row)
    sites = sorted(site for site in by_site if site is not None)
    names = shorten_names(sites, 16)
    few = len(sites) <= len(COLOURS)
    for index, site in enumerate(sites):
        if few:
            style = {"color": COLOURS[index], "lw": 1, "label": names[site]}
        else:
            style = {"color": GREY, "lw": 0.7, "label": "_" if index else "each site"}
        _draw_line(axes, by_site[site], key, **style)
    _draw_line(axes, by_site[None], key, label="overall", color=INK, lw=1.8)
    axes.set_title("Training loss" if key == "loss" else f"Validation {label_metric(key)}")
    axes.set_xlabel("round" if key == "loss" else "model after round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y")


def _draw_line(axes: Axes, rows: Sequence[Row], key: str, **style: Any) -> None:
    when = "round" if key == "loss" else "model_round"
    mine = sorted(rows, key=lambda row: int(row[when]))
    values = np.array([np.nan if row.get(key) is None else row[key] for row in mine])
    if np.isnan(values).all():
        return
    shown = thin_out(len(mine))
    marker = "o" if len(mine) <= 10 else ""  # a line cannot show a round that stands alone
    rounds = np.array([row[when] for row in mine])
    axes.plot(rounds[shown], values[shown], marker=marker, ms=3 * style["lw"], **style)
