"""Plots for a page, as SVG: text stays text, and the same figures give the same bytes."""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure as Canvas

from common.metrics.counts import Ints
from common.page.blocks import Figure
from common.page.svg import tidy_svg
from common.support.plot_style import STYLE

WIDTH = 3.6
"""Inches of a plot that a phone shows without scrolling."""

_POINTS = 300
"""The most points of a line: more cannot be told apart."""

_SMALL: Any = {
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.2,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.constrained_layout.h_pad": 0.03,
}


def draw_figure(draw: Callable[[Canvas], None], title: str, caption: str = "") -> Figure:
    """Draw a figure for a page.

    Args:
      draw: Draws on a fresh canvas of `WIDTH`, in the style of all plots; it may set the size.
      title: What it shows; no two figures of a page may share one.
      caption: What the reader should know.
    """
    # The salt keeps names in the SVG apart from those of other figures on the page.
    salt = hashlib.sha256(title.encode()).hexdigest()[:8]
    style = {**STYLE, **_SMALL, "svg.fonttype": "none", "svg.hashsalt": salt}
    text = StringIO()
    with mpl.rc_context(style), warnings.catch_warnings():
        # A browser has the letters that the font measured with lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        canvas = Canvas(figsize=(WIDTH, 2.6), layout="constrained")
        draw(canvas)
        canvas.savefig(text, format="svg")
        width, height = canvas.get_size_inches()
    return Figure(title, tidy_svg(text.getvalue(), (width, height), title, salt), caption)


def add_legend(canvas: Canvas, handles: Mapping[str, Artist], title: str | None = None) -> None:
    """Explain marks and lines above the plots, in as many columns as their names leave room for."""
    canvas.legend(
        list(handles.values()),
        list(handles),
        title=title,
        loc="outside upper center",
        ncols=min(3 if max(map(len, handles)) <= 11 else 2, len(handles)),
    )


def thin_out(points: int) -> Ints:
    """Choose which points of a line to draw, the first and the last among them."""
    return np.unique(np.linspace(0, points - 1, min(points, _POINTS)).round().astype(np.int64))
