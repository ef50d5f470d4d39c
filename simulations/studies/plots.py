"""Plots of several runs: each written whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.metrics.metrics import label_metric
from common.metrics.statistics import Estimate
from common.support.plot_style import COLOURS, INK, MARKERS, PALEST, write_plot


def plot_comparison(
    results: Mapping[str, Mapping[str | None, Estimate | None]],
    metric: str,
    path: Path,
    *,
    spread: str = "95 % interval",
) -> None:
    """Plot one metric by site and way of training: dots with their 95 % intervals.

    Args:
      results: way of training ("local", "federated", "pooled", …; at most six) → site (None for
        overall, if there is one) → estimate, None where it is undefined.
      metric: its name in METRICS, or in words.
      path: the PNG to write.
      spread: the meaning of `low` and `high` of the estimates, in words.
    """
    found = dict.fromkeys(site for by_site in results.values() for site in by_site)
    rows = sorted(found, key=lambda site: site is not None)

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7, 1.4 + (0.12 + 0.16 * len(results)) * len(rows))
        axes = figure.subplots()
        for index, (setting, by_site) in enumerate(results.items()):
            shift = (index - (len(results) - 1) / 2) * 0.7 / len(results)
            _dots(axes, rows, by_site, shift, setting, COLOURS[index], MARKERS[index])
        axes.set_yticks(range(len(rows)), [site or "overall" for site in rows])
        if None in found:
            axes.axhspan(-0.5, 0.5, color=PALEST, zorder=0, lw=0)
            axes.get_yticklabels()[0].set_fontweight("bold")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{label_metric(metric)} (with {spread})")
        axes.grid(axis="x")
        figure.legend(loc="outside upper center", ncols=len(results))

    write_plot(draw, path)


def plot_privacy_utility(
    results: Mapping[str, Mapping[float | None, Estimate | None]],
    shown: Mapping[float | None, float | None],
    path: Path,
) -> None:
    """Plot the cost of each ε: a line for each figure, with 95 % intervals.

    Args:
      results: figure → ε (None without privacy) → estimate, None where it is undefined.
      shown: ε → the least that an audit shows it to be, None where there was none.
      path: the PNG to write.
    """
    levels = sorted({e for by in results.values() for e in by}, key=lambda e: (e is None, e or 0))
    names = ["none" if level is None else f"{level:g}" for level in levels]
    audited = [shown.get(level) for level in levels]
    names = [n if b is None else f"{n}\n≥ {b:.2f}" for n, b in zip(names, audited, strict=True)]

    def draw(figure: Figure) -> None:
        figure.set_size_inches(7, 4)
        axes = figure.subplots()
        for index, (name, by_level) in enumerate(results.items()):
            known = [(x, f) for x, level in enumerate(levels) if (f := by_level.get(level))]
            x, colour = [place for place, _ in known], COLOURS[index]
            axes.vlines(x, [f.low for _, f in known], [f.high for _, f in known], color=colour)
            heights = [f.value for _, f in known]
            axes.plot(x, heights, MARKERS[index], ls="-", lw=1.8, color=colour, label=name)
        axes.set_xticks(range(len(levels)), names)
        below = ", and what an audit shows it to be at least" if any(shown.values()) else ""
        axes.set_xlabel(f"ε of the study{below}")
        axes.set_ylabel("on the test images of all sites")
        axes.grid(axis="y")
        figure.legend(loc="outside upper center", ncols=len(results))

    write_plot(draw, path)


def plot_audit(bounds: Mapping[float | None, Mapping[str, float]], path: Path) -> None:
    """Plot what an audit shows against what was promised; on or below the line it holds.

    Args:
      bounds: ε (None without privacy, which promises nothing) → way to guess → ε that is shown.
      path: the PNG to write.
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
        figure.legend(loc="outside upper center", ncols=len(ways) + 1)

    write_plot(draw, path)


def plot_sweep(
    scores: Mapping[str, Sequence[float | None]],
    metric: str,
    path: Path,
    *,
    keys: str,
    chosen: str | None,
) -> None:
    """Plot the validation score by setting: a dot for each seed, a diamond for their mean.

    Args:
      scores: setting → score of each seed, None where it was not disclosed.
      metric: its name in METRICS.
      path: the PNG to write.
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
        figure.legend(loc="outside upper center", ncols=2)

    write_plot(draw, path)


def _dots(
    axes: Axes,
    rows: Sequence[str | None],
    by_site: Mapping[str | None, Estimate | None],
    shift: float,
    setting: str,
    colour: str,
    marker: str,
) -> None:
    known = [(y + shift, found) for y, site in enumerate(rows) if (found := by_site.get(site))]
    heights, values = [y for y, _ in known], [found.value for _, found in known]
    axes.hlines(
        heights, [f.low for _, f in known], [f.high for _, f in known], color=colour, lw=1.8
    )
    axes.plot(values, heights, marker, color=colour, ms=6, mec="white", mew=0.8, label=setting)
