"""The one message that a site is answering: a node that is killed goes on with it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flwr.app import Message
from google.protobuf.message import DecodeError

from client.link.fleet_client import Envelope
from common.flower.messages import message_from_bytes, message_to_bytes
from common.support import files

log = logging.getLogger(__name__)

T = TypeVar("T")


class PendingMessage:
    """A message and, once there is one, the reply to it: in memory, with a copy on disk.

    A reply is kept until it is with the coordinator, and no second one is made: who waits for it
    may have parts of the first already.

    Args:
      folder: Private, and of no other process.
    """

    def __init__(self, folder: Path) -> None:
        self._envelope, self._reply = folder / "letter", folder / "reply"
        for torn in folder.glob(".*.part"):  # of a node that was killed while it wrote
            torn.unlink()
        self.envelope = _read(self._envelope, Envelope.from_bytes)
        self.reply = _read(self._reply, _message)
        asked = self.reply.metadata.reply_to_message_id if self.reply else ""
        if self.envelope is None or asked != self.envelope.identity:
            self.reply = None

    def store_message(self, envelope: Envelope) -> None:
        """A message has come."""
        self.envelope, self.reply = envelope, None
        _write(self._envelope, envelope.to_bytes())

    def store_reply(self, reply: Message) -> None:
        """It has been answered."""
        self.reply = reply
        _write(self._reply, message_to_bytes(reply))

    def drop(self) -> None:
        """Its answer is with the coordinator, or nobody waits for one."""
        self.envelope = self.reply = None
        self._envelope.unlink(missing_ok=True)
        self._reply.unlink(missing_ok=True)


def _message(data: bytes) -> Message:
    try:
        return message_from_bytes(data)
    except DecodeError:
        raise ValueError("no message") from None


def _read(path: Path, parse: Callable[[bytes], T]) -> T | None:
    """What a file holds; None if it is missing or damaged, as after a power cut."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("%s is damaged, and left out", path)
        return None


def _write(path: Path, data: bytes) -> None:
    """As well as it can: without the copy, only a kill makes a difference."""
    try:
        files.write(path, data, mode=0o600, durable=False)
    except OSError as ex:
        log.warning("%s: %s", path, ex.strerror)
