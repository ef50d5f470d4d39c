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

STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": PALE,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "savefig.dpi": 150,
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
    lines = [textwrap.wrap(title.what, int(letters * 0.8)), textwrap.wrap(title.of, letters)]
    what, of = ("\n".join(part) for part in lines)
    figure.suptitle(f"{what}\n{of}", x=0.01, ha="left", size=9, linespacing=1.4)
