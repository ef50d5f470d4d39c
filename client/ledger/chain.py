"""The chain of a ledger: each line ends in the MAC of the line before it, and in its own.

The key comes from the site's secret. Who can write the files, but does not know the secret, can
write no line, and no head. Each line holds a nonce, so no MAC that is told tells what a line says.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from client.ledger.entries import Created, Entry
from client.storage import REPLACED, read_site_secret
from common.errors import SiteError

FIRST = "0" * 64
"""Stands for the line before the first."""

_MAC = rb"[0-9a-f]{64}"
_HEAD = re.compile(rb"([0-9]{12}) (%s) (%s) (%s)\n" % (_MAC, _MAC, _MAC))
_LINE = re.compile(rb'(\{"n": [^\n]*?), "previous": "(%s)", "hash": "(%s)"\}' % (_MAC, _MAC))
_WHOLE_LINE = re.compile(rb', "hash": "%s"}' % _MAC)
_REMEDY = "Restore ledger.jsonl from a backup, or run `consilium-client ledger-adopt`."
_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)


class SecretError(SiteError):
    """A ledger of which no line was written under the secret that is there."""


@dataclass(frozen=True)
class Head:
    """What `ledger.head` says."""

    count: int
    """The number of lines."""
    hash: str
    """Of the last."""
    place: str
    """The name of the place where the ledger was in use."""


@dataclass(frozen=True)
class Line:
    """An entry as the chain holds it: between the hash of the line before it and its own."""

    entry: Entry
    previous: str
    hash: str


class Chain:
    """Makes and checks lines, heads and receipts under one secret."""

    def __init__(self, secret: bytes) -> None:
        self._key = hmac.digest(secret, b"ledger", hashlib.sha256)

    @classmethod
    def of(cls, folder: Path) -> "Chain":
        """Of the site with this state folder; raises `SiteError` if its secret is lost."""
        return cls(read_site_secret(folder))

    def _mac(self, use: bytes, text: bytes) -> str:
        return hmac.digest(self._key, use + b":" + text, hashlib.sha256).hex()

    def make_line(self, entry: Entry, previous: str) -> tuple[bytes, str]:
        """The line that holds an entry, and its hash."""
        body = json.dumps(entry.model_dump(mode="json")).encode()[:-1]
        linked = b'%s, "previous": "%s"' % (body, previous.encode())
        own = self._mac(b"line", linked)
        return b'%s, "hash": "%s"}\n' % (linked, own.encode()), own

    def make_lines(self, entries: Iterable[Entry]) -> tuple[bytes, list[str]]:
        """A whole ledger, and the hash of each line."""
        data, hashes = b"", [FIRST]
        for entry in entries:
            line, own = self.make_line(entry, hashes[-1])
            data += line
            hashes.append(own)
        return data, hashes[1:]

    def read_line(self, line: bytes) -> Line | None:
        """What a line says, wherever it stands; None unless it was written under this secret."""
        found = _LINE.fullmatch(line)
        return self._check(found) if found else None

    def _check(self, found: re.Match[bytes]) -> Line | None:
        linked, own = found.string[found.start() : found.end(2) + 1], found[3].decode()
        if not hmac.compare_digest(self._mac(b"line", linked), own):
            return None
        try:
            entry = _ENTRY.validate_json(found[1] + b"}", strict=True)
        except ValidationError:
            return None
        return Line(entry, found[2].decode(), own)

    def salvage(self, data: bytes) -> list[Entry]:
        """Every entry that was written under this secret, whatever became of those around it."""
        return [read.entry for read in map(self._check, _LINE.finditer(data)) if read]

    def check_secret(self, path: Path, data: bytes, head: bytes) -> None:
        """Return unless nothing of a ledger is of this secret: one damaged line is another matter.

        Raises:
          SecretError: naming the secret.
        """
        ours = any(map(self.read_line, data.split(b"\n"))) or self._parse_head(head)
        if (data or head) and not ours:
            expected = f"lines written under {path.parent / 'secret'}"
            got = "none: the secret is another now, or all of the ledger is"
            raise SecretError(path, expected=expected, got=got, remedy=REPLACED)

    def parse(self, path: Path, data: bytes) -> tuple[list[Entry], list[str], bytes]:
        """Entries, their hashes, and what stands after the last newline: an append in progress.

        Raises:
          SiteError: naming the first line that is not as it was written.
        """
        *lines, torn = data.split(b"\n")
        entries: list[Entry] = []
        hashes = [FIRST]
        for n, line in enumerate(lines, 1):
            read = self.read_line(line)
            if read is None:
                raise damage(path, f"line {n} as it was written", "another")
            starts = isinstance(read.entry, Created)
            if (read.entry.n, read.previous, starts) != (n, hashes[-1], n == 1):
                raise damage(path, f"line {n} as it was written", "another one of this site's")
            entries.append(read.entry)
            hashes.append(read.hash)
        whole = _WHOLE_LINE.search(torn)
        if whole and whole.end() < len(torn):  # an append stops before its newline, never beyond it
            raise damage(path, "a newline after each line", "another byte")
        return entries, hashes[1:], torn

    def make_head(self, count: int, last: str, place: bytes) -> bytes:
        """The content of `ledger.head`; of fixed length, as it is replaced in place."""
        text = f"{count:012d} {last} {self.name_place(place)}"
        return f"{text} {self._mac(b'head', text.encode())}\n".encode()

    def read_head(self, path: Path, data: bytes) -> Head:
        """What `ledger.head` says; raises `SiteError` unless it is as it was written."""
        head = self._parse_head(data)
        if head is None:
            raise damage(path, "a number of lines and a hash, as it was written", "something else")
        return head

    def _parse_head(self, data: bytes) -> Head | None:
        found = _HEAD.fullmatch(data)
        if not found or not int(found[1]):
            return None
        if not hmac.compare_digest(self._mac(b"head", data[: found.end(3)]), found[4].decode()):
            return None
        return Head(int(found[1]), found[2].decode(), found[3].decode())

    def name_place(self, place: bytes) -> str:
        """A name for a place that tells nothing of it."""
        return self._mac(b"place", place)

    def sign_receipt(self, adoptions: int, count: int, last: str) -> str:
        """By which this site knows again what it told of its ledger.

        Args:
          adoptions: How often it was replaced before: what was told earlier no longer binds.
          count: How many lines it had.
          last: The hash of the last of them.
        """
        return self._mac(b"receipt", f"{adoptions} {count} {last}".encode())


def damage(path: Path, expected: str, got: str) -> SiteError:
    """What to say of a ledger that is not as it was written."""
    return SiteError(path, expected=expected, got=got, remedy=_REMEDY)
