"""The last line of each site's ledger when it last replied, so that a rollback shows."""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from common.errors import RunError
from common.protocol.ledger import LedgerHead
from server.runs.run_folder import RunFolder

Ledgers = dict[str, LedgerHead]
"""The last line of each ledger, by site name."""

_FILE = "ledgers.json"
_LEDGERS: TypeAdapter[Ledgers] = TypeAdapter(Ledgers)

ROLLED_BACK = (
    "its ledger was rolled back. Let the hospital restore its newest copy, so that nothing it "
    f"spent is forgotten; if it adopted a new ledger, take its entry out of {_FILE}"
)


def read_heads(folder: RunFolder) -> Ledgers:
    """Read the ledger heads that sites told when they joined this run before."""
    path: Path = folder.path / _FILE
    try:
        return _LEDGERS.validate_json(path.read_bytes()) if path.exists() else {}
    except ValidationError:
        got, remedy = "something else", "Restore it from a backup."
        expected = "how far each site's ledger went"
        raise RunError(path, expected=expected, got=got, remedy=remedy) from None


def keep_heads(folder: RunFolder, ledgers: Mapping[str, LedgerHead]) -> None:
    """Keep the furthest head that each site told, now or before: an old reply may come again."""
    before = read_heads(folder)
    further = {n: h for n, h in ledgers.items() if n not in before or h.count > before[n].count}
    told = {name: head.model_dump() for name, head in (before | further).items()}
    folder.write(_FILE, json.dumps(told, indent=1, sort_keys=True))
