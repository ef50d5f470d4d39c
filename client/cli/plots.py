"""A plot of what was spent: ε over time."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure

from client.storage import explain_disk_errors
from common.errors import SiteError
from common.support.plot_style import COLOURS, INK, write_plot


def plot_spending(
    points: Sequence[tuple[datetime, float]],
    unaccounted: Sequence[datetime],
    path: Path,
    *,
    delta: float,
    budget: float | None,
) -> None:
    """ε of the whole site over time, its budget, and what was not accounted.

    Args:
      points: Moments, in order, and ε from then on.
      unaccounted: When rounds left that were trained without differential privacy.
      path: The PNG to write.
      delta: The δ of ε.
      budget: The largest ε allowed; None for no limit.
    """

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7, 3.6)
        axes = figure.subplots()
        if points:
            moments, values = zip(*points, strict=True)
            shown = "o" if len(points) == 1 else ""
            axes.step(moments, values, shown, where="post", color=COLOURS[0], lw=2, label="spent")
        if budget is not None:
            axes.axhline(budget, color=INK, ls="--", lw=1.2, label=f"budget {budget:g}")
        if unaccounted:
            at = date2num(unaccounted)  # type: ignore[no-untyped-call]
            style: Any = {"color": COLOURS[5], "ls": "", "marker": "|", "ms": 9, "clip_on": False}
            label = "without privacy, not accounted"
            axes.plot(at, [0.0] * len(unaccounted), label=label, **style)
        if not points and not unaccounted:
            axes.text(0.5, 0.5, "Nothing was spent.", ha="center", transform=axes.transAxes)
        locator = AutoDateLocator(maxticks=7)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        formatter = ConciseDateFormatter(locator)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_formatter(formatter)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"ε per training patient at δ = {delta:g}")
        axes.grid(axis="y")
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=3)

    with explain_disk_errors(path, SiteError):
        write_plot(draw, path)
