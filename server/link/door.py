"""The door: only what an admitted site has signed whole, once and just now, gets any further."""

import asyncio
import hashlib
import heapq
import logging
import time
from collections.abc import Callable, Container
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.flower.compat import VERSION_HEADER, parse_version
from common.flower.database import LinkState
from common.support import keys
from common.support.signing import AHEAD, BEHIND, HEADER, Signature

log = logging.getLogger(__name__)

PATHS = {
    **dict.fromkeys(
        (
            "/v1/fleet/activate-node",
            "/v1/fleet/deactivate-node",
            "/v1/fleet/send-node-heartbeat",
            "/v1/fleet/pull-messages",
            "/v1/fleet/get-run",
            "/v1/fleet/pull-object",
        ),
        4 * 2**10,
    ),
    "/v1/fleet/push-messages": 2**20,  # an envelope, and the names of up to ten thousand parts
    "/v1/fleet/push-object": 6 * 2**20,  # an object travels in parts of 5 MiB
}
"""What a node asks for, and the largest body of each in bytes.

Flower's other paths are for nodes that register themselves, and for code.
"""
_PATIENCE = 60.0
"""Seconds in which a body must have come."""
_STAMPS = 1000
"""Of one site that are remembered; what is older than all of them is refused."""
_REMEMBERED = 1000
"""Unknown keys that are logged; more would only fill the log."""


class Caller(NamedTuple):
    """The admitted site that signed a request."""

    number: int
    """In the link's database."""
    public: bytes
    """Its key, PEM."""


def get_caller(request: Request) -> Caller:
    """The site that signed a request which came through the door."""
    caller: Caller = request.state.caller
    return caller


class _RefusedError(Exception):
    """A request that gets no further, with its status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Door:
    """Turns requests away before anything of them is parsed, most before their body is read.

    Args:
      app: Behind it.
      state: Of the link's database: who is admitted.
      stamps: That were used.
      hosts: By which hospitals reach this machine; a signature is for one of them.
      note: Is told a site's key, by fingerprint, and the release of Consilium that it says it runs.
    """

    def __init__(
        self,
        app: ASGIApp,
        state: LinkState,
        stamps: "Stamps",
        hosts: Container[str],
        note: Callable[[str, str], None],
    ) -> None:
        self._app, self._state, self._hosts, self._note = app, state, hosts, note
        self._stamps = stamps
        self._unknown: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request, its body read, or answer it with the status that refuses it."""
        try:
            length = _read_length(scope)
            signature, caller = await run_in_threadpool(self._identify, scope)
            if not self._stamps.use(signature):
                raise _RefusedError(409)
            async with asyncio.timeout(_PATIENCE):
                body = await _read_body(receive, length)
            if hashlib.sha256(body).hexdigest() != signature.body:
                raise _RefusedError(401)
        except _RefusedError as ex:
            refusal = Response(status_code=ex.status, headers={"connection": "close"})
            await refusal(scope, receive, send)
            return
        except (ClientDisconnect, TimeoutError):
            await Response(status_code=408, headers={"connection": "close"})(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, _again(body, receive), send)

    def _identify(self, scope: Scope) -> tuple[Signature, Caller]:
        """What was signed, and by which admitted site."""
        headers = Request(scope).headers
        host = headers.get("host", "")
        try:
            if host.partition(":")[0].lower() not in self._hosts:
                raise ValueError("a signature for another")
            signature = Signature.read(headers.get(HEADER, ""))
            key = signature.check(scope["method"], scope["path"], host)
        except ValueError:
            raise _RefusedError(401) from None
        if not -AHEAD < time.time() - signature.time / 1e6 < BEHIND:
            raise _RefusedError(401)
        fingerprint = keys.fingerprint(key)
        number = self._state.get_node_id_by_public_key(keys.pem(key))
        if number is None:
            self._refuse(fingerprint)
            raise _RefusedError(401)
        if version := parse_version(headers.get(VERSION_HEADER)):
            self._note(fingerprint, version)
        return signature, Caller(number, keys.pem(key))

    def _refuse(self, fingerprint: str) -> None:
        if fingerprint not in self._unknown and len(self._unknown) < _REMEMBERED:
            self._unknown.add(fingerprint)
            log.warning("refused: a key that is not admitted, %s", fingerprint)


class Stamps:
    """Who asked when: no stamp counts twice.

    The newest of each site are remembered. What is no newer than the last one forgotten, or than
    the making of this object, may have been used before and is refused.
    """

    def __init__(self) -> None:
        self._began = time.time_ns() // 1000
        self._used: dict[bytes, list[tuple[int, str]]] = {}
        self._floor: dict[bytes, int] = {}

    def use(self, signature: Signature) -> bool:
        """Whether a stamp is new, which it then is no longer."""
        stamp, used = (signature.time, signature.nonce), self._used.setdefault(signature.public, [])
        if signature.time <= self._floor.get(signature.public, self._began) or stamp in used:
            return False
        heapq.heappush(used, stamp)
        if len(used) > _STAMPS:
            self._floor[signature.public] = heapq.heappop(used)[0]
        return True


def _read_length(scope: Scope) -> int:
    """The length of the body, from the first lines of a request that is fit in form."""
    if scope["type"] != "http" or scope["method"] != "POST" or scope["query_string"]:
        raise _RefusedError(404)
    most, headers = PATHS.get(scope["path"]), dict(scope["headers"])
    if most is None:
        raise _RefusedError(404)
    told = headers.get(b"content-length", b"")
    if not told.isdigit() or b"transfer-encoding" in headers:
        raise _RefusedError(411)
    if b"content-encoding" in headers:
        raise _RefusedError(415)
    if len(told) > 8 or int(told) > most:
        raise _RefusedError(413)
    return int(told)


async def _read_body(receive: Receive, length: int) -> bytes:
    """The whole body; the server in front lets no more through than was told."""
    body = bytearray()
    while len(body) < length:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
    return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """As if the body had not been read yet."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again
