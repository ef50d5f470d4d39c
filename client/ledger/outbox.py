"""Sealed replies: what may be sent again for free, byte for byte."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from client.ledger.entries import Contents, Release
from client.ledger.ledger import Ledger
from client.storage import usable
from common.errors import SiteError
from common.support import files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """What is about to leave: its exact bytes, and what they hold."""

    data: bytes
    tensors: Mapping[str, tuple[int, ...]]
    """Name and shape of each."""
    metrics: tuple[str, ...] = ()

    @property
    def contents(self) -> Contents:
        """As the ledger records it."""
        return Contents(
            tensors=dict(self.tensors),
            metrics=self.metrics,
            bytes=len(self.data),
            sha256=hashlib.sha256(self.data).hexdigest(),
        )


class Outbox:
    """A private folder of replies, one file per release.

    Every method raises `SiteError` where the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with usable(folder, SiteError):
            folder.mkdir(mode=0o700, exist_ok=True)
            files.sync(folder.parent)

    def write(self, release: Release, data: bytes) -> None:
        """Keep a reply; on disk before this returns."""
        with usable(self._folder, SiteError):
            files.write(self._path(release), data, mode=0o600)

    def read(self, release: Release, contents: Contents) -> bytes | None:
        """The reply whose hash the ledger has; None if it is lost or not those bytes."""
        path = self._path(release)
        with usable(self._folder, SiteError):
            data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() == contents.sha256:
            return data
        log.warning("%s: the sealed reply is lost; this round spends anew", path)
        return None

    def purge(self, study: str = "") -> None:
        """Delete every reply of a study that has ended, or of all."""
        with usable(self._folder, SiteError):
            for path in self._folder.iterdir():
                if path.name.lstrip(".").startswith(study):
                    path.unlink(missing_ok=True)

    def _path(self, release: Release) -> Path:
        return self._folder / f"{release.study}-{release.key}"


def release(
    ledger: Ledger,
    outbox: Outbox,
    what: Release,
    work: Callable[[], Reply],
    allow: Callable[[], None] = lambda: None,
) -> bytes:
    """The bytes that may leave for `what`, recorded; the only way out of the hospital.

    Args:
      ledger: Of the site.
      outbox: Of the site.
      what: The release.
      work: Computes the reply. If `what` is private, its steps are spent as soon as this is called.
      allow: Raises to refuse a private release before anything is spent; the place for the budget
        and for every check that needs no draw. Not asked when a sealed reply is sent again.

    Raises:
      SiteError: the disk refuses; nothing may leave.
    """
    if what.privacy is None:
        reply = work()
        ledger.send(what, reply.contents)
        return reply.data
    contents = ledger.sealed(what)
    data = outbox.read(what, contents) if contents else None
    if contents is None or data is None:
        allow()
        ledger.reserve(what)
        reply = work()
        data, contents = reply.data, reply.contents
        # A kill between these two leaves a file no line vouches for: never sent, but written over.
        outbox.write(what, data)
        ledger.seal(what, contents)
    ledger.send(what, contents)
    return data
