"""What one process keeps open between messages: sessions, ledgers, a network, stores.

Whoever runs sites owns one and passes it: a node for its site, an engine for many virtual ones.
"""

import gc
from dataclasses import dataclass
from pathlib import Path

from client.consent.proposals import read_proposal
from client.ledger.ledger import Ledger
from client.ledger.outbox import Outbox
from client.preparation import Workspace, prepare_site
from client.session import Session
from client.site import Site
from client.storage import explain_disk_errors
from common.errors import SiteError
from common.protocol.tensors import Shapes

_AWAKE = 128
"""So many sites of one process hold their files: three each, well below any usual limit."""

SessionKey = tuple[Path, tuple[int, int, int], str]
"""A site file, its state when it was read, and the id of a study."""


@dataclass(frozen=True)
class SiteRuntime:
    """What every reply of one site passes on its way out.

    Attributes:
      ledger: What has left.
      outbox: What may leave again.
    """

    ledger: Ledger
    outbox: Outbox


class Runtime:
    """The open sites of one process. One thread at a time.

    Args:
      bound: Whether a ledger is refused that was last in use elsewhere. Virtual sites may move.
    """

    def __init__(self, *, bound: bool = False) -> None:
        self._bound = bound
        self._workspace = Workspace()
        self._sites: dict[Path, SiteRuntime] = {}
        self._awake: dict[Path, SiteRuntime] = {}
        self._sessions: dict[SessionKey, Session] = {}

    def open_site(self, site: Site) -> SiteRuntime:
        """The ledger and the outbox of a site; no other process can open them meanwhile.

        A process with more sites than may hold their files lets those rest that it used longest
        ago. What another process then writes is noticed, and refused, before the next line.

        Raises:
          SiteError: another process has it open, it is damaged or a copy, or the disk refuses.
        """
        if site.state not in self._sites:
            state = site.private()
            ledger = Ledger(state, bound=self._bound)
            self._sites[site.state] = SiteRuntime(ledger, Outbox(state / "outbox"))
        self._awake.pop(site.state, None)
        self._awake[site.state] = self._sites[site.state]
        if len(self._awake) > _AWAKE:
            self._awake.pop(next(iter(self._awake))).ledger.rest()
        return self._sites[site.state]

    def open_session(self, site_file: Path, study_id: str) -> Session:
        """The session of a site in a study it was sent; prepared once for each state of its file.

        A site is at work in one study at a time. Its session in any other is closed first, and made
        anew if that study goes on: how many studies a process has seen does not fill its memory.

        Raises:
          ContractError: this site was never sent that study.
        """
        with explain_disk_errors(site_file, SiteError):
            now = site_file.stat()
        key = site_file, (now.st_mtime_ns, now.st_size, now.st_ino), study_id
        if key not in self._sessions:
            site = Site.read(site_file)
            study = read_proposal(site, study_id)
            self._close_sessions_of(site_file)
            self._sessions[key] = Session(prepare_site(site, study, self._workspace))
        return self._sessions[key]

    def list_shapes(self) -> dict[str, Shapes]:
        """List the tensors that travel in each study with an open session."""
        found = self._sessions.items()
        return {study: session.prepared.network.shapes for (_, _, study), session in found}

    def _close_sessions_of(self, site_file: Path) -> None:
        """With the last of all go the network, and the stores that are open."""
        ended = [key for key in self._sessions if key[0] == site_file]
        for key in ended:
            del self._sessions[key]
        if ended and not self._sessions:
            self._workspace = Workspace()
            gc.collect()  # a network is a circle of references

    def close_sessions(self, *, beyond: int = 0) -> None:
        """Let go of all sessions, if there are more than `beyond`."""
        if len(self._sessions) > beyond:
            self._sessions.clear()

    def close_sites(self) -> None:
        """Let go of every ledger: other processes may open them."""
        self._awake.clear()
        while self._sites:
            self._sites.popitem()[1].ledger.close()

    def close(self) -> None:
        """Let go of everything."""
        self.close_sites()
        self.close_sessions()
        self._workspace = Workspace()
