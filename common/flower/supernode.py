"""A hospital's side of Flower's Fleet interface.

| private name | why |
|---|---|
| `*Request`, `*Response`, `Node` | the node speaks the Fleet interface over our own connection |
| `FleetHttpClient`, `NodeAuthHttpInterceptor` | Flower's own client, and its signatures |
| `FleetHttpClient._client` (changed) | its redirects and hooks have no public name |
| `ApiErrorCode`, `FlowerError` | which refusal means that nobody waits any more |
"""

import ssl
from collections.abc import Callable

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from common.flower.compat import require_flwr

with require_flwr():
    from flwr.proto.fleet_pb2 import (
        ActivateNodeRequest,
        DeactivateNodeRequest,
        PullMessagesRequest,
        PullMessagesResponse,
        PushMessagesRequest,
    )
    from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
    from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
    from flwr.proto.node_pb2 import Node
    from flwr.proto.run_pb2 import GetRunRequest
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

__all__ = [
    "ActivateNodeRequest",
    "ApiErrorCode",
    "DeactivateNodeRequest",
    "FleetHttpClient",
    "FlowerError",
    "GetRunRequest",
    "Node",
    "PullMessagesRequest",
    "PullMessagesResponse",
    "PullObjectRequest",
    "PushMessagesRequest",
    "PushObjectRequest",
    "SendNodeHeartbeatRequest",
    "open_client",
]


def open_client(
    server: str,
    key: EllipticCurvePrivateKey,
    trust: ssl.SSLContext,
    on_request: Callable[[httpx.Request], None],
    on_response: Callable[[httpx.Response], None],
) -> FleetHttpClient:
    """Flower's client of the Fleet interface, which signs every request.

    Its HTTP client follows redirects: a coordinator could have a site send requests to anywhere the
    site can reach. This one follows none.

    Args:
      server: `host:port`.
      key: That signs.
      trust: What TLS trusts.
      on_request: Sees, and may change, each request.
      on_response: Sees each response.
    """
    signing = NodeAuthHttpInterceptor(key, key.public_key())
    client = FleetHttpClient(f"https://{server}", interceptors=[signing], verify=trust)
    client._client.follow_redirects = False
    client._client.event_hooks = {"request": [on_request], "response": [on_response]}
    return client
