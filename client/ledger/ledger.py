"""The hospital's own record of every release, on disk and fsynced before the release leaves.

`ledger.jsonl` has one entry per line, to be read by people. Each line ends in the hash of the line
before it and in its own, so no byte of it can change unnoticed. `ledger.head` holds the number of
lines and the last hash. It is written after the line and not fsynced: it may lag after a power cut,
but never leads, so a ledger with fewer lines than its head says was rolled back.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from client.ledger.entries import Adopted, Contents, Created, Entry, Release, Reserved, Sealed, Sent
from client.storage import explain_disk_errors
from common.errors import SiteError
from common.support import files

log = logging.getLogger(__name__)

_MODE = 0o600
_AGREED = ".agreement.json"
"""What the names of agreements end in."""
_FIRST = "0" * 64
_HEAD = re.compile(rb"([0-9]{12}) ([0-9a-f]{64})\n")
_WHOLE_LINE = re.compile(rb', "hash": "[0-9a-f]{64}"}')
_REMEDY = "Restore ledger.jsonl from a backup, or run `consilium-client ledger-adopt`."

_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)
L = TypeVar("L", Reserved, Sealed, Sent)


# --- the chain ---


@dataclass(frozen=True)
class ChainHead:
    """How far a ledger goes: its number of lines and the hash of the last."""

    count: int
    hash: str

    @property
    def _text(self) -> bytes:
        return f"{self.count:012d} {self.hash}\n".encode()  # of fixed length: replaced in place


def _link(body: bytes, previous: str) -> tuple[bytes, str]:
    """The line that holds the JSON object `body`, and its hash."""
    linked = b'%s, "previous": "%s"' % (body[:-1], previous.encode())
    own = hashlib.sha256(linked).hexdigest()
    return b'%s, "hash": "%s"}\n' % (linked, own.encode()), own


_LINK = len(_link(b"", _FIRST)[0])


def _unlink(path: Path, line: bytes, n: int, previous: str) -> tuple[Entry, str]:
    """The entry of a line, and its hash; raises `SiteError` unless it is line `n` as written."""
    body = line[:-_LINK] + b"}"
    again, own = _link(body, previous)
    try:
        entry = _ENTRY.validate_json(body, strict=True) if again == line else None
    except ValidationError:
        entry = None
    if entry is None or entry.n != n or isinstance(entry, Created | Adopted) != (n == 1):
        raise _damage(path, f"line {n} as it was written", "another")
    return entry, own


def _parse(path: Path, data: bytes) -> tuple[list[Entry], list[str], bytes]:
    """Entries, their hashes, and what stands after the last newline: an append in progress."""
    *lines, torn = data.split(b"\n")
    entries, hashes = [], [_FIRST]
    for n, line in enumerate(lines, 1):
        entry, own = _unlink(path, line + b"\n", n, hashes[-1])
        entries.append(entry)
        hashes.append(own)
    whole = _WHOLE_LINE.search(torn)
    if whole and whole.end() < len(torn):  # an append stops before its newline, never beyond it
        raise _damage(path, "a newline after each line", "another byte")
    return entries, hashes[1:], torn


def _load(folder: Path) -> tuple[list[Entry], list[str], bytes]:
    path = folder / "ledger.jsonl"
    head = _read_head(folder / "ledger.head")  # before the ledger, which may grow meanwhile
    data = path.read_bytes() if path.exists() else None
    entries, hashes, torn = _parse(path, data or b"")
    if data is None and _worked(folder):
        raise _damage(path, "the ledger of a site that has joined studies", "no such file")
    if data is not None and not hashes:  # its first line is written with the file, or neither is
        raise _damage(path, "a first line", "none")
    if head is None and len(hashes) > 1:  # the head is there before the second line
        raise _damage(folder / "ledger.head", f"{len(hashes)} lines and a hash", "no such file")
    if head and head.count > len(hashes):
        raise _damage(path, f"at least {head.count} lines, as ledger.head says", f"{len(hashes)}")
    if head and hashes[head.count - 1] != head.hash:
        raise _damage(path, f"line {head.count} as ledger.head says", "another")
    return entries, hashes, torn


def _worked(folder: Path) -> bool:
    """Whether a site has used this folder, and so must have a ledger."""
    traces = f"studies/*{_AGREED}", "outbox/*", "ledger.head"
    return any(True for trace in traces for _ in folder.glob(trace))


def _read_head(path: Path) -> ChainHead | None:
    if not path.exists():
        return None
    found = _HEAD.fullmatch(path.read_bytes())
    if not found or not int(found[1]):
        raise _damage(path, "a number of lines and a hash", "something else")
    return ChainHead(int(found[1]), found[2].decode())


def _damage(path: Path, expected: str, got: str) -> SiteError:
    return SiteError(path, expected=expected, got=got, remedy=_REMEDY)


# --- the file ---


def read_ledger(folder: Path) -> list[Entry]:
    """Every entry, verified, for showing; needs no lock, passes over an append in progress.

    Raises:
      SiteError: the ledger is damaged or was rolled back, or cannot be read.
    """
    with explain_disk_errors(folder, SiteError):
        return _load(folder)[0]


def adopt_ledger(folder: Path, epsilon: float, delta: float) -> None:
    """Start a new ledger in place of a lost or damaged one, which is set aside, not deleted.

    Args:
      folder: The site's state folder.
      epsilon: What this hospital's patients have spent at least, >= 0; it stays spent for good.
      delta: The δ of that ε, in [0, 1).

    Raises:
      SiteError: another process uses the ledger, or the disk refuses.
    """
    if not (0 <= epsilon < float("inf") and 0 <= delta < 1):
        expected = "what was spent at least: ε >= 0 and δ in [0, 1)"
        raise SiteError("adopt", expected=expected, got=(epsilon, delta))
    with explain_disk_errors(folder, SiteError), lock_state(folder):
        path = folder / "ledger.jsonl"
        if path.exists():
            path.rename(_aside(folder, "replaced"))
        # The old head stays until the new ledger is there: a kill in between starts no empty one.
        studies = sorted(p.name.removesuffix(_AGREED) for p in folder.glob(f"studies/*{_AGREED}"))
        first = Adopted(n=1, time=_now(), epsilon=epsilon, delta=delta, studies=tuple(studies))
        _create(folder, first)


class Ledger:
    """The ledger of the site with this state folder, open for writing; nobody else can open it.

    A torn last line, left by a power cut, is set aside: its append never returned, so nothing was
    drawn or sent on its account. One thread at a time.

    Raises:
      SiteError: another process has it open, it is damaged or was rolled back, or the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "ledger.jsonl"
        with ExitStack() as stack, explain_disk_errors(folder, SiteError):
            folder.mkdir(mode=0o700, exist_ok=True)
            stack.enter_context(lock_state(folder))
            entries, self._hashes, torn = _load(folder)
            if not entries:
                entries, self._hashes = _create(folder, Created(n=1, time=_now()))
            self._file = _opened(stack, self._path, os.O_APPEND)
            self._inode, self._size = self._path.stat().st_ino, self._path.stat().st_size
            if torn:
                self._set_aside(torn)
            os.fsync(self._file)  # a line that only outlived a kill must outlive a power cut too
            files.write(folder / "ledger.head", self.head._text, _MODE)
            self._head_file = _opened(stack, folder / "ledger.head")
            self._resources, self._rests = stack.pop_all(), False
        # Of thousands of rounds without privacy, only the hashes stay in memory.
        self.spending = [entry for entry in entries if not isinstance(entry, Sent)]
        """Every line but those of what was sent: what ε is computed from."""
        self._sealed = {e.key: e.contents for e in entries if isinstance(e, Sealed)}
        self._drawing: set[str] = set()
        self.ends: dict[str, frozenset[str]] = {}
        """By study, SHA-256 of what each final message held that was answered."""
        for entry in entries:
            self._note_end(entry)

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
    def head(self) -> ChainHead:
        """How far it goes; a server that remembers it notices a rollback of the whole folder."""
        return ChainHead(len(self._hashes), self._hashes[-1])

    def hash_at(self, count: int) -> str | None:
        """The hash of line `count`, 1-based; None where the ledger does not go so far."""
        return self._hashes[count - 1] if 0 < count <= len(self._hashes) else None

    def sealed(self, release: Release) -> Contents | None:
        """The reply that a private release already has, if any."""
        return self._sealed.get(release.key)

    def reserve(self, release: Release) -> None:
        """Before the first private draw: from here on its steps are spent."""
        self.spending.append(self._append(Reserved, release))
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
        self._note_end(self._append(Sent, release, contents=contents))

    def _note_end(self, entry: Entry) -> None:
        if isinstance(entry, Sent) and entry.release.kind == "final":
            study, received = entry.release.study, entry.release.received or ""
            self.ends[study] = self.ends.get(study, frozenset()) | {received}

    def _append(self, kind: type[L], release: Release, **content: Contents) -> L:
        n = len(self._hashes) + 1
        entry = kind(n=n, time=_now(), key=release.key, release=release, **content)
        line, own = _link(_json(entry), self._hashes[-1])
        with explain_disk_errors(self._path, SiteError):
            if self._rests:
                self._wake()
            self._still_ours()
            try:
                _write(self._file, line)
                os.fsync(self._file)
                os.pwrite(self._head_file, ChainHead(n, own)._text, 0)
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
            os.pwrite(self._head_file, self.head._text, 0)
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)
        except OSError:
            self.close()

    def _set_aside(self, torn: bytes) -> None:
        aside = _aside(self._folder, "torn")
        log.warning("%s: a torn last line is set aside in %s", self._path, aside.name)
        files.write(aside, torn, _MODE)
        self._size -= len(torn)
        os.ftruncate(self._file, self._size)


def _create(folder: Path, first: Created | Adopted) -> tuple[list[Entry], list[str]]:
    line, own = _link(_json(first), _FIRST)
    files.write(folder / "ledger.jsonl", line, _MODE)
    files.sync(folder.parent)
    files.write(folder / "ledger.head", ChainHead(1, own)._text, _MODE)
    return [first], [own]


def _json(entry: Entry) -> bytes:
    content: dict[str, Any] = entry.model_dump(mode="json")
    return json.dumps(content).encode()


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


def _aside(folder: Path, word: str) -> Path:
    prefix = f"ledger.{word}-"
    taken = [int(path.name.removeprefix(prefix)) for path in folder.glob(f"{prefix}[0-9]*")]
    return folder / f"{prefix}{max(taken, default=0) + 1}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
