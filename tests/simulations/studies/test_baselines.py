"""Training without a federation says how far it is."""

import logging

import pytest

from simulations.studies import baselines


def test_long_rounds_tell_how_far_they_are_and_short_ones_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    short = baselines._Progress(3)
    short.report_round(1)
    assert not caplog.text
    monkeypatch.setattr(baselines, "_QUIET", 0.0)
    long = baselines._Progress(3)
    for number in (1, 2, 3):
        long.report_round(number)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["  round 1 of 3, ≤ 0 s left", "  round 2 of 3, ≤ 0 s left"]
