"""The site's own disk: what goes wrong with it is said in one line."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConsiliumError
from common.support import files


def read_secret(path: Path, error: type[ConsiliumError], remedy: str) -> bytes:
    """256 bits in a file of this user's alone, drawn once from the operating system.

    Raises:
      error: the file cannot be made or read or, with `remedy`, does not hold 256 bits.
    """
    with explain_disk_errors(path, error):
        if not path.exists():
            files.create(path, secrets.token_bytes(32), mode=0o600)
        drawn = path.read_bytes()
    if len(drawn) != 32:
        got = f"{len(drawn)} bytes"
        raise error(path, expected="32 bytes", got=got, remedy=remedy)
    return drawn


@contextmanager
def explain_disk_errors(where: object, error: type[ConsiliumError]) -> Iterator[None]:
    """Raise `error` with a remedy where the system refuses a file: a full disk, missing rights."""
    try:
        yield
    except OSError as ex:
        remedy = "Free space or mend the rights, then start again; what is finished is kept."
        expected = "a place to read and write"
        raise error(where, expected=expected, got=ex, remedy=remedy) from None
