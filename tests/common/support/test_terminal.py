"""Every command line ends the same way: an exit code, and one line where something was wrong."""

import logging
import re
import sys
from pathlib import Path

import pytest
import typer

from common.errors import SiteError
from common.support.terminal import StoppedError, log_to, run, size


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (SiteError("expected a, got \x1b[2Jb"), 1, "got \\x1b[2Jb"),
        (
            OSError(28, "Full", "/x/y"),
            1,
            "/x/y: expected to read and write here, got Full. Buy it.",
        ),
        (StoppedError("Stopped. Go on."), 130, "Stopped. Go on."),
        (KeyboardInterrupt(), 130, "Stopped."),
        (typer.Abort(), 130, "Stopped."),
        (typer.Exit(3), 3, ""),
        (typer.BadParameter("no such thing"), 2, "no such thing"),
        (None, 0, ""),
    ],
)
def test_what_ends_a_command(
    raised: BaseException | None,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        if raised:
            raise raised

    monkeypatch.setattr(sys, "argv", ["some-command"])
    with pytest.raises(SystemExit) as caught:
        run(app, remedy="Buy it.")
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (code, "")
    assert said in err
    assert bool(err) == bool(said)
    assert "Traceback" not in err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["some-command"])
    with pytest.raises(ZeroDivisionError):
        run(app, remedy="")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0.0 kB"),
        (999_000, "999.0 kB"),
        (1_000_000, "1.0 MB"),
        (2.5e8, "250.0 MB"),
        (1e9, "1.0 GB"),
        (5e12, "5000.0 GB"),
    ],
)
def test_sizes_are_in_units_of_a_thousand(number: float, text: str) -> None:
    assert size(number) == text


BREAKS = [
    "\n",
    "\r",
    "\r\n",
    "\v",
    "\f",
    "\x1c",
    "\x85",
    "\u2028",
    "\u2029",
    "\x1b[1A\x1b[2K",
    "\b",
]


@pytest.mark.parametrize("broken", BREAKS)
def test_no_text_from_elsewhere_makes_a_line_of_its_own_in_a_log(
    broken: str, tmp_path: Path
) -> None:
    forged = f"north{broken}2026-01-01 00:00:00,000 INFO the study is approved"
    handler = log_to(tmp_path / "client.log")
    log = logging.getLogger("client")
    try:
        log.error("refused: %s", forged)
        log.error(f"refused: {forged}")
        try:
            raise ValueError(forged)
        except ValueError:
            log.exception("an error that nobody foresaw")
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    text = (tmp_path / "client.log").read_text("utf-8")
    lines = text.splitlines()
    ours = [line for line in lines if re.match(r"20\d\d-\d\d-\d\d ", line)]
    assert len(ours) == 3
    assert all(line.startswith("  ") for line in lines if line not in ours)
    assert all(c.isprintable() or c == "\n" for c in text)
