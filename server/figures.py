"""Pictures of a run, each written whole or not at all."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from common.evidence import Estimate
from common.metrics import METRICS, Counts, Floats

# Okabe and Ito (2008): told apart with any colour vision. Black is kept for the overall figure.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = ("o", "s", "D", "^", "v", "P")
INK, GREY = "#222222", "#9AA0A6"

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": "#E6E8EB",
    "legend.frameon": False,
    "savefig.dpi": 150,
    # Names of sites and classes are text, never formulas.
    "text.parse_math": False,
}


def curves(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Draw every measured key over the rounds: overall thick, each site thin.

    Args:
      rows: one per round and site, with the keys `round`, `site` (None for overall), `loss` (of
        training) and validation metrics by their names in METRICS; None where not disclosed.
      path: the PNG to write.
    """
    keys = dict.fromkeys(key for row in rows for key in row if key not in ("round", "site"))
    shown = [key for key in keys if any(row.get(key) is not None for row in rows)]
    sites = sorted({str(row["site"]) for row in rows if row["site"] is not None})

    def draw(figure: Figure) -> None:
        figure.set_size_inches(1.5 + 4.5 * max(1, len(shown)), 3.8)
        panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
        for axes, key in zip(panels, shown, strict=False):
            _lines(axes, rows, sites, key)
        if shown:
            handles, names = panels[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside right upper")
        else:
            panels[0].set_axis_off()
            panels[0].text(0.5, 0.5, "No figures were disclosed.", ha="center", color=INK)

    _write(draw, path)


def _lines(
    axes: Axes, rows: Sequence[Mapping[str, object]], sites: Sequence[str], key: str
) -> None:
    few = len(sites) <= len(COLOURS)
    for index, site in enumerate(sites):
        colour = COLOURS[index] if few else GREY
        name = site if few else "each site" if index == 0 else "_"
        _line(axes, rows, site, key, name=name, color=colour, lw=1.1, ms=3, alpha=0.9 if few else 0.6)
    _line(axes, rows, None, key, name="overall", color=INK, lw=2.6, ms=4, zorder=3)
    axes.set_title("Training loss" if key == "loss" else f"Validation {_label(key)}")
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
