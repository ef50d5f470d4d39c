"""Which flwr this is, and which release of Consilium; an unfit flwr is refused in fixed words.

Flower sends the text of a failed import to the server, and Python's own names paths.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

TESTED = ("1.41.", "1.42.")
"""The versions of flwr that the whole test suite has run with."""
_PIN = ">=1.41,<1.43"

APP = "consilium/consilium"
"""What a run of ours is called in Flower."""
VERSION = "0.1.0"
"""As in pyproject.toml; both sides must have the same major and minor number."""
VERSION_HEADER = "consilium-release"
"""In which either side says what it runs."""


@contextmanager
def require_flwr() -> Iterator[None]:
    """Around imports of private names of flwr: what lacks one is a wrong flwr, in fixed words."""
    installed = "none"
    try:
        installed = version("flwr")
        if not installed.startswith(TESTED):
            raise ImportError
        yield
    except ImportError as ex:
        lacks = f" without {ex.name}" if (ex.name or "").startswith("flwr") else ""
        remedy = f"pip install 'flwr{_PIN}'"
        text = f"flwr: expected {_PIN}, got {installed}{lacks}. {remedy}"
        raise ImportError(text) from None


def parse_version(told: object) -> str | None:
    """What the other side says it runs, if it may be a version; it goes into logs and tables."""
    fits = isinstance(told, str) and re.fullmatch(r"[0-9A-Za-z.+-]{1,32}", told)
    return str(told) if fits else None


def is_same_version(theirs: str) -> bool:
    """Whether a release of Consilium and this one understand each other."""
    return theirs.split(".")[:2] == VERSION.split(".")[:2]
