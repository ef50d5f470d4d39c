"""Plots of several runs: each written whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.metrics.metrics import label_metric
from common.page.plots_of_sites import draw_by_site, draw_estimate, draw_values
from common.support.plot_style import COLOURS, INK, MARKERS, PALEST, Title, write_plot
from simulations.studies.over_seeds import Seeded


def plot_comparison(
    results: Mapping[str, Mapping[str | None, Seeded]], metric: str, path: Path, title: Title
) -> None:
    """Plot one metric by site and way of training: dots with 95 % intervals, or one for each seed.

    Where there is no figure at all there is no plot.

    Args:
      results: way of training ("local", "federated", "pooled", …; at most six) → site (None for
        overall, if there is one) → its figures.
      metric: its name in METRICS, or in words.
      path: the PNG to write.
      title: what stands above it.
    """
    every = [figures for by_site in results.values() for figures in by_site.values()]
    if not any(figures.known for figures in every):
        path.unlink(missing_ok=True)
        return
    known = {
        way: {site: figures if figures.known else None for site, figures in by_site.items()}
        for way, by_site in results.items()
    }

    def draw(figure: Figure) -> None:
        label = f"{label_metric(metric)},\n{_explain(every)}"
        draw_by_site(figure, known, label, _mark, below=True)

    write_plot(draw, path, title)


def plot_privacy_utility(
    results: Mapping[str, Mapping[float | None, Seeded]],
    shown: Mapping[float | None, float | None],
    path: Path,
    title: Title,
) -> None:
    """Plot the cost of each ε: a line for each figure, with 95 % intervals or a dot for each seed.

    Args:
      results: figure → ε (None without privacy) → its figures.
      shown: ε → the least that an audit shows it to be, None where there was none.
      path: the PNG to write.
      title: what stands above it.
    """
    levels = sorted({e for by in results.values() for e in by}, key=lambda e: (e is None, e or 0))
    names = ["none" if level is None else f"{level:g}" for level in levels]
    audited = [shown.get(level) for level in levels]
    names = [n if b is None else f"{n}\n≥ {b:.2f}" for n, b in zip(names, audited, strict=True)]

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7, 4)
        axes = figure.subplots()
        for index, (name, by_level) in enumerate(results.items()):
            known = [(x, f) for x, e in enumerate(levels) if (f := by_level[e]).known]
            colour, marker = COLOURS[index], MARKERS[index]
            for x, f in known:
                if f.estimate:
                    axes.vlines(x, f.estimate.low, f.estimate.high, color=colour)
                else:
                    axes.plot([x] * len(f.known), f.known, marker, color=colour, alpha=0.5)
            sure = all(f.estimate for _, f in known)
            style = marker if sure else ""  # of few seeds the line alone is their mean
            places, means = [x for x, _ in known], [mean(f.known) for _, f in known]
            axes.plot(places, means, marker=style, ls="-", lw=1.8, color=colour, label=name)
        axes.set_xticks(range(len(levels)), names)
        below = ", and what an audit shows it to be at least" if any(shown.values()) else ""
        axes.set_xlabel(f"ε of the study{below}")
        told = _explain([f for by in results.values() for f in by.values()])
        axes.set_ylabel(f"test images of all sites, {told}")
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=len(results))

    write_plot(draw, path, title)


def plot_audit(
    bounds: Mapping[float | None, Mapping[str, float]], path: Path, title: Title
) -> None:
    """Plot what an audit shows against what was promised; on or below the line it holds.

    Args:
      bounds: ε (None without privacy, which promises nothing) → way to guess → ε that is shown.
      path: the PNG to write.
      title: what stands above it.
    """
    levels = sorted(bounds, key=lambda e: (e is None, e or 0))
    ways = list(dict.fromkeys(way for by in bounds.values() for way in by))

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7, 4)
        axes = figure.subplots()
        promised = [(x, e) for x, e in enumerate(levels) if e is not None]
        if promised:
            axes.plot(
                *zip(*promised, strict=True), "_", ms=24, mew=2, color="0.4", label="promised"
            )
        for index, way in enumerate(ways):
            shown = [(x, bounds[e][way]) for x, e in enumerate(levels) if way in bounds[e]]
            x, y = zip(*shown, strict=True)
            axes.plot(x, y, MARKERS[index], color=COLOURS[index], label=f"shown by {way}")
        axes.set_xticks(range(len(levels)), ["none" if e is None else f"{e:g}" for e in levels])
        axes.set_xlim(-0.5, len(levels) - 0.5)
        axes.set_xlabel("ε of the study")
        axes.set_ylabel("ε")
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=len(ways) + 1)

    write_plot(draw, path, title)


def plot_sweep(
    scores: Mapping[str, Sequence[float | None]],
    metric: str,
    path: Path,
    title: Title,
    *,
    keys: str,
    chosen: str | None,
) -> None:
    """Plot the validation score by setting: a dot for each seed, a diamond for their mean.

    Args:
      scores: setting → score of each seed, None where it was not disclosed.
      metric: its name in METRICS.
      path: the PNG to write.
      title: what stands above it.
      keys: the keys of the study whose values the settings are.
      chosen: the best setting.
    """

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7, 1.6 + 0.34 * len(scores))
        axes = figure.subplots()
        axes.set_yticks(range(len(scores)), list(scores))
        for y, (name, values) in enumerate(scores.items()):
            known = [x for x in values if x is not None]
            colour = COLOURS[0] if name == chosen else INK
            named = ("_", "_") if y else ("each seed", "mean")
            axes.plot(
                known, [y] * len(known), "o", color=colour, ms=6, mew=0, alpha=0.35, label=named[0]
            )
            middle = [np.mean(known)] if known and len(known) == len(values) else []
            axes.plot(
                middle, [y] * len(middle), "D", color=colour, ms=8, mec="white", label=named[1]
            )
            if name == chosen:
                axes.axhspan(y - 0.5, y + 0.5, color=PALEST, zorder=0, lw=0)
                axes.get_yticklabels()[y].set_fontweight("bold")
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_title(keys)
        axes.set_xlabel(f"validation {label_metric(metric)}")
        axes.grid(axis="x")
        figure.legend(loc="outside lower center", ncols=2)

    write_plot(draw, path, title)


def _mark(axes: Axes, y: float, found: Seeded, style: Mapping[str, Any]) -> None:
    """Draw the mean with its interval or, of few seeds, the figure of each."""
    if found.estimate:
        draw_estimate(axes, y, found.estimate, style)
    else:
        draw_values(axes, y, found.known, style)


def _explain(every: Sequence[Seeded]) -> str:
    """What is drawn of figures."""
    sure = any(figures.estimate for figures in every)
    return "with 95 % intervals" if sure else "a dot for each seed"
