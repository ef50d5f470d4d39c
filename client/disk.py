"""The site's own disk: what goes wrong with it is said in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import ConsiliumError, complaint


@contextmanager
def usable(where: object, error: type[ConsiliumError]) -> Iterator[None]:
    """Raise `error` with a remedy where the system refuses a file: a full disk, missing rights."""
    try:
        yield
    except OSError as ex:
        remedy = "Free space or mend the rights, then start again; what is finished is kept."
        expected = "a place to read and write"
        raise error(complaint(where, expected=expected, got=ex, remedy=remedy)) from None
