"""The tables of a run: every figure with the reason where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.metrics.counts import Counts
from common.support.terminal import console
from server.reports.tables import show_results

CLASSES = ["clear", "nodule", "effusion"]
NAMES = [f"university_hospital_{name}" for name in ("north", "south", "east")]


def count(images: list[int], errors: int = 0) -> Counts:
    """Counts of so many images of each class, the first ones called the next class."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(images))
    called = labels.clone()
    called[:errors] = (called[:errors] + 1) % 3
    return Counts.of(torch.eye(3)[called] * 4.0, labels)


def show(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sites: dict[str, Counts]
) -> str:
    monkeypatch.setattr(console, "width", 80)
    ways = {"local": sites, "federated": sites}
    show_results(ways, CLASSES, {"silent": "all figures"}, Path("runs/x"))
    return capsys.readouterr().out


def test_at_80_columns_every_site_has_its_whole_name_and_each_way_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = show(capsys, monkeypatch, {name: count([10, 4, 6], 2) for name in NAMES})
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for name in NAMES:
        assert lines.count(f"{name}: 20 test images") == 3
    assert sum(line.startswith("  federated ") for line in lines) == 2 * (len(NAMES) + 1)


def test_decisions_of_a_class_are_told_with_the_images_behind_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = show(capsys, monkeypatch, {NAMES[0]: count([10, 4, 6], 2)})
    (clear,) = [line.split() for line in text.splitlines() if line.startswith("  clear")]
    assert clear[1:] == ["0.800", "8/10", "1.000", "10/10", "1.000", "8/8", "0.833", "10/12"]
    (nodule,) = [line.split() for line in text.splitlines() if line.startswith("  nodule")]
    assert nodule[1:] == ["1.000", "4/4", "0.875", "14/16", "0.667", "4/6", "1.000", "14/14"]


def test_a_figure_that_is_missing_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = show(capsys, monkeypatch, {NAMES[0]: count([10, 0, 6])})
    assert "–: no test images of the class, or none called so" in text
    assert "×" not in text
    assert "silent: all figures withheld by the site" in text
    coarse = count([10, 10, 20]).coarse(np.diag([10, 10, 20]), 2.9)
    text = show(capsys, monkeypatch, {NAMES[0]: coarse})
    assert f"{NAMES[0]}: about 40 test images" in text
    assert "×: withheld by the site" in text
    assert "–:" not in text
