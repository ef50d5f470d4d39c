"""What every command line shares: one console, text that cannot steer it, and where errors end."""

import logging
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple, NoReturn

import click
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from common.errors import ConsiliumError
from common.support.tables import FittedTable

INTERRUPTED = 130

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key of the study, such as train.lr=0.01. Repeat."),
]
"""An option of every command that reads a study."""


def escape(text: str, *, keep: str = "") -> str:
    """Text from elsewhere on one line: control characters and line breaks of any kind as escapes.

    They could steer a terminal, or make one entry of a log look like two.

    Args:
      text: Anything.
      keep: Characters that stay as they are.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


class Shown(NamedTuple):
    """Something that was printed, and in which style."""

    what: Any
    style: str


class PlainConsole(Console):
    """Prints every text, in tables too, as it is: nothing in it is markup or steers a terminal."""

    _shown: list[Shown] | None = None

    def print(self, *objects: Any, style: Any = None, **options: Any) -> None:
        """Print, and keep for `keep` what was printed."""
        if self._shown is not None:
            self._shown += [Shown(each, str(style or "")) for each in objects]
        super().print(*objects, style=style, **options)

    @contextmanager
    def keep(self) -> Iterator[list[Shown]]:
        """Keep what is printed meanwhile, as it was given, so that a page can show the same."""
        kept: list[Shown] = []
        self._shown = kept
        try:
            yield kept
        finally:
            self._shown = None

    def render_str(self, text: str, **options: Any) -> Text:
        """Where rich turns a str into something to print."""
        return super().render_str(escape(text, keep="\n"), **options)


# A file or a pipe has no width of its own, unless the environment names one.
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
console = PlainConsole(highlight=False, markup=False, emoji=False, width=_WIDTH)


def size(number: float) -> str:
    """Bytes as a person reads them, in units of 1000."""
    for unit, many in (("kB", 1e3), ("MB", 1e6)):
        if number < 1000 * many:
            return f"{number / many:.1f} {unit}"
    return f"{number / 1e9:.1f} GB"


def describe_left(steps: int, seconds: Sequence[float]) -> str:
    """How long is left at most, in words, as steps of before took so many seconds each.

    Some work ends before its last step.
    """
    left = steps * median(seconds)
    for unit, many in (("s", 1.0), ("min", 60.0)):
        if left < 100 * many:
            return f"≤ {left / many:.0f} {unit} left"
    return f"≤ {left / 3600:.1f} h left"


def table(
    *columns: str, left: Collection[str] | None = None, signs: Mapping[str, str] | None = None
) -> FittedTable:
    """A table without frame: columns in `left`, or all of them, flush left, the others right.

    Below it stands the reason of each of `signs` that a cell shows instead of a figure.
    """
    return FittedTable(columns, left, signs or {})


class StoppedError(Exception):
    """Ctrl-C; the text says how to go on."""


class _OneLine(logging.Formatter):
    """One entry is one line, whatever it quotes; the lines of a traceback are indented."""

    def format(self, record: logging.LogRecord) -> str:
        line, *below = super().format(record).split("\n")
        return "\n".join([line, *(f"  {escape(text)}" for text in below)])

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return escape(super().formatMessage(record))


class _Dated(_OneLine):
    """For a process that goes on for months; what led to an error is in its file alone."""

    def format(self, record: logging.LogRecord) -> str:
        return escape(f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')} {record.getMessage()}")


def log_to(path: Path, *, dated: bool = False) -> logging.Handler:
    """Write what this process logs into files too, which rotate; returns what does it.

    Args:
      path: The newest of them; private, as texts of errors may name paths.
      dated: Show times on the terminal as well.
    """
    root = logging.getLogger()
    for shown in root.handlers if dated else ():
        shown.setFormatter(_Dated())
    file = RotatingFileHandler(path, maxBytes=4_000_000, backupCount=4, encoding="utf-8")
    file.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    root.addHandler(file)
    return file


def run(app: typer.Typer, *, remedy: str) -> None:
    """Run a command line to its exit code; a mistake with a known remedy ends in one line.

    Args:
      app: The commands.
      remedy: What to do where the system refuses a file, such as on a full disk.
    """
    _log_to_console()
    try:
        code = app(standalone_mode=False) or 0
    except ConsiliumError as ex:
        code = _say(str(ex), 1)
    except OSError as ex:
        where, got = ex.filename2 or ex.filename or "files", ex.strerror or ex
        expected = "to read and write here"
        code = _say(str(ConsiliumError(where, expected=expected, got=got, remedy=remedy)), 1)
    except StoppedError as ex:
        code = _say(str(ex), INTERRUPTED)
    except typer.Abort:  # Ctrl-C, or no more input, where a question was asked
        code = _say("Stopped.", INTERRUPTED)
    except click.ClickException as ex:
        ex.show()
        code = ex.exit_code
    else:
        if code == INTERRUPTED:  # typer's own for Ctrl-C
            _say("Stopped.", code)
    sys.exit(code)


def end(error: ConsiliumError) -> NoReturn:
    """Say what went wrong, and end with it."""
    sys.exit(_say(str(error), 1))


def _log_to_console() -> None:
    handler = RichHandler(console=console, show_time=False, show_path=False)
    handler.setFormatter(_OneLine("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("client", "server", "simulations"):
        logging.getLogger(name).setLevel(logging.INFO)


def _say(text: str, code: int) -> int:
    typer.secho(escape(text, keep="\n"), fg="red", err=True)
    return code
