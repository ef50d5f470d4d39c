"""A round takes one line, whatever the names, and says how long is left."""

from pathlib import Path
from typing import Any

import pytest

from common.support.terminal import console, describe_left
from server.reports.progress import Joined, Reporter, fit_scores
from server.runs.run_folder import RunFolder
from tests.builders import make_study

HOSPITALS = [f"university_hospital_{name}" for name in ("north", "south", "east", "west")]


def line(site: str | None, **figures: float | None) -> dict[str, Any]:
    told = {"train_loss": 0.5, "balanced_accuracy": 0.75, "auroc": 0.9, **figures}
    return {"round": 3, "model_round": 2, "site": site, "bytes": 20_000, **told}


def report(
    path: Path, width: int, monkeypatch: pytest.MonkeyPatch, **figures: float | None
) -> None:
    monkeypatch.setattr(console, "width", width)
    folder = RunFolder.create(path)
    folder.write_study(make_study(train={"rounds": 30}))
    reporter = Reporter(folder)
    joined = Joined(replies=(), refusals={}, weights={}, resumed=0, sent=0, whole=0)
    reporter.report_join(joined)
    reporter.report_round([*(line(s, **figures) for s in HOSPITALS), line(None, **figures)], 2.0)


@pytest.mark.parametrize("width", [80, 140])
def test_a_round_of_long_names_takes_one_line(
    tmp_path: Path,
    width: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report(tmp_path / "run", width, monkeypatch)
    (shown,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("round")]
    assert len(shown) <= width
    assert "balanced accuracy 0.750" in shown
    assert shown.endswith("2.0 s, ≤ 54 s left")
    assert shown.count("0.750") == (5 if width == 140 else 1)


def test_a_round_whose_figures_are_withheld_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report(tmp_path / "run", 80, monkeypatch, train_loss=None, balanced_accuracy=None)
    text = capsys.readouterr().out
    assert "figures of rounds are withheld" in text
    assert "–" not in text


def test_scores_stand_beside_names_that_differ_or_not_at_all() -> None:
    scores = dict.fromkeys(HOSPITALS, 0.5)
    told = fit_scores(scores, 70)
    assert len(told) <= 70
    assert len({part.split()[0] for part in told.split("  ")}) == len(HOSPITALS)
    assert fit_scores({"north": 0.5, "south": 1.0}, 70) == "north 0.500  south 1.000"
    assert fit_scores(scores, 30) == ""
    assert fit_scores({}, 70) == ""


@pytest.mark.parametrize(
    ("steps", "seconds", "text"),
    [(10, [1, 2, 90], "20 s"), (100, [3], "5 min"), (1000, [36], "10.0 h")],
)
def test_the_time_left_is_of_the_median_step(steps: int, seconds: list[float], text: str) -> None:
    assert describe_left(steps, seconds) == f"≤ {text} left"
