"""The one door to hospitals: Flower's Fleet interface over TLS, and nothing else of a SuperLink.

A stock SuperLink serves two more interfaces at the same port, for starting runs and for taking
their tasks. Neither exists here: a coordinator's commands work on the database beside this process,
on this machine.
"""

import logging
import re
from base64 import b64decode
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.types import ASGIApp, Receive, Scope, Send

from common.flower.compat import VERSION_HEADER
from common.flower.database import LinkState, LinkStateFactory, offer_again, open_factory
from common.flower.messages import ObjectTree
from common.flower.routes import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    NodeAuthMiddleware,
    ProtobufTranslationMiddleware,
    PullMessagesRequest,
    PushMessagesRequest,
    add_routes,
    bytes_to_public_key,
    http_error_translator,
    read_request,
    verify_signature,
)
from common.support import keys

log = logging.getLogger(__name__)

_LARGEST = 16 * 2**20
"""Bytes of a request: an object travels in parts of 5 MiB."""
_MOST_PARTS = 5000
"""Of a message: the largest reply of any backbone has under two thousand."""
_PATHS = {
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "push-object",
        "pull-object",
    )
}
"""What a node needs; Flower's others are for nodes that register themselves, and for code."""
_VERSION = re.compile(r"[0-9A-Za-z.+]{1,32}")
_REMEMBERED = 1000
"""Unknown keys that are logged; more would only fill the log."""


def make_fleet_app(
    database: Path, note: Callable[[str, str], None] = lambda _, __: None
) -> FastAPI:
    """What hospitals can reach: every request is signed by the key of a site that was admitted.

    Args:
      database: Of the link.
      note: Is told a site's key, by fingerprint, and the release of Consilium that it says it runs.
    """
    factory = open_factory(database)
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(_Door, state=factory.state(), note=note),
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(NodeAuthMiddleware),
            Middleware(BaseHTTPMiddleware, dispatch=_own_replies),
            Middleware(BaseHTTPMiddleware, dispatch=partial(_offer_again, factory)),
        ],
    )
    add_routes(app, factory)
    return app


class _Door:
    """Turns away what no admitted site has signed, before any of its body is read."""

    def __init__(self, app: ASGIApp, state: LinkState, note: Callable[[str, str], None]) -> None:
        self._app, self._state, self._note = app, state, note
        self._unknown: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = self._unfit(scope) or await run_in_threadpool(self._unsigned, scope)
        if status:
            await Response(status_code=status, headers={"connection": "close"})(
                scope, receive, send
            )
        else:
            await self._app(scope, receive, send)

    def _unfit(self, scope: Scope) -> int:
        """The status that refuses a request for its first lines; 0 if they are well."""
        if scope["type"] != "http" or scope["path"] not in _PATHS or scope["method"] != "POST":
            return 404
        headers = dict(scope["headers"])
        told = headers.get(b"content-length", b"")
        if not told.isdigit() or b"transfer-encoding" in headers:
            return 411
        return 413 if len(told) > 8 or int(told) > _LARGEST else 0

    def _unsigned(self, scope: Scope) -> int:
        """401 unless an admitted key signed the request; 0 if it did."""
        request = Request({**scope, "state": {}})
        try:
            public = b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
            verify_signature(request, public)
            fingerprint = keys.fingerprint(bytes_to_public_key(public))
        except (HTTPException, KeyError, ValueError, AttributeError, UnsupportedAlgorithm):
            return 401
        if self._state.get_node_id_by_public_key(public) is None:
            self._refuse(fingerprint)
            return 401
        version = request.headers.get(VERSION_HEADER, "")
        if _VERSION.fullmatch(version):
            self._note(fingerprint, version)
        return 0

    def _refuse(self, fingerprint: str) -> None:
        if fingerprint not in self._unknown and len(self._unknown) < _REMEMBERED:
            self._unknown.add(fingerprint)
            log.warning("refused: a key that is not admitted, %s", fingerprint)


async def _offer_again(
    factory: LinkStateFactory, request: Request, call_next: RequestResponseEndpoint
) -> Response:
    """A site that asks for a message has none: what it was handed and did not answer was lost.

    Flower hands out a message once, and a connection may break just then.
    """
    asked = read_request(request)
    if isinstance(asked, PullMessagesRequest):
        await run_in_threadpool(offer_again, factory.state(), asked.node.node_id)
    return await call_next(request)


def _parts(tree: ObjectTree) -> int:
    """How many objects a message has; counting ends soon after too many."""
    waiting, number = [tree], 0
    while waiting and number <= _MOST_PARTS:
        number += 1
        waiting += waiting.pop().children
    return number


async def _own_replies(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """A site answers for itself, and sends nothing else: Flower believes what a message says."""
    asked = read_request(request)
    if isinstance(asked, PushMessagesRequest):
        for message in asked.messages_list:
            told = message.metadata
            if told.src_node_id != asked.node.node_id or not told.reply_to_message_id:
                raise HTTPException(403)
        if any(_parts(tree) > _MOST_PARTS for tree in asked.message_object_trees):
            raise HTTPException(413)
    return await call_next(request)
