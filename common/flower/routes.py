"""The routes of a SuperLink that hospitals reach: its Fleet interface.

| private name | why |
|---|---|
| `router` (Fleet), `app.state.…` (written) | answers nodes; reads its settings there |
| `ProtobufTranslationMiddleware` | requests and answers as Flower's bytes |
| `http_error_translator` | refusals with Flower's codes, which a node understands |
| `request.state.protobuf_…` | where Flower keeps a request that it parsed, and its answer |
| `*Request`, `TRANSPORT_TYPE_GRPC_RERE` | requests that are looked into; a word of the router |
"""

from fastapi import FastAPI, Request

from common.flower.compat import require_flwr
from common.flower.database import LinkStateFactory

with require_flwr():
    from flwr.common.constant import TRANSPORT_TYPE_GRPC_RERE
    from flwr.proto.fleet_pb2 import (
        ActivateNodeRequest,
        PullMessagesRequest,
        PushMessagesRequest,
    )
    from flwr.proto.message_pb2 import PushObjectRequest
    from flwr.supercore.error import http_error_translator
    from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
    from flwr.superlink.routers.fleet.router import router as fleet

__all__ = [
    "ActivateNodeRequest",
    "ProtobufTranslationMiddleware",
    "PullMessagesRequest",
    "PushMessagesRequest",
    "PushObjectRequest",
    "add_routes",
    "http_error_translator",
    "read_request",
    "read_session",
]


def add_routes(app: FastAPI, factory: LinkStateFactory) -> None:
    """Add the Fleet interface to an app.

    Its routes take their settings from the app's state, where a SuperLink puts them when it starts.
    A SuperLink would add its other two interfaces, too.
    """
    app.state.linkstate_factory = factory
    app.state.enable_supernode_auth = True
    app.state.fleet_api_type = TRANSPORT_TYPE_GRPC_RERE
    app.include_router(fleet)


def read_request(request: Request) -> object:
    """What a node asks, as Flower's middleware parsed it; None before that."""
    return getattr(request.state, "protobuf_request", None)


def read_session(request: Request) -> str:
    """The session in which the parts of an announced reply travel; empty if it was refused."""
    answer = getattr(request.state, "protobuf_response", None)
    return str(getattr(answer, "session_id", ""))
