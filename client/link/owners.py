"""Which coordinator each study is of: no other goes on with it, or with what was agreed for it."""

import json
from pathlib import Path

from client.storage import explain_disk_errors
from common.errors import RefusedError, SiteError
from common.support import files


class StudyOwners:
    """The authority of the coordinator of each study that was joined, in a small file.

    Args:
      path: Of the JSON file.

    Raises:
      SiteError: it cannot be read, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with explain_disk_errors(path, SiteError):
            text = path.read_text("ascii") if path.exists() else "{}"
        try:
            self._owners: dict[str, str] = dict(json.loads(text))
        except (ValueError, TypeError):
            expected, remedy = "which coordinator each study is of", "Restore it from a backup."
            raise SiteError(path, expected=expected, got="something else", remedy=remedy) from None

    def check_owner(self, study: str, coordinator: str) -> None:
        """Return unless a study is another coordinator's.

        Raises:
          RefusedError: it is; it tells no more than the answer to any study that is not approved.
        """
        if self._owners.get(study, coordinator) != coordinator:
            expected, got = "a study of this coordinator", "another's"
            remedy = "They must agree on who runs it, or change its name or seed."
            raise RefusedError(f"study {study}", expected=expected, got=got, remedy=remedy)

    def keep_owner(self, study: str, coordinator: str) -> None:
        """A study that was joined, or waits, stays with the coordinator who proposed it."""
        if study not in self._owners:
            self._owners[study] = coordinator
            with explain_disk_errors(self._path, SiteError):
                files.write(self._path, json.dumps(self._owners, indent=1), mode=0o600)
