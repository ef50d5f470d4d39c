"""A hospital's side of Flower's Fleet interface.

| private name | why |
|---|---|
| requests and responses of the Fleet interface | the node speaks it over a connection of ours |
| `FleetHttpClient`, `NodeAuthHttpInterceptor` | Flower's own client, and its signatures |
| `ApiErrorCode`, `FlowerError` | which refusal means that nobody waits any more |
"""

from common.flower.compat import pinned

with pinned():
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
    "NodeAuthHttpInterceptor",
    "PullMessagesRequest",
    "PullMessagesResponse",
    "PullObjectRequest",
    "PushMessagesRequest",
    "PushObjectRequest",
    "SendNodeHeartbeatRequest",
]
