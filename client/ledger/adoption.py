"""A new ledger in place of one that was lost or damaged; what can still be proved stays spent."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.ledger.chain import Chain, SecretError
from client.ledger.entries import Adopted, Created, Entry, Release, Reserved, Sealed, Sent
from client.ledger.ledger import lock_state, name_aside, read_ledger, write_time
from client.ledger.place import describe_place
from client.storage import AGREED, explain_disk_errors
from common.errors import SiteError
from common.support import files

_MODE = 0o600


@dataclass(frozen=True)
class Salvage:
    """What is left of a ledger.

    Attributes:
      entries: Those that are as they were written, of the ledger and of every one set aside before.
        Reservations that other lines prove are among them.
      lost: Why the ledger cannot be opened; None if it can.
    """

    entries: Sequence[Entry]
    lost: SiteError | None


def salvage_ledger(folder: Path) -> Salvage:
    """What is left of the ledger in a state folder, and what is wrong with it.

    Raises:
      SiteError: the secret is not the one that it was written under, or the disk refuses.
    """
    lost: SiteError | None = None
    try:
        read_ledger(folder)
    except SecretError:
        raise
    except SiteError as ex:
        lost = ex
    with explain_disk_errors(folder, SiteError):
        chain = Chain.of(folder)
        found = [entry for path in _list_files(folder) for entry in _read(chain, path)]
    entries = list({entry.nonce: entry for entry in found}.values())
    return Salvage([*_prove(entries), *entries], lost)


def _list_files(folder: Path) -> list[Path]:
    """Oldest first: each began with what could be read of the one before."""
    aside = sorted(folder.glob("ledger.replaced-*"), key=lambda path: (len(path.name), path.name))
    return [path for path in (*aside, folder / "ledger.jsonl") if path.exists()]


def _read(chain: Chain, path: Path) -> list[Entry]:
    return [one for one in chain.salvage(path.read_bytes()) if not isinstance(one, Created)]


def _prove(entries: Sequence[Entry]) -> Iterator[Reserved]:
    """Reservations whose own lines are lost: what was sealed or sent had one."""
    there = Counter(e.key for e in entries if isinstance(e, Reserved))
    sealed = Counter(e.key for e in entries if isinstance(e, Sealed))
    left = {e.key: e for e in entries if isinstance(e, Sealed | Sent) and e.release.privacy}
    for key, entry in left.items():
        for _ in range(max(sealed[key], 1) - there[key]):
            yield Reserved(n=1, time=entry.time, key=key, release=entry.release)


def adopt_ledger(folder: Path, epsilon: float, delta: float, whole: Sequence[Release] = ()) -> None:
    """Start a new ledger in place of a lost or damaged one, which is set aside, not deleted.

    It begins with every line that can still be read, so nothing that those prove is given back.

    Args:
      folder: The site's state folder.
      epsilon: What the lost lines spent, at least, >= 0; it stays spent for good.
      delta: The δ of that ε, in [0, 1).
      whole: Private releases of studies that were agreed to and have no line left: they count.

    Raises:
      SiteError: another process uses the ledger, its secret is lost, or the disk refuses.
    """
    if not (0 <= epsilon < float("inf") and 0 <= delta < 1):
        expected = "what was spent at least: ε >= 0 and δ in [0, 1)"
        raise SiteError("adopt", expected=expected, got=(epsilon, delta))
    with explain_disk_errors(folder, SiteError), lock_state(folder):
        now, path, new = write_time(), folder / "ledger.jsonl", folder / "ledger.new"
        kept = salvage_ledger(folder).entries
        counted = [Reserved(n=1, time=now, key=one.key, release=one) for one in whole]
        agreed = {p.name.removesuffix(AGREED) for p in folder.glob(f"studies/*{AGREED}")}
        agreed |= {e.release.study for e in kept if isinstance(e, Reserved)}
        told = Adopted(n=1, time=now, epsilon=epsilon, delta=delta, studies=tuple(sorted(agreed)))
        entries: list[Entry] = [Created(n=1, time=now), *kept, *counted, told]
        numbered = [e.model_copy(update={"n": n}) for n, e in enumerate(entries, 1)]
        chain = Chain.of(folder)
        data, hashes = chain.make_lines(numbered)
        files.write(new, data, _MODE)
        if path.exists():
            path.rename(name_aside(folder, "replaced"))
        # The head goes first: a kill before the ledger is there leaves none that can be opened.
        head = chain.make_head(len(hashes), hashes[-1], describe_place(new))
        files.write(folder / "ledger.head", head, _MODE)
        new.rename(path)
        files.sync(folder)
