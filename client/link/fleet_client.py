"""The hospital's one connection: outward, over TLS, signed by the site's own key."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
from flwr.app import Message

from client.link import tls
from client.link.limits import CappedStream, Meter
from client.site import Connect, Site
from common.errors import ContractError, LinkError
from common.flower.compat import APP, VERSION, VERSION_HEADER, parse_version
from common.flower.messages import (
    MessageLimit,
    ObjectTree,
    ProtoMessage,
    list_objects,
    message_from_proto,
    pack_message,
    unpack_message,
)
from common.flower.supernode import (
    ActivateNodeRequest,
    ApiErrorCode,
    DeactivateNodeRequest,
    FlowerError,
    GetRunRequest,
    Node,
    PullMessagesRequest,
    PullMessagesResponse,
    PullObjectRequest,
    PushMessagesRequest,
    PushObjectRequest,
    SendNodeHeartbeatRequest,
    open_client,
)
from common.support import keys, signing

T = TypeVar("T")

HEARTBEAT = 15
"""Seconds that one heartbeat is good for; after two of them without, a site counts as gone."""

_AT_ONCE = 4
"""Parts of a message that travel at a time; one by one, most of a round would be waiting."""
_SOON = 0.1
"""Seconds between looks for a part of a message that the coordinator is still laying out."""


class NotAdmittedError(LinkError):
    """The coordinator does not know this site's key; it may be admitted later."""


class OverError(LinkError):
    """Nobody waits for an answer to a message, or would take this one."""


class _KnownError(LinkError):
    """What was asked is nonsense, but the key that asked is admitted."""


class Envelope(NamedTuple):
    """A message that waits at the coordinator: its content is still to be fetched."""

    head: ProtoMessage
    tree: ObjectTree

    @property
    def run(self) -> int:
        """Flower's number of the run it is of."""
        return int(self.head.metadata.run_id)

    @property
    def identity(self) -> str:
        """The SHA-256 of the message."""
        return str(self.head.metadata.message_id)

    @property
    def empty(self) -> Message:
        """The message without its content, to reply to."""
        return message_from_proto(self.head)

    @property
    def kind(self) -> str:
        """Flower's type of the message."""
        return str(self.head.metadata.message_type)

    @property
    def addressee(self) -> int:
        """The number of the site that it is for."""
        return int(self.head.metadata.dst_node_id)

    def to_bytes(self) -> bytes:
        """To be kept on disk."""
        whole = PullMessagesResponse(messages_list=[self.head], message_object_trees=[self.tree])
        return bytes(whole.SerializeToString())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Envelope":
        """From what was kept; raises `ValueError` if it is damaged."""
        try:
            whole = PullMessagesResponse.FromString(data)
            envelope = cls(whole.messages_list[0], whole.message_object_trees[0])
            message_from_proto(envelope.head)
        except Exception:  # whatever is no envelope, from a disk or a coordinator
            raise ValueError("no envelope") from None
        return envelope


class Heard(NamedTuple):
    """What the coordinator's server told about itself with its last answer."""

    ahead: float | None
    """Seconds that this machine's clock is ahead of its, to two seconds; None if untold."""
    until: datetime
    """When its certificate expires."""
    version: str | None
    """Of Consilium, if it tells."""


class Fleet:
    """Flower's Fleet interface at the coordinator, as one site uses it. Threads may share it.

    Args:
      server: `host:port`.
      ca: The certificate that the coordinator gave out, PEM; only what it vouches for is trusted.
      key: Of the site.
      memory: Of a file that remembers how new the server's certificate was.

    Attributes:
      heard: What the server told about itself; None until it first answers.

    Every method raises `LinkError` for whatever keeps the coordinator from answering.
    """

    def __init__(
        self, server: str, ca: Path, key: keys.PrivateKey, memory: Path | None = None
    ) -> None:
        self._certificate = tls.NewestCertificate(memory)
        self.server, self._ca, self._key = server, ca, key
        self._public = keys.pem(key.public_key())
        self.heard: Heard | None = None
        self._client = open_client(server, tls.make_context(ca), self._sign, self._hear)
        self._pool, self._closed = ThreadPoolExecutor(_AT_ONCE), False
        self._node = Node()

    @classmethod
    def open(cls, site: Site, connect: Connect) -> "Fleet":
        """One of the connections that a site file describes; nothing is sent yet.

        Raises:
          LinkError: its key or certificate cannot be used.
        """
        memory = site.find_link_folder(connect) / "certificate"
        return cls(connect.server, connect.ca, keys.read_private(connect.key), memory)

    def close(self) -> None:
        """Hang up, once every request under way is answered or has failed."""
        # A socket closed under a thread that reads it: the thread would read from whichever
        # connection next gets its number, and break that one's TLS.
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def check_admitted(self) -> None:
        """Return if the coordinator admitted this site's key, which then still counts as away.

        Raises:
          NotAdmittedError: it did not.
        """
        with suppress(_KnownError):
            self._activate(0)

    def activate(self, known: int | None) -> int:
        """Say that this site is here; returns the number that it has at the coordinator.

        Args:
          known: The number it had before. A site that was killed still counts as present, and only
            with its number is it let in again at once.

        Raises:
          NotAdmittedError: the coordinator does not know its key.
        """
        if known is not None:
            self._node = Node(node_id=known)
            with suppress(NotAdmittedError):  # removed, or admitted anew under another number
                if self.send_heartbeat():
                    return known
        try:
            self._node = Node(node_id=self._activate(HEARTBEAT))
        except NotAdmittedError:
            self.check_admitted()
            expected, got = "this site to be away", "one that counts as connected"
            remedy = "Stop the other with this key; one that was killed is gone in half a minute."
            raise LinkError(self.server, expected=expected, got=got, remedy=remedy) from None
        return int(self._node.node_id)

    def _activate(self, interval: int) -> int:
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=interval)
        return int(self._ask(self._client.ActivateNode, request).node_id)

    def send_heartbeat(self) -> bool:
        """Say that this site is still here."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT)
        return bool(self._ask(self._client.SendNodeHeartbeat, request).success)

    def deactivate(self) -> None:
        """Say that this site goes."""
        self._ask(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))

    def pull_envelope(self) -> Envelope | None:
        """The next message for this site, if there is one; the same again until it is answered."""
        answer = self._ask(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        try:
            return Envelope.from_bytes(answer.SerializeToString())
        except ValueError:
            raise LinkError(f"{self.server}: a message that cannot be read") from None

    def read_version(self, envelope: Envelope) -> str:
        """The release of Consilium that sent a message.

        Raises:
          ContractError: it comes with code of its own, or is of another application.
          OverError: nobody waits for an answer.
        """
        request = GetRunRequest(node=self._node, run_id=envelope.run)
        run = self._ask(self._client.GetRun, request).run
        if run.fab_id != APP or run.fab_hash:
            expected = "a run of Consilium without code of its own"
            got = f"one of {run.fab_id!r}, {'with' if run.fab_hash else 'without'} code"
            raise ContractError(self.server, expected=expected, got=got)
        return parse_version(run.fab_version) or ""

    def pull_message(self, envelope: Envelope, limit: MessageLimit) -> Message | None:
        """The whole message; None if nobody waits for an answer any more.

        Raises:
          ContractError: it is larger than its limit, or cannot be read.
        """
        objects: dict[str, bytes] = {}
        names = list_objects(envelope.tree)
        meter = Meter(limit, len(names))

        def fetch(name: str) -> bytes | None:
            meter.check()
            part = self._fetch(envelope, name)
            meter.count(len(part or b""))
            return part

        for name, part in zip(names, self._pool.map(fetch, names), strict=True):
            if part is None:
                return None
            objects[name] = part
        try:
            return unpack_message(envelope.identity, objects)
        except Exception:  # whatever a coordinator sent that is no message
            raise ContractError(f"{self.server}: a message that cannot be read") from None

    def _fetch(self, envelope: Envelope, name: str) -> bytes | None:
        """A part of a message, as soon as it is there; None if the message was withdrawn."""
        request = PullObjectRequest(node=self._node, run_id=envelope.run, object_id=name)
        while not self._closed:  # what its sender does not lay out in three minutes is withdrawn
            answer = self._ask(self._client.PullObject, request)
            if not answer.object_found:
                return None
            if answer.object_available:
                return bytes(answer.object_content)
            time.sleep(_SOON)
        return None

    def push_reply(self, envelope: Envelope, reply: Message) -> None:
        """Send a reply; who takes it deletes it there, with the message.

        If it fails, the same again is safe: what has arrived is not sent, nor counted, twice.
        """
        # How long the answer took is nobody's business: it may depend on who was drawn.
        asked = envelope.head.metadata
        reply.metadata.created_at, reply.metadata.ttl = asked.created_at, asked.ttl
        packed = pack_message(reply)
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[packed.envelope],
            message_object_trees=[packed.tree],
            clientapp_runtime_list=[0.0],
        )
        answer = self._ask(self._client.PushMessages, request)

        def push(name: str) -> None:
            part = PushObjectRequest(
                node=self._node,
                run_id=envelope.run,
                session_id=answer.session_id,
                object_id=name,
                object_content=packed.objects.get(name, b""),
            )
            stored = self._ask(self._client.PushObject, part).stored
            if not stored and not self.is_taken(envelope):
                raise LinkError(f"{self.server}: a part of a reply came too late")

        for _ in self._pool.map(push, answer.objects_to_push):
            pass

    def is_taken(self, envelope: Envelope) -> bool:
        """Whether the reply to a message has been taken, or nobody waits for it."""
        name = envelope.identity
        request = PullObjectRequest(node=self._node, run_id=envelope.run, object_id=name)
        try:
            return not self._ask(self._client.PullObject, request).object_found
        except OverError:
            return True

    def _sign(self, request: httpx.Request) -> None:
        """Say this site's release, ask for a plain answer, and sign the request whole."""
        request.extensions["trace"] = self._certificate.check
        request.headers["accept-encoding"] = "identity"
        request.headers[VERSION_HEADER] = VERSION
        asked = request.method, request.url.path, request.headers["host"], request.read()
        request.headers[signing.HEADER] = signing.sign_request(self._key, *asked)

    def _hear(self, response: httpx.Response) -> None:
        self.heard = Heard(
            ahead=_ahead(response.headers.get("date", "")),
            until=tls.read_expiry(response),
            version=parse_version(response.headers.get(VERSION_HEADER)),
        )
        if "content-encoding" in response.headers:
            expected, got = "a plain answer", "one with a content encoding"
            raise LinkError(self.server, expected=expected, got=got)
        response.stream = CappedStream(response, self.server)

    def _ask(self, method: Callable[[Any], T], request: Any) -> T:
        try:
            return method(request)
        except httpx.HTTPStatusError as ex:
            raise self._refused(ex.response) from None
        except httpx.RequestError as ex:
            raise tls.explain_failure(ex, self.server, self._ca) from None
        except ValueError:
            raise LinkError(f"{self.server}: what answered is no coordinator") from None

    def _refused(self, response: httpx.Response) -> LinkError:
        """What an answer other than the one asked for means."""
        error, status = FlowerError.from_json(response.text), response.status_code
        code = error.code if error else None
        if code in (ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, ApiErrorCode.FLEET_GET_RUN_FAILED):
            return OverError("the run has ended")
        if code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
            return _KnownError("the key is admitted")
        if code == ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE:
            expected, got = f"release {VERSION} of Consilium, as here", "another"
            remedy = "Both sides must install the same release."
            return LinkError(self.server, expected=expected, got=got, remedy=remedy)
        if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            return OverError("the coordinator takes no reply as large as this one")
        if status == httpx.codes.CONFLICT:
            expected, got = "a request that is new there", "one that may be old"
            remedy = "It began while this clock, which is behind, was not there yet: it will pass."
            return LinkError(self.server, expected=expected, got=got, remedy=remedy)
        unknown = status == httpx.codes.UNAUTHORIZED
        ahead = self.heard.ahead if self.heard else None
        if unknown and ahead is not None and not -signing.BEHIND < ahead < signing.AHEAD:
            expected, got = "clocks that agree to five seconds", f"{ahead:+.0f} s here"
            remedy = "Set this machine's clock, for instance by NTP."
            return LinkError(self.server, expected=expected, got=got, remedy=remedy)
        if unknown or code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            expected, got = "a key that the coordinator admitted", "another, or one removed"
            remedy = "Send the .pub file, and compare fingerprints by telephone."
            return NotAdmittedError(self.server, expected=expected, got=got, remedy=remedy)
        return LinkError(f"{self.server}: it answers with status {status}")


def _ahead(date: str) -> float | None:
    """Seconds that this machine's clock is ahead of an HTTP date."""
    try:
        return (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    except (ValueError, TypeError):
        return None
