"""The hospitals that a coordinator admitted, each by its key and one name."""

import json
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from common.errors import LinkError, did_you_mean
from common.flower.database import NOOP_FLWR_AID, LinkState, NodeStatus, free_key, open_state
from common.flower.messages import NodeInfo
from common.support import files, keys
from server.project.project import Project


class AdmittedSite(NamedTuple):
    """One admitted site."""

    name: str
    number: int
    """In the link's database."""
    fingerprint: str
    """Of its key: 64 hex digits in groups of four."""
    admitted: datetime
    connected: bool
    seen: datetime | None
    """When it was last connected, to half a minute; None if never, or if it is now."""
    version: str | None
    """Of Consilium there, as the site last said."""


class SiteVersions:
    """The release that each site last said it runs, by its key's fingerprint, in a small file.

    Args:
      path: Of the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._known = path, self.read(path)

    @staticmethod
    def read(path: Path) -> dict[str, str]:
        """All of them; none if the file is missing or damaged."""
        try:
            known = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            known = {}
        return known if isinstance(known, dict) else {}

    def note_version(self, fingerprint: str, version: str) -> None:
        """Remember what a site says."""
        if self._known.get(fingerprint) != version:
            self._known[fingerprint] = version
            content = json.dumps(self._known, indent=2)
            files.write(self._path, content, mode=0o600, durable=False)


class Sites:
    """Who may connect to a project's link, also while it is up.

    Args:
      project: Its database is made if it is not there.
    """

    def __init__(self, project: Project) -> None:
        self._project = project
        self._state: LinkState = open_state(project.database)

    def list_sites(self) -> list[AdmittedSite]:
        """All of them, by name."""
        versions = SiteVersions.read(self._project.versions)
        return sorted(_admitted(info, versions) for info in self._infos())

    def admit(self, key: keys.PublicKey, name: str) -> None:
        """Let a site connect; a key that was removed may be admitted again, under any name.

        Raises:
          LinkError: the key or the name is admitted already.
        """
        with self._project.locked("admit"):
            for known in self.list_sites():
                if known.fingerprint == keys.fingerprint(key):
                    remedy = f"consilium-server remove {known.name} lets it go."
                    got = f"one that is admitted as {known.name}"
                    raise LinkError(name, expected="a new key", got=got, remedy=remedy)
                if known.name.casefold() == name.casefold():
                    expected, got = "a name that is free", "another site's"
                    remedy = f"If this is its new key: consilium-server remove {known.name} first."
                    raise LinkError(name, expected=expected, got=got, remedy=remedy)
            free_key(self._state, keys.pem(key))
            self._state.create_node(NOOP_FLWR_AID, "", keys.pem(key), 0, name=name)

    def remove(self, name: str) -> None:
        """Let a site connect no more, from now on; raises `LinkError` if there is none."""
        numbers = {known.name: known.number for known in self.list_sites()}
        if name not in numbers:
            remedy = did_you_mean(name, numbers) if numbers else "No site is admitted."
            got = repr(name)
            raise LinkError("NAME", expected="an admitted site", got=got, remedy=remedy)
        self._state.delete_node(NOOP_FLWR_AID, numbers[name])

    def _infos(self) -> list[NodeInfo]:
        admitted = (NodeStatus.REGISTERED, NodeStatus.ONLINE, NodeStatus.OFFLINE)
        return list(self._state.get_node_info(statuses=admitted))


def _admitted(info: NodeInfo, versions: dict[str, str]) -> AdmittedSite:
    fingerprint = keys.fingerprint(keys.parse_public(info.public_key))
    connected = info.status == NodeStatus.ONLINE
    left = info.last_deactivated_at
    return AdmittedSite(
        name=info.name,
        number=info.node_id,
        fingerprint=fingerprint,
        admitted=datetime.fromisoformat(info.registered_at),
        connected=connected,
        seen=datetime.fromisoformat(left) if left and not connected else None,
        version=versions.get(fingerprint),
    )
