"""The hospital's own record of every release, on disk and fsynced before the release leaves.

`ledger.jsonl` has one entry per line, to be read by people. Each line ends in the MAC of the line
before it and in its own, so no byte of it can change unnoticed. `ledger.head` holds the number of
lines, the last MAC, and where the ledger is. It is written after the line and not fsynced: it may
lag after a power cut, but never leads, so a ledger with fewer lines than its head says was rolled
back.
"""

import hmac
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from client.ledger.chain import Chain, damage
from client.ledger.entries import (
    TIME,
    Adopted,
    Contents,
    Created,
    Entry,
    Release,
    Reserved,
    Sealed,
    Sent,
    find_beginnings,
)
from client.ledger.place import describe_place
from client.privacy.parameters import TRAINING
from client.storage import explain_disk_errors, has_worked
from common.errors import SiteError
from common.protocol.ledger import LedgerHead
from common.support import files

log = logging.getLogger(__name__)

_MODE = 0o600
_MOST_ADOPTIONS = 9
"""So many adoptions that this folder knows nothing of are found out by what was told since."""

L = TypeVar("L", Reserved, Sealed, Sent)


def _load(folder: Path) -> tuple[list[Entry], list[str], bytes]:
    """Entries, their hashes, and what tore; a folder that nothing left yet has none."""
    path = folder / "ledger.jsonl"
    if not has_worked(folder):
        return [], [], b""
    chain, head_path = Chain.of(folder), folder / "ledger.head"
    told = _bytes(head_path)  # before the ledger, which may grow meanwhile
    data = _bytes(path)
    chain.check_secret(path, data or b"", told or b"")
    entries, hashes, torn = chain.parse(path, data or b"")
    head = None if told is None else chain.read_head(head_path, told)
    if data is None:
        raise damage(path, "the ledger of a site that has joined studies", "no such file")
    if not hashes:  # its first line is written with the file, or neither is
        raise damage(path, "a first line", "none")
    if head is None and len(hashes) > 1:  # the head is there before the second line
        raise damage(head_path, f"{len(hashes)} lines and a hash", "no such file")
    if head and head.count > len(hashes):
        raise damage(path, f"at least {head.count} lines, as ledger.head says", f"{len(hashes)}")
    if head and hashes[head.count - 1] != head.hash:
        raise damage(path, f"line {head.count} as ledger.head says", "another")
    return entries, hashes, torn


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def read_ledger(folder: Path) -> list[Entry]:
    """Every entry, verified, for showing; needs no lock, passes over an append in progress.

    Raises:
      SiteError: the ledger is damaged or was rolled back, its secret is lost, or the disk refuses.
    """
    with explain_disk_errors(folder, SiteError):
        return _load(folder)[0]


def check_place(folder: Path) -> None:
    """Return unless the ledger in a state folder is a copy, or was moved without a word.

    Raises:
      SiteError: it was last in use in another file, or on another machine.
    """
    path = folder / "ledger.head"
    if not path.exists():
        return
    chain, here = Chain.of(folder), describe_place(folder / "ledger.jsonl")
    if chain.read_head(path, path.read_bytes()).place != chain.name_place(here):
        expected, got = "the ledger where it was last in use", "a copy, or another machine"
        remedy = (
            "If it was moved, and no other copy is in use or was used since: "
            "`consilium-client ledger-move`."
        )
        raise SiteError(folder, expected=expected, got=got, remedy=remedy)


class Ledger:
    """The ledger of the site with this state folder, open for writing; nobody else can open it.

    A torn last line, left by a power cut, is set aside: its append never returned, so nothing was
    drawn or sent on its account. One thread at a time.

    Args:
      folder: Of the site; it holds the secret that keys the ledger, too.
      bound: Whether to refuse a ledger that was last open elsewhere. Otherwise it is moved here.

    Raises:
      SiteError: another process has it open, it is damaged, was rolled back or is a copy, its
        secret is lost, or the disk refuses.
    """

    def __init__(self, folder: Path, *, bound: bool = False) -> None:
        self._folder, self._path = folder, folder / "ledger.jsonl"
        with ExitStack() as stack, explain_disk_errors(folder, SiteError):
            files.make_private(folder, folder, SiteError)
            stack.enter_context(lock_state(folder))
            entries, self._hashes, torn = _load(folder)
            self._chain = Chain.of(folder)
            if not entries:
                entries, self._hashes = _create(folder)
            self._place = describe_place(self._path)
            if bound:
                check_place(folder)
            self._file = _opened(stack, self._path, os.O_APPEND)
            self._inode, self._size = self._path.stat().st_ino, self._path.stat().st_size
            if torn:
                self._set_aside(torn)
            os.fsync(self._file)  # a line that only outlived a kill must outlive a power cut too
            files.write(folder / "ledger.head", self._head(), _MODE)
            self._head_file = _opened(stack, folder / "ledger.head")
            self._resources, self._rests = stack.pop_all(), False
        self._refusal: SiteError | None = None
        self._adoptions = sum(isinstance(entry, Adopted) for entry in entries)
        # Of thousands of rounds without privacy, only the hashes stay in memory.
        self.spending = [entry for entry in entries if not isinstance(entry, Sent)]
        """Every line but those of what was sent: what ε is computed from."""
        self._sealed = {e.key: e.contents for e in entries if isinstance(e, Sealed)}
        self._drawing: set[str] = set()
        self.began = find_beginnings(entries)
        """When the site first answered whether it takes part, by study."""
        self._received: dict[tuple[str, str], set[str]] = defaultdict(set)
        for entry in entries:
            self._note_received(entry)

    def _head(self) -> bytes:
        return self._chain.make_head(len(self._hashes), self._hashes[-1], self._place)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process open it; nothing can be written here any more."""
        self._file = self._head_file = -1
        self._resources.close()
        self._rests = False

    def rest(self) -> None:
        """Free the lock and the open files; the next line takes them up, if nobody wrote since."""
        self.close()
        self._rests = True

    def _wake(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(lock_state(self._folder))
            self._file = _opened(stack, self._path, os.O_APPEND)
            self._head_file = _opened(stack, self._folder / "ledger.head")
            self._resources, self._rests = stack.pop_all(), False

    @property
    def head(self) -> LedgerHead:
        """How far it goes, to be told; whoever remembers it notices a rollback of the folder."""
        count, last = len(self._hashes), self._hashes[-1]
        receipt = self._chain.sign_receipt(self._adoptions, count, last)
        return LedgerHead(count=count, hash=last, receipt=receipt)

    def check_receipt(self, told: LedgerHead) -> None:
        """Notice by what this site told earlier that the whole state folder was rolled back.

        What this site never told, or told of a ledger that was replaced, is passed over: nobody can
        lock it out with that.
        What it did tell, but no longer holds, becomes the head, so nothing leaves.

        Raises:
          SiteError: the ledger was rolled back, or a copy of it went on elsewhere.
        """
        known = range(self._adoptions, self._adoptions + _MOST_ADOPTIONS)
        signed = (self._chain.sign_receipt(n, told.count, told.hash) for n in known)
        if not any(hmac.compare_digest(one, told.receipt) for one in signed):
            log.warning("%s: told of a head that is not of this ledger", self._path)
        elif self.hash_at(told.count) != told.hash:
            with explain_disk_errors(self._folder, SiteError):
                head = self._chain.make_head(told.count, told.hash, self._place)
                files.write(self._folder / "ledger.head", head, _MODE)
            self.close()
            self._refusal = damage(
                self._path,
                f"line {told.count} as this site told a coordinator",
                f"{len(self._hashes)} lines" if told.count > len(self._hashes) else "another",
            )
            raise self._refusal

    def hash_at(self, count: int) -> str | None:
        """The hash of line `count`, 1-based; None where the ledger does not go so far."""
        return self._hashes[count - 1] if 0 < count <= len(self._hashes) else None

    def sealed(self, release: Release) -> Contents | None:
        """The reply that a private release already has, if any."""
        return self._sealed.get(release.key)

    def reserve(self, release: Release) -> None:
        """Before the first private draw: from here on its steps are spent."""
        self.spending.append(reserved := self._append(Reserved, release))
        self._note_received(reserved)
        self._drawing.add(release.key)

    def seal(self, release: Release, contents: Contents) -> None:
        """The reply to the last reservation is in the outbox. Raises `KeyError` without one."""
        self._drawing.remove(release.key)
        self.spending.append(self._append(Sealed, release, contents=contents))
        self._sealed[release.key] = contents

    def send(self, release: Release, contents: Contents) -> None:
        """Just before a reply leaves. Raises `ValueError` if it is private and not sealed."""
        if release.privacy and self.sealed(release) != contents:
            raise ValueError("a private reply leaves only after it was sealed")
        sent = self._append(Sent, release, contents=contents)
        self.began = find_beginnings([sent]) | self.began
        self._note_received(sent)

    def models(self, study: str, *kinds: str) -> Set[str]:
        """SHA-256 of what came: with sums or rounds that were drawn or answered, or any end."""
        return set().union(*(self._received.get((study, kind), ()) for kind in kinds))

    def sealed_ends(self, study: str) -> Set[str]:
        """Keys of the replies to final messages of a study that were sealed."""
        sealed = (e for e in self.spending if isinstance(e, Sealed))
        return {e.key for e in sealed if (e.release.study, e.release.kind) == (study, "final")}

    @property
    def ended(self) -> Set[str]:
        """Studies whose final message came."""
        return {study for study, kind in self._received if kind == "final"}

    def _note_received(self, entry: Entry) -> None:
        trained = entry.release.kind in ("sums", *TRAINING) if isinstance(entry, Sent) else False
        if isinstance(entry, Sent) and trained and not entry.contents.tensors:
            return  # the word of an error is no part taken
        if isinstance(entry, Sent | Reserved) and entry.release.received:
            self._received[entry.release.study, entry.release.kind].add(entry.release.received)

    def _append(self, kind: type[L], release: Release, **content: Contents) -> L:
        n = len(self._hashes) + 1
        entry = kind(n=n, time=write_time(), key=release.key, release=release, **content)
        line, own = self._chain.make_line(entry, self._hashes[-1])
        if self._refusal:
            raise self._refusal
        with explain_disk_errors(self._path, SiteError):
            if self._rests:
                self._wake()
            self._still_ours()
            try:
                _write(self._file, line)
                os.fsync(self._file)
                os.pwrite(self._head_file, self._chain.make_head(n, own, self._place), 0)
            except BaseException:
                self._take_back()
                raise
        self._size += len(line)
        self._hashes.append(own)
        return entry

    def _still_ours(self) -> None:
        """Never write into a file that was deleted, restored or changed under us."""
        now = self._path.stat()
        if (now.st_ino, now.st_size) != (self._inode, self._size):
            expected, remedy = "the ledger as this process left it", "Start again."
            raise SiteError(self._path, expected=expected, got="another", remedy=remedy)

    def _take_back(self) -> None:
        """Undo an append that failed: nothing was drawn for it, so nothing may count."""
        try:
            os.pwrite(self._head_file, self._head(), 0)
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)
        except OSError:
            self.close()

    def _set_aside(self, torn: bytes) -> None:
        aside = name_aside(self._folder, "torn")
        log.warning("%s: a torn last line is set aside in %s", self._path, aside.name)
        files.write(aside, torn, _MODE)
        self._size -= len(torn)
        os.ftruncate(self._file, self._size)


def _create(folder: Path) -> tuple[list[Entry], list[str]]:
    """Begin a ledger; a kill before its head is written leaves one that can be opened."""
    chain, first = Chain.of(folder), Created(n=1, time=write_time())
    data, hashes = chain.make_lines([first])
    files.write(folder / "ledger.jsonl", data, _MODE)
    files.sync(folder.parent)
    return [first], hashes


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _opened(stack: ExitStack, path: Path, flags: int = 0) -> int:
    file = os.open(path, os.O_WRONLY | flags)
    stack.callback(os.close, file)
    return file


@contextmanager
def lock_state(folder: Path) -> Iterator[None]:
    """Keep every other process out of the state folder; raises `SiteError` if one is in."""
    lock = FileLock(folder / "ledger.lock", mode=_MODE, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        expected, remedy = "one process at a time", "Stop the other one first."
        got = "another that has it open"
        raise SiteError(folder, expected=expected, got=got, remedy=remedy) from None
    try:
        yield
    finally:
        lock.release()


def name_aside(folder: Path, word: str) -> Path:
    """A free name for what is set aside."""
    prefix = f"ledger.{word}-"
    taken = [int(path.name.removeprefix(prefix)) for path in folder.glob(f"{prefix}[0-9]*")]
    return folder / f"{prefix}{max(taken, default=0) + 1}"


def write_time() -> str:
    """Now, as lines have it."""
    return datetime.now(UTC).strftime(TIME)
