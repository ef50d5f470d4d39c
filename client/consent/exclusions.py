"""Patients this site leaves out of everything from now on, as HMACs: the list tells nobody who."""

import hashlib
import hmac
from collections.abc import Sequence

from client.data.records import Record
from client.site import Site
from client.storage import explain_disk_errors
from common.errors import SiteError
from common.support import files

_FILE = "forgotten"


def exclude_patient(site: Site, patient: str) -> bool:
    """Never use this patient again; returns whether he was used until now.

    Raises:
      SiteError: the disk refuses.
    """
    known, own = _known(site), _identity(site, patient)
    if own in known:
        return False
    path = site.private() / _FILE
    with explain_disk_errors(path, SiteError):
        files.write(path, "".join(f"{line}\n" for line in sorted({*known, own})), mode=0o600)
    return True


def drop_excluded(site: Site, records: Sequence[Record]) -> list[Record]:
    """The records of patients who were not left out, in the given order.

    Raises:
      SiteError: the list cannot be read.
    """
    known = _known(site)
    gone = {p for p in {r.patient for r in records} if known and _identity(site, p) in known}
    return [record for record in records if record.patient not in gone]


def _known(site: Site) -> frozenset[str]:
    path = site.state / _FILE
    with explain_disk_errors(path, SiteError):
        return frozenset(path.read_text("ascii").split()) if path.exists() else frozenset()


def _identity(site: Site, patient: str) -> str:
    return hmac.digest(site.secret(), b"forgotten:" + patient.encode(), hashlib.sha256).hex()
