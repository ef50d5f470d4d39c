"""Sealed replies: what may be sent again for free, byte for byte."""

import hashlib
import logging
from collections.abc import Container
from pathlib import Path

from client.ledger.entries import Contents, Release
from client.storage import explain_disk_errors
from common.errors import SiteError
from common.support import files

log = logging.getLogger(__name__)


class Outbox:
    """A private folder of replies, one file per release.

    Every method raises `SiteError` where the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with explain_disk_errors(folder, SiteError):
            files.make_private(folder, folder, SiteError)
            files.sync(folder.parent)

    def write(self, release: Release, data: bytes) -> None:
        """Keep a reply; on disk before this returns."""
        with explain_disk_errors(self._folder, SiteError):
            files.write(self._path(release), data, mode=0o600)

    def read(self, release: Release, contents: Contents) -> bytes | None:
        """The reply whose hash the ledger has; None if it is lost or not those bytes."""
        path = self._path(release)
        with explain_disk_errors(self._folder, SiteError):
            data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() == contents.sha256:
            return data
        log.warning("%s: the sealed reply is lost; this round spends anew", path)
        return None

    def purge(self, study: str = "", keep: Container[str] = ()) -> None:
        """Delete every reply of a study that has ended, or of all, but for those of some keys."""
        with explain_disk_errors(self._folder, SiteError):
            for path in self._folder.iterdir():
                if path.name.lstrip(".").startswith(study) and path.name[17:] not in keep:
                    path.unlink(missing_ok=True)

    def _path(self, release: Release) -> Path:
        return self._folder / f"{release.study}-{release.key}"
