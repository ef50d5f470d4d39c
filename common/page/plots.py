"""Plots for a page, as SVG: text stays text, and the same figures give the same bytes."""

import hashlib
from collections.abc import Callable
from io import StringIO

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from common.page.blocks import Figure
from common.support.plot_style import STYLE


def draw_figure(draw: Callable[[Canvas], None], title: str, caption: str = "") -> Figure:
    """Draw a figure for a page.

    Args:
      draw: Draws on a fresh canvas, in the style of all plots.
      title: What it shows; no two figures of a page may share one.
      caption: What the reader should know.
    """
    # The salt keeps names in the SVG apart from those of other figures on the page.
    salt = hashlib.sha256(title.encode()).hexdigest()[:8]
    text = StringIO()
    with mpl.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": salt}):
        canvas = Canvas(figsize=(5, 3.4), layout="constrained")
        draw(canvas)
        canvas.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    drawn = text.getvalue()
    return Figure(title, _describe(drawn[drawn.index("<svg") :], title, salt), caption)


def _describe(svg: str, title: str, salt: str) -> str:
    """The SVG with names of its own, and a label for those who cannot see it."""
    from markupsafe import escape

    named = svg.replace('id="', f'id="{salt}-').replace("url(#", f"url(#{salt}-")
    linked = named.replace('href="#', f'href="#{salt}-')
    return linked.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
