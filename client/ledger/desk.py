"""The ledger and the outbox of a site, open: once per process, and for one process at a time."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from client.ledger.ledger import Ledger
from client.ledger.outbox import Outbox
from client.site import Site

_AWAKE = 128
"""So many sites of one process hold their files: three each, well below any usual limit."""


@dataclass(frozen=True)
class Desk:
    """What every reply passes on its way out.

    Attributes:
      ledger: What left.
      outbox: What may leave again.
    """

    ledger: Ledger
    outbox: Outbox


_awake: dict[Path, Desk] = {}


def open_desk(site: Site) -> Desk:
    """The desk of a site; no other process can open it meanwhile.

    A process with more sites than may hold their files lets those rest that it used longest ago.
    What another process then writes is noticed, and refused, before the next line.

    Raises:
      SiteError: another process has it open, the ledger is damaged, or the disk refuses.
    """
    desk = _awake.pop(site.state, None) or _desk(site.private())
    _awake[site.state] = desk
    if len(_awake) > _AWAKE:
        _awake.pop(next(iter(_awake))).ledger.rest()
    return desk


def close_desks() -> None:
    """Let go of every desk of this process: other processes may open them."""
    while _awake:
        _awake.popitem()[1].ledger.close()
    _desk.cache_clear()


@lru_cache(maxsize=4096)
def _desk(state: Path) -> Desk:
    return Desk(Ledger(state), Outbox(state / "outbox"))
