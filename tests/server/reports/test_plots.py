"""Plots are whole PNGs, whatever is missing and whatever the names are."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from common.metrics.counts import Counts
from common.support import plot_style
from server.reports.plots import plot_confusion, plot_curves
from simulations.studies import plots
from tests.builders import pixels_of


def rows(sites: int, rounds: int, **changes: float | None) -> list[dict[str, Any]]:
    names = [None, *(f"site-{k}" for k in range(sites))]
    return [
        {
            "round": t,
            "model_round": t - 1,
            "site": site,
            "loss": 1 / t,
            "balanced_accuracy": 1 - 1 / t,
            **changes,
        }
        for t in range(1, rounds + 1)
        for site in names
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("sites", "rounds"), [(1, 1), (4, 30), (20, 12), (0, 3)])
def test_curves_for_any_number_of_sites(tmp_path: Path, sites: int, rounds: int) -> None:
    path = tmp_path / "curves.png"
    plot_curves(rows(sites, rounds), path)
    two = pixels_of(path)
    plot_curves(rows(sites, rounds, loss=None), path)
    one = pixels_of(path)
    assert one.shape[1] < two.shape[1]


@pytest.mark.filterwarnings("error")
def test_curves_with_gaps_or_nothing_at_all(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    some = rows(3, 5)
    some[6]["loss"] = some[7]["balanced_accuracy"] = None
    plot_curves(some, path)
    pixels_of(path)
    for nothing in ([], rows(2, 3, loss=None, balanced_accuracy=None)):
        plot_curves(nothing, path)
        pixels_of(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 7])
def test_confusion_with_an_absent_class_and_odd_names(tmp_path: Path, classes: int) -> None:
    path = tmp_path / "confusion.png"
    labels = torch.arange(60) % (classes - 1)
    counts = Counts.of(torch.randn(60, classes), labels)
    # Two dollars would be a broken formula if names were not taken as plain text.
    plot_confusion(counts, [f"${{k}}_\\frac{k}$" for k in range(classes)], path)
    pixels_of(path)
    plot_confusion(Counts.zero(classes), [str(k) for k in range(classes)], path)
    pixels_of(path)


def test_a_plot_replaces_the_old_one_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "confusion.png"
    plot_confusion(Counts.zero(2), ["a", "b"], path)
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        plot_confusion(Counts.zero(2), ["a", "b", "c"], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_drawing_leaves_no_global_state(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plot_curves(rows(2, 2), tmp_path / "curves.png")
    assert dict(mpl.rcParams) == before
    assert "pyplot" not in vars(plots) | vars(plot_style)


def test_validation_is_drawn_at_the_model_that_was_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line after the last round has no training loss, but the last model's validation."""
    figure = Figure()
    monkeypatch.setattr(plot_style, "Figure", lambda layout: figure)
    last = {"round": 4, "model_round": 3, "site": None, "loss": None, "balanced_accuracy": 0.9}
    plot_curves([*rows(0, 3), last], tmp_path / "curves.png")
    loss, validation = (axes.get_lines()[0].get_xydata() for axes in figure.axes)
    assert [x for x, y in np.asarray(loss) if not np.isnan(y)] == [1, 2, 3]
    assert [x for x, _ in np.asarray(validation)] == [0, 1, 2, 3]


def test_a_plot_of_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plot_confusion(Counts.zero(2), ["a", "b"], tmp_path / "no folder" / "confusion.png")
    assert not list(tmp_path.iterdir())
