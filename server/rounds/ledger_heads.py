"""The last line of each site's ledger when it last replied, so that a rollback shows."""

import json
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from common.errors import RunError
from common.protocol.ledger import LedgerHead
from common.support import files

_Heads = dict[str, LedgerHead]
_HEADS: TypeAdapter[_Heads] = TypeAdapter(_Heads)

ROLLED_BACK = (
    "its ledger was rolled back, or used in two places. Let the hospital restore its newest copy, "
    "so that nothing it spent is forgotten; if it adopted a new ledger, take its entry out of "
    "ledgers.json"
)


class LedgerHeads:
    """How far each site's ledger went, by the site's name, in a file that runs may share.

    Args:
      path: The JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read_heads(self) -> _Heads:
        """Read what sites told before; raises `RunError` if the file is damaged."""
        path = self._path
        try:
            return _HEADS.validate_json(path.read_bytes()) if path.exists() else {}
        except ValidationError:
            got, remedy = "something else", "Restore it from a backup."
            expected = "how far each site's ledger went"
            raise RunError(path, expected=expected, got=got, remedy=remedy) from None

    def keep_heads(self, told: Mapping[str, LedgerHead]) -> None:
        """Keep the furthest head that each site told, now or before.

        Raises:
          RunError: the file is damaged, or cannot be written.
        """
        path = self._path
        try:
            with FileLock(path.with_name(f".{path.name}.lock")):
                known = self.read_heads()
                further = {
                    n: h for n, h in told.items() if n not in known or h.count > known[n].count
                }
                heads = {name: head.model_dump() for name, head in (known | further).items()}
                files.write(path, json.dumps(heads, indent=1, sort_keys=True), mode=0o600)
        except OSError as ex:
            remedy = "Free some space, then resume the run."
            raise RunError(path, expected="a file to write", got=ex, remedy=remedy) from None
