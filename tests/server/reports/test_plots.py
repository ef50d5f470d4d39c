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
from common.support.plot_style import Title
from server.reports.plots import plot_confusion, plot_curves
from simulations.studies import plots
from tests.builders import pixels_of

TITLE = Title(
    "study: $what$ it shows", "released: the model of round 3 of 9 · 24 test images · ä_b"
)
TWO = Counts.of(torch.eye(2), torch.tensor([0, 1]))


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
@pytest.mark.parametrize(("sites", "rounds"), [(1, 2), (4, 30), (20, 12), (0, 3)])
def test_curves_for_any_number_of_sites(tmp_path: Path, sites: int, rounds: int) -> None:
    path = tmp_path / "curves.png"
    plot_curves(rows(sites, rounds), path, TITLE)
    two = pixels_of(path)
    plot_curves(rows(sites, rounds, loss=None), path, TITLE)
    one = pixels_of(path)
    assert one.shape[1] < two.shape[1]


@pytest.mark.filterwarnings("error")
def test_curves_with_gaps_are_drawn_and_of_nothing_none_are_left(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    some = rows(3, 5)
    some[6]["loss"] = some[7]["balanced_accuracy"] = None
    one = [row for row in rows(2, 3) if row["round"] == 3]
    for nothing in ([], rows(2, 3, loss=None, balanced_accuracy=None), one):
        plot_curves(some, path, TITLE)
        pixels_of(path)
        plot_curves(nothing, path, TITLE)
        assert not path.exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 7])
def test_confusion_with_an_absent_class_and_odd_names(tmp_path: Path, classes: int) -> None:
    path = tmp_path / "confusion.png"
    labels = torch.arange(60) % (classes - 1)
    counts = Counts.of(torch.randn(60, classes), labels)
    # Two dollars would be a broken formula if names were not taken as plain text.
    plot_confusion(counts, [f"${{k}}_\\frac{k}$" for k in range(classes)], path, TITLE)
    pixels_of(path)
    plot_confusion(Counts.zero(classes), [str(k) for k in range(classes)], path, TITLE)
    assert not path.exists()


def test_a_plot_replaces_the_old_one_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "confusion.png"
    plot_confusion(TWO, ["a", "b"], path, TITLE)
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        plot_confusion(TWO, ["a", "b", "c"], path, TITLE)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_drawing_leaves_no_global_state(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plot_curves(rows(2, 2), tmp_path / "curves.png", TITLE)
    assert dict(mpl.rcParams) == before
    assert "pyplot" not in vars(plots) | vars(plot_style)


def test_validation_is_drawn_at_the_model_that_was_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line after the last round has no training loss, but the last model's validation."""
    figure = Figure()
    monkeypatch.setattr(plot_style, "Figure", lambda layout: figure)
    last = {"round": 4, "model_round": 3, "site": None, "loss": None, "balanced_accuracy": 0.9}
    plot_curves([*rows(0, 3), last], tmp_path / "curves.png", TITLE)
    loss, validation = (axes.get_lines()[0].get_xydata() for axes in figure.axes)
    assert [x for x, y in np.asarray(loss) if not np.isnan(y)] == [1, 2, 3]
    assert [x for x, _ in np.asarray(validation)] == [0, 1, 2, 3]


def test_a_plot_of_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plot_confusion(TWO, ["a", "b"], tmp_path / "no folder" / "confusion.png", TITLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("classes", [2, 12])
def test_a_title_is_whole_inside_the_picture_and_above_the_axes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    figure = Figure(layout="constrained")
    monkeypatch.setattr(plot_style, "Figure", lambda layout: figure)
    counts = Counts.of(torch.eye(classes), torch.arange(classes))
    plot_confusion(counts, [f"class-{k}" for k in range(classes)], tmp_path / "c.png", TITLE)
    figure.draw_without_rendering()
    title = figure._suptitle  # type: ignore[attr-defined]
    assert " ".join(title.get_text().split()) == " ".join(TITLE)
    place, (axes,) = title.get_window_extent(), figure.axes
    assert figure.bbox.x0 <= place.x0 < place.x1 <= figure.bbox.x1
    assert axes.get_tightbbox().y1 <= place.y0
