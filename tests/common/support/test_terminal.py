"""Every command line ends the same way: an exit code, and one line where something was wrong."""

import sys

import pytest
import typer

from common.errors import SiteError
from common.support.terminal import StoppedError, run, size


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (SiteError("expected a, got \x1b[2Jb"), 1, "got \N{REPLACEMENT CHARACTER}[2Jb"),
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
