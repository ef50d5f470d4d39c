"""The site's own disk: its secret; what goes wrong with the disk is said in one line."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConsiliumError, SiteError
from common.support import files

AGREED = ".agreement.json"
"""What the names of agreements end in, in the folder `studies`."""
REPLACED = (
    "Restore the file secret from a backup. If it is lost for good, so is all that it keys: begin "
    "with a new state folder, forget there who was forgotten here, and run "
    "`consilium-client ledger-adopt`."
)
"""What to do about a secret that is not the one this site worked with."""


def has_worked(folder: Path) -> bool:
    """Whether a site has taken part in a study with this state folder, and so has a ledger."""
    traces = "ledger.jsonl", "ledger.head", f"studies/*{AGREED}", "outbox/*"
    return any(True for trace in traces for _ in folder.glob(trace))


def keeps_secret(folder: Path) -> bool:
    """Whether a secret was drawn in this state folder, even if it was lost since."""
    return any((folder / name).exists() for name in ("secret", "forgotten")) or has_worked(folder)


def read_site_secret(folder: Path) -> bytes:
    """256 bits in a site's state folder; drawn once, before anything is done with them.

    Raises:
      SiteError: the file cannot be made or read, does not hold 256 bits, or was lost.
    """
    path = folder / "secret"
    with explain_disk_errors(path, SiteError):
        worked = not path.exists() and keeps_secret(folder)
        lost = worked and not path.exists()  # again: another thread may just have drawn it
    if lost:
        expected = "the secret that this site worked with"
        raise SiteError(path, expected=expected, got="no such file", remedy=REPLACED)
    return read_secret(path, SiteError, REPLACED)


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
