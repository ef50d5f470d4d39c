"""What a study says and nothing goes by is named before it starts."""

from typing import Any

import pytest

from server.rounds.start import check_start
from tests.builders import make_study

SOLVED = {"head": "ridge", "init": None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": SOLVED, "train": {"rounds": 0, "lr": 0.5}}, "train.lr: no round trains"),
        ({"model": SOLVED, "train": {"rounds": 0, "lr": 0.5}, "adapt": True}, "fits the model by"),
        ({"model": SOLVED, "train": {"rounds": 0}}, ""),
        ({"train": {"rounds": 1, "lr": 0.5}}, ""),
    ],
)
def test_settings_of_rounds_without_rounds_are_said(
    changes: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_start(make_study(**changes))
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)
