"""Plots of several runs are whole PNGs, whatever is missing and whatever the names are."""

from pathlib import Path

import pytest

from common.metrics.statistics import Estimate
from simulations.studies.plots import plot_comparison, plot_sweep
from tests.builders import pixels_of


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sites", [1, 4, 20])
@pytest.mark.parametrize("metric", ["auroc", "loss"])
def test_comparison(tmp_path: Path, sites: int, metric: str) -> None:
    path = tmp_path / "comparison.png"
    results = {
        setting: {
            None: Estimate(0.8, 0.7, 0.85),
            **{f"$site-{k}$": Estimate(0.7, 0.6, 0.8) if k % 3 else None for k in range(sites)},
        }
        for setting in ("local", "federated", "pooled")
    }
    plot_comparison(results, metric, path)
    pixels_of(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("chosen", ["0.1 · $x_1$", None])
def test_a_sweep_with_gaps(tmp_path: Path, chosen: str | None) -> None:
    scores = {"0.1 · $x_1$": [0.5, 0.6], "1 · head": [None, 0.4], "[1, 3] · head": [None, None]}
    plot_sweep(
        scores, "auroc", tmp_path / "sweep.png", keys="train.lr · " + "k" * 60, chosen=chosen
    )
    blue = (pixels_of(tmp_path / "sweep.png") == (0x00, 0x72, 0xB2)).all(axis=2)
    assert blue.any() == bool(chosen)
