"""Plots for a page, as SVG: text stays text, and the same figures give the same bytes."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from common.metrics.counts import Floats, Ints
from common.page.blocks import Figure
from common.page.svg import tidy_svg
from common.support.plot_style import PALE, STYLE

WIDTH = 3.6
"""Inches of a plot that a phone shows without scrolling."""

_POINTS = 300
"""The most points of a line: more cannot be told apart."""

_LETTERS = 14
"""Letters of a legend in an inch; before each name a mark takes room of five."""
_DARK = 0.715
"""The shade from which on white text can be read better than black."""


def draw_figure(draw: Callable[[Canvas], None], title: str, caption: str = "") -> Figure:
    """Draw a figure for a page.

    Args:
      draw: Draws on a fresh canvas of `WIDTH`, in the style of all plots; it may set the size.
      title: What it shows; no two figures of a page may share one.
      caption: What the reader should know.
    """
    # The salt keeps names in the SVG apart from those of other figures on the page.
    style = {**STYLE, "svg.fonttype": "none", "svg.hashsalt": title}
    text = StringIO()
    with mpl.rc_context(style), warnings.catch_warnings():
        # A browser has the letters that the font measured with lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        canvas = Canvas(figsize=(WIDTH, 2.6), layout="constrained")
        draw(canvas)
        canvas.savefig(text, format="svg")
        width, height = canvas.get_size_inches()
    return Figure(title, tidy_svg(text.getvalue(), (width, height), title), caption)


def add_legend(
    canvas: Canvas, handles: Mapping[str, Artist], title: str | None = None, *, below: bool = False
) -> None:
    """Explain marks and lines, in as many columns as their names leave room for.

    Args:
      canvas: to draw on.
      handles: mark or line → what it means.
      title: of the legend.
      below: Whether it stands below the plots, as where a title stands above them.
    """
    columns = int(canvas.get_figwidth() * _LETTERS / (5 + max(map(len, handles))))
    canvas.legend(
        list(handles.values()),
        list(handles),
        title=title,
        loc="outside lower center" if below else "outside upper center",
        ncols=max(1, min(columns, len(handles))),
    )


def thin_out(points: int) -> Ints:
    """Choose which points of a line to draw, the first and the last among them."""
    return np.unique(np.linspace(0, points - 1, min(points, _POINTS)).round().astype(np.int64))


def draw_cells(axes: Axes, shades: Floats, texts: Sequence[Sequence[str]], size: float) -> None:
    """Draw a table of shaded cells, its first row on top.

    Args:
      axes: to draw on.
      shades: float [rows, columns], 0 light to 1 dark; a cell of NaN is hatched.
      texts: of each cell.
      size: of the text, in points.
    """
    rows, columns = (np.arange(length + 1) - 0.5 for length in shades.shape)
    known = np.ma.masked_invalid(shades)
    axes.pcolormesh(columns, rows, known, cmap="Blues", vmin=0, vmax=1, clip_on=False)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for (y, x), shade in np.ndenumerate(shades):
        if np.isnan(shade):
            hatched: Any = {"fill": False, "ec": PALE, "lw": 0, "hatch": "////"}
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **hatched))
        style: Any = {"ha": "center", "va": "center", "fontsize": size, "in_layout": False}
        axes.text(x, y, texts[y][x], color="white" if shade > _DARK else "black", **style)
