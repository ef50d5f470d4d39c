"""Plots of several runs are whole PNGs, whatever is missing and whatever the names are."""

from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.collections import LineCollection

from common.metrics.metrics import METRICS
from common.support import plot_style
from common.support.plot_style import Title
from simulations.studies.over_seeds import Seeded, join_seeds
from simulations.studies.plots import plot_comparison, plot_privacy_utility, plot_sweep
from tests.builders import pixels_of

TITLE = Title("study: ways of training", "released models · 24 test images a run · seeds 0, 1")
FIVE = join_seeds([0.7, 0.75, 0.8, 0.85, 1.0], METRICS["auroc"].range)
TWO = join_seeds([0.12, 0.99])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sites", [1, 4, 20])
@pytest.mark.parametrize("metric", ["auroc", "loss"])
def test_comparison(tmp_path: Path, sites: int, metric: str) -> None:
    path = tmp_path / "comparison.png"
    results = {
        setting: {
            None: FIVE,
            **{f"$site-{k}$": FIVE if k % 3 else Seeded((None,)) for k in range(sites)},
        }
        for setting in ("local", "federated", "pooled")
    }
    plot_comparison(results, metric, path, TITLE)
    pixels_of(path)
    plot_comparison({"local": {"north": Seeded(())}}, metric, path, TITLE)
    assert not path.exists()  # of no figure there is no picture, nor an old one


def drawn(
    monkeypatch: pytest.MonkeyPatch, path: Path, found: Seeded, *, privacy: bool
) -> tuple[list[float], int]:
    """Where a plot has dots, and how many intervals."""
    figure = matplotlib.figure.Figure(layout="constrained")
    monkeypatch.setattr(plot_style, "Figure", lambda layout: figure)
    if privacy:
        plot_privacy_utility({"AUROC": {8.0: found}}, {}, path, TITLE)
    else:
        plot_comparison({"local": {"north": found}}, "auroc", path, TITLE)
    (axes,) = figure.axes
    marked = [line for line in axes.get_lines() if line.get_marker() not in ("", "None")]
    dots = np.concatenate([line.get_ydata() if privacy else line.get_xdata() for line in marked])
    return sorted(dots.tolist()), sum(isinstance(c, LineCollection) for c in axes.collections)


@pytest.mark.parametrize("privacy", [False, True])
def test_below_five_seeds_each_is_drawn_and_no_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privacy: bool
) -> None:
    path = tmp_path / "a.png"
    assert drawn(monkeypatch, path, TWO, privacy=privacy) == ([0.12, 0.99], 0)
    assert drawn(monkeypatch, path, FIVE, privacy=privacy) == ([pytest.approx(0.82)], 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("chosen", ["0.1 · $x_1$", None])
def test_a_sweep_with_gaps(tmp_path: Path, chosen: str | None) -> None:
    scores = {"0.1 · $x_1$": [0.5, 0.6], "1 · head": [None, 0.4], "[1, 3] · head": [None, None]}
    keys = "train.lr · " + "k" * 60
    plot_sweep(scores, "auroc", tmp_path / "sweep.png", TITLE, keys=keys, chosen=chosen)
    blue = (pixels_of(tmp_path / "sweep.png") == (0x00, 0x72, 0xB2)).all(axis=2)
    assert blue.any() == bool(chosen)
