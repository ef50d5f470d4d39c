"""How every plot looks, and how it is written."""

import textwrap
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from common.support import files

# Okabe and Ito (2008): told apart with any colour vision. Black is kept for the overall figure.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = ("o", "s", "D", "^", "v", "P")
INK, GREY, PALE, PALEST = "#222222", "#9AA0A6", "#E3E6E9", "#F3F4F6"

_LETTERS = 15
"""Letters of a title in an inch."""
_LINE = 0.175
"""Inches of a line of a title."""

STYLE: Any = {
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 8.5,
    "axes.linewidth": 0.6,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.2,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.constrained_layout.h_pad": 0.03,
    "savefig.dpi": 200,
    "text.parse_math": False,  # names of sites and classes are text, never formulas
}


class Title(NamedTuple):
    """What a plot shows, and of what, so that it can be told from others."""

    what: str
    of: str


def write_plot(draw: Callable[[Figure], None], path: Path, title: Title | None = None) -> None:
    """Draw on a fresh figure and put the PNG in place in one step."""
    drawn = BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        draw(figure)
        if title is not None:
            _write_title(figure, title)
        figure.savefig(drawn, format="png")
    files.write(path, drawn.getvalue())


def _write_title(figure: Figure, title: Title) -> None:
    """The title at the left of a plot's own size, and below it of what, in as many lines as needed.

    Above the axes, so legends stand elsewhere.
    """
    letters = int(figure.get_figwidth() * _LETTERS)
    lines = [line for part in title for line in textwrap.wrap(part, letters)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", size=9, linespacing=1.4)
    figure.set_figheight(figure.get_figheight() + _LINE * len(lines))
