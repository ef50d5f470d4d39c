"""A hospital's side of Flower's Fleet interface.

| private name | why |
|---|---|
| `*Request`, `*Response`, `Node` | the node speaks the Fleet interface over our own connection |
| `FleetHttpClient` | Flower's own client |
| `FleetHttpClient._client` (changed) | its redirects and hooks have no public name |
| `ApiErrorCode`, `FlowerError` | which refusal means that nobody waits any more |
"""

import ssl
from collections.abc import Callable

import httpx

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
    trust: ssl.SSLContext,
    on_request: Callable[[httpx.Request], None],
    on_response: Callable[[httpx.Response], None],
) -> FleetHttpClient:
    """Flower's client of the Fleet interface.

    Its HTTP client follows redirects: a coordinator could have a site send requests to anywhere the
    site can reach. This one follows none.

    Args:
      server: `host:port`.
      trust: What TLS trusts.
      on_request: Sees, and may change, each request.
      on_response: Sees, and may change, each response before its body is read.
    """
    client = FleetHttpClient(f"https://{server}", verify=trust)
    client._client.follow_redirects = False
    client._client.event_hooks = {"request": [on_request], "response": [on_response]}
    return client
