"""The routes of a SuperLink that hospitals reach: its Fleet interface, and the checks before it.

| private name | why |
|---|---|
| `router` (Fleet), `app.state.…` (written) | answers nodes; reads its settings there |
| `ProtobufTranslationMiddleware` | requests and answers as Flower's bytes |
| `http_error_translator` | refusals with Flower's codes, which a node understands |
| `NodeAuthMiddleware`, `authenticate_node` | the signature of every request |
| `request.state.protobuf_request` (written) | where Flower keeps a request that it parsed |
| `FLEET_HTTP_PUBLIC_KEY_HEADER`, `bytes_to_public_key` | the key that is said to have signed |
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
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
    from flwr.supercore.error import http_error_translator
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key
    from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
    from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware, authenticate_node
    from flwr.superlink.routers.fleet.router import router as fleet

__all__ = [
    "FLEET_HTTP_PUBLIC_KEY_HEADER",
    "NodeAuthMiddleware",
    "ProtobufTranslationMiddleware",
    "PullMessagesRequest",
    "PushMessagesRequest",
    "add_routes",
    "bytes_to_public_key",
    "http_error_translator",
    "read_request",
    "verify_signature",
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


def verify_signature(request: Request, public: bytes) -> None:
    """Check that a key signed a request, before any of its body is read.

    Flower checks a parsed request alone. An activation stands in for it here, as the only one that
    names a key and no node.

    Raises:
      HTTPException: the key did not sign it, or too long ago.
    """
    request.state.protobuf_request = ActivateNodeRequest(public_key=public)
    authenticate_node(request)
