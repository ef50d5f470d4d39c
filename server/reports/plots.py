"""Plots of a run as files, each written whole or not at all."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from common.metrics.counts import Counts
from common.page.plots import WIDTH
from common.page.plots_of_counts import draw_confusion
from common.page.plots_of_rounds import Row, draw_curves, list_drawn
from common.support.plot_style import Title, write_plot

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
    shown = list_drawn(rows, keys)
    if not shown:
        path.unlink(missing_ok=True)
        return

    def draw(figure: Figure) -> None:
        figure.set_size_inches(WIDTH * len(shown), 3.2)
        panels = figure.subplots(1, len(shown), squeeze=False)
        draw_curves(figure, list(panels[0]), rows, shown, below=True)

    write_plot(draw, path, title)


def plot_confusion(counts: Counts, classes: Sequence[str], path: Path, title: Title) -> None:
    """Plot the confusion matrix: shares of each true class as colour, images as numbers.

    Of no images there is no plot.
    """
    if not counts.confusion.any():
        path.unlink(missing_ok=True)
        return
    write_plot(lambda figure: draw_confusion(figure, counts, classes), path, title)
