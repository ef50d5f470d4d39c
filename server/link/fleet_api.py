"""The one door to hospitals: Flower's Fleet interface over TLS, and nothing else of a SuperLink.

A stock SuperLink serves two more interfaces at the same port, for starting runs and for taking
their tasks. Neither exists here: a coordinator's commands work on the database beside this process,
on this machine.
"""

from collections.abc import Callable, Container
from functools import partial
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from common.flower.database import LinkStateFactory, offer_again, open_factory
from common.flower.routes import (
    ActivateNodeRequest,
    ProtobufTranslationMiddleware,
    PullMessagesRequest,
    PushMessagesRequest,
    PushObjectRequest,
    add_routes,
    http_error_translator,
    read_request,
    read_session,
)
from server.link.door import Door, Stamps, get_caller
from server.link.limits import ReplyAccounts


def make_fleet_app(
    database: Path, hosts: Container[str], quota: int, note: Callable[[str, str], None]
) -> FastAPI:
    """What hospitals can reach: every request is signed by the key of a site that was admitted.

    Args:
      database: Of the link.
      hosts: By which hospitals reach this machine.
      quota: Bytes of the database beyond which no reply is taken.
      note: Is told a site's key, by fingerprint, and the release of Consilium that it says it runs.
    """
    factory = open_factory(database)
    accounts = ReplyAccounts(factory.state(), quota)
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(Door, state=factory.state(), stamps=Stamps(), hosts=hosts, note=note),
            Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
            Middleware(ProtobufTranslationMiddleware),
            Middleware(BaseHTTPMiddleware, dispatch=_speak_for_itself),
            Middleware(BaseHTTPMiddleware, dispatch=partial(_take_replies, accounts)),
            Middleware(BaseHTTPMiddleware, dispatch=partial(_offer_again, factory)),
        ],
    )
    add_routes(app, factory)
    return app


async def _speak_for_itself(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """A site asks in its own name: the number or key in a request is that of who signed it."""
    asked, caller = read_request(request), get_caller(request)
    if isinstance(asked, ActivateNodeRequest):
        own = asked.public_key == caller.public
    else:
        node = getattr(asked, "node", asked)
        own = getattr(node, "node_id", None) == caller.number
    if not own:
        raise HTTPException(401)
    return await call_next(request)


async def _take_replies(
    accounts: ReplyAccounts, request: Request, call_next: RequestResponseEndpoint
) -> Response:
    """A site answers what it was asked, and stores no more than that needs."""
    asked = read_request(request)
    if isinstance(asked, PushObjectRequest):
        accounts.charge(asked)
    if not isinstance(asked, PushMessagesRequest):
        return await call_next(request)
    left = await run_in_threadpool(accounts.check_announced, asked)
    response = await call_next(request)
    accounts.open(asked.node.node_id, read_session(request), left)
    return response


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
