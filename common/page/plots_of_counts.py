"""Plots of what one model did on some images, by class.

Each takes `of`, words for the model and the images, for its title, and tells their number. Each
gives None where there is nothing to show, as where scores are withheld, and of more than 40
classes, which nobody can tell apart, and a page could not hold. Names of classes may be any text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from common.metrics.calibration import Calibration, calibration, expected_error_if_perfect
from common.metrics.counts import Counts, Floats, Ints
from common.metrics.curves import net_benefit, roc_curve
from common.metrics.metrics import class_auroc
from common.metrics.statistics import wilson
from common.page.blocks import Figure
from common.page.plots import WIDTH, add_legend, draw_cells, draw_figure, thin_out
from common.support.names import shorten_names
from common.support.plot_style import COLOURS, GREY, INK, MARKERS, PALE

_LONGEST = 12
"""Characters of the name of a class."""
_MOST = 40
"""Classes in a picture: of hundreds, drawing would take hours."""
_DASHES = ("-", "--", "-.", ":")
_THRESHOLDS: Floats = np.linspace(0.01, 0.9, 90)
_COLUMNS = 3
"""Panels side by side."""


def plot_roc(counts: Counts, classes: Sequence[str], of: str) -> Figure | None:
    """Plot the ROC curve of each class against the rest; two classes share one, of the second.

    Args:
      counts: of one model on one set of images.
      classes: their names.
      of: which model and images, in words.
    """
    shown = {k: curve for k in _list_sides(counts) if (curve := roc_curve(counts, k))}
    if not shown or len(classes) > _MOST:
        return None
    names, images = shorten_names(classes, _LONGEST), counts.positive.sum(axis=1)

    def draw(canvas: Canvas) -> None:
        canvas.set_size_inches(WIDTH, 3.5 + 0.17 * (len(shown) // 2))
        axes, lines = canvas.subplots(), {}
        axes.plot([0, 1], [0, 1], color=GREY, lw=0.8)
        for k, (fpr, tpr) in shown.items():
            label = f"{names[classes[k]]} {_share(class_auroc(counts, k))} ({images[k]})"
            kept = thin_out(len(fpr))
            middle = [int(np.abs(fpr[kept] + tpr[kept] - 1).argmin())]
            style = _style_class(k)
            (lines[label],) = axes.plot(fpr[kept], tpr[kept], markevery=middle, **style)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
        add_legend(canvas, lines, title="class, AUROC (images)")

    return draw_figure(draw, f"ROC curves: {of}, {images.sum()} images")


def plot_reliability(
    counts: Counts, classes: Sequence[str], of: str, *, seed: int
) -> Figure | None:
    """Plot how often probabilities come true, of all classes together and of each.

    Args:
      counts: of one model on one set of images.
      classes: their names.
      of: which model and images, in words.
      seed: of what a perfectly calibrated model would show, see `expected_error_if_perfect`.
    """
    found = calibration(counts)
    if found is None or len(classes) > _MOST:
        return None
    perfect = expected_error_if_perfect(counts, seed=seed)
    names = shorten_names(classes, _LONGEST)
    panels = [("all classes", _pool(found))] + [
        (names[name], (found.predicted[k], found.observed[k], found.images[k]))
        for k, name in enumerate(classes)
    ]

    def draw(canvas: Canvas) -> None:
        grid = _draw_grid(canvas, [name for name, _ in panels])
        for k, (axes, (_, bins)) in enumerate(zip(grid, panels, strict=True)):
            _draw_bins(axes, *bins)
            if k:  # of all classes an image counts once a class: no interval holds
                _draw_intervals(axes, *bins)
        grid[0].set(ylim=(0, 1))
        canvas.supxlabel("probability", fontsize="medium")
        canvas.supylabel("share that is of the class", fontsize="medium")

    caption = (
        f"The classwise calibration error is {_share(found.error, 3)}; a perfect model would show "
        f"{_share(perfect, 3)} on so few images. A dot on the line is right; its own line is "
        "its 95 % interval, and the bar below shows how many images it is of."
    )
    title = f"Do probabilities come true? {of}, {counts.positive.sum()} images"
    return draw_figure(draw, title, caption)


def _pool(found: Calibration) -> tuple[Floats, Floats, Ints]:
    images = found.images.sum(axis=0)
    many = np.maximum(images, 1)
    sums = (np.nansum(part * found.images, axis=0) for part in (found.predicted, found.observed))
    predicted, observed = (np.where(images > 0, total / many, np.nan) for total in sums)
    return predicted, observed, images


def _draw_bins(axes: Axes, predicted: Floats, observed: Floats, images: Ints) -> None:
    share, some = images / max(1, images.max()), images > 0
    axes.stairs(0.3 * share, fill=True, color=PALE, edges=np.linspace(0, 1, len(images) + 1))
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    axes.plot(predicted[some], observed[some], "o", color=COLOURS[0], ms=3, clip_on=False)


def _draw_intervals(axes: Axes, predicted: Floats, observed: Floats, images: Ints) -> None:
    for x, share, n in zip(predicted, observed, images.tolist(), strict=True):
        if found := wilson(round(share * n) if n else 0, n):
            axes.vlines(x, found.low, found.high, color=COLOURS[0], lw=0.8)


def plot_confusion(counts: Counts, classes: Sequence[str], of: str) -> Figure | None:
    """Plot which classes are taken for which: shares of each true class, and images.

    Args:
      counts: of one model on one set of images.
      classes: their names.
      of: which model and images, in words.
    """
    if not counts.confusion.any() or len(classes) > _MOST:
        return None

    def draw(canvas: Canvas) -> None:
        draw_confusion(canvas, counts, classes)

    about = f" Each number is right within about {counts.noise:.0f}." if counts.noise else ""
    caption = f"The darker, the larger a part of the images of that true class.{about}"
    return draw_figure(draw, f"Confusion matrix: {of}, {counts.n} images", caption)


def draw_confusion(canvas: Canvas, counts: Counts, classes: Sequence[str]) -> None:
    """Draw what `plot_confusion` shows."""
    names, totals = shorten_names(classes, _LONGEST), counts.confusion.sum(axis=1)
    shares = counts.confusion / np.maximum(totals, 1)[:, None]
    side = 0.36 * len(classes)
    canvas.set_size_inches(max(WIDTH, 1.6 + side), 1.1 + side)
    axes = canvas.subplots()
    texts = [
        [f"{images}\n{share:.0%}" if images else "0" for images, share in zip(*row, strict=True)]
        for row in zip(counts.confusion, shares, strict=True)
    ]
    draw_cells(axes, shares, texts, size=6.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(len(classes)), [names[name] for name in classes], rotation=90)
    rows = [f"{names[name]} ({total})" for name, total in zip(classes, totals, strict=True)]
    axes.set_yticks(range(len(classes)), rows)
    axes.set_xlabel("called")
    axes.set_ylabel("true (images)")


def plot_decision_curves(counts: Counts, classes: Sequence[str], of: str) -> Figure | None:
    """Plot the net benefit of acting on each class, against acting on all patients and on none.

    It is shown as a share of what a model without errors would give, which is the share of images
    that are of the class; of two classes the second is shown.

    Args:
      counts: of one model on one set of images.
      classes: their names.
      of: which model and images, in words.
    """
    n, images = counts.positive.sum(), counts.positive.sum(axis=1)
    shown = {
        k: tuple(benefit * n / images[k] for benefit in found)
        for k in _list_sides(counts)
        if images[k] and (found := net_benefit(counts, k, list(_THRESHOLDS)))
    }
    if not shown or len(classes) > _MOST:
        return None
    names = shorten_names(classes, _LONGEST)

    def draw(canvas: Canvas) -> None:
        grid = _draw_grid(canvas, [f"{names[classes[k]]} ({images[k]})" for k in shown])
        lines: dict[str, Artist] = {}
        for axes, (model, everyone) in zip(grid, shown.values(), strict=True):
            lines["by model"] = axes.plot(_THRESHOLDS, model, color=COLOURS[0], lw=1.4)[0]
            lines["on all"] = axes.plot(_THRESHOLDS, everyone, "--", color=GREY, lw=1)[0]
            lines["on none"] = axes.axhline(0, color=INK, lw=0.8, ls=":")
        grid[0].set(ylim=(-0.25, 1))
        add_legend(canvas, lines, "act")
        canvas.supxlabel("probability from which on one acts", fontsize="medium")
        canvas.supylabel("net benefit, 1 at most", fontsize="medium")

    caption = (
        "Net benefit is the share of a class's images that are acted on, less false alarms at the "
        "odds of the probability. Acting by the model pays where its line is above both others."
    )
    return draw_figure(draw, f"Is it worth acting on a class? {of}, {n} images", caption)


def _draw_grid(canvas: Canvas, titles: Sequence[str]) -> list[Axes]:
    """A small panel for each title, all with the same axes, on which 0 to 1 is marked."""
    columns = min(_COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    canvas.set_size_inches(WIDTH, 0.75 + (1.05 if columns > 1 else 1.6) * rows)
    panels = list(canvas.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[len(titles) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(titles) - columns) : len(titles)]:  # none may stand below these
        axes.tick_params(labelbottom=True)
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title, fontsize="medium", fontweight="normal", loc="center")
    panels[0].set(xlim=(0, 1))
    panels[0].set_xticks((0, 0.5, 1), ("0", ".5", "1"))
    panels[0].set_yticks((0, 0.5, 1), ("0", ".5", "1"))
    return panels[: len(titles)]


def _list_sides(counts: Counts) -> range:
    """Every class; of two, the second alone, as the first is its mirror."""
    return range(1 if counts.classes == 2 else 0, counts.classes)


def _style_class(k: int) -> dict[str, Any]:
    dashes, marker = _DASHES[k % len(_DASHES)], MARKERS[k % len(MARKERS)]
    return {"color": COLOURS[k % len(COLOURS)], "ls": dashes, "marker": marker, "ms": 4, "lw": 1.2}


def _share(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}".removeprefix("0")
