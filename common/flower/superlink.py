"""The coordinator's side: the database of a SuperLink, and the routes that hospitals reach.

| private name | why |
|---|---|
| `LinkState`, `LinkStateFactory`, `SqlLinkState`, tables | messages, sites, runs on disk |
| `get_objectstore_linkstate_factories`, `NoOpFederationManager` | to open that database |
| the Fleet router, its middleware, `authenticate_node` | all that hospitals may reach |
| `bytes_to_public_key`, `uint64_to_int64` | a site's key, and its number, as the tables have them |
| `SQLITE_PRAGMAS` (changed) | the replies of many hospitals at once wait longer than 5 seconds |
"""

from typing import cast

from sqlalchemy import select, update

from common.flower.compat import pinned

with pinned():
    from flwr.common.constant import NOOP_FLWR_AID, TRANSPORT_TYPE_GRPC_RERE
    from flwr.proto.fleet_pb2 import (
        ActivateNodeRequest,
        PullMessagesRequest,
        PushMessagesRequest,
    )
    from flwr.server.superlink.linkstate import LinkState, LinkStateFactory, SqlLinkState
    from flwr.supercore import sql_mixin
    from flwr.supercore.constant import (
        FLEET_HTTP_PUBLIC_KEY_HEADER,
        NOOP_FEDERATION_ID,
        SQLITE_PRAGMAS,
        NodeStatus,
        TaskType,
    )
    from flwr.supercore.error import http_error_translator
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key
    from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
    from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes, Node
    from flwr.supercore.utils import uint64_to_int64
    from flwr.superlink.config_loader import get_objectstore_linkstate_factories
    from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
    from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware, authenticate_node
    from flwr.superlink.routers.fleet.router import router as fleet

__all__ = [
    "FLEET_HTTP_PUBLIC_KEY_HEADER",
    "NOOP_FEDERATION_ID",
    "NOOP_FLWR_AID",
    "TRANSPORT_TYPE_GRPC_RERE",
    "ActivateNodeRequest",
    "LinkState",
    "LinkStateFactory",
    "NoOpFederationManager",
    "NodeAuthMiddleware",
    "NodeStatus",
    "ProtobufTranslationMiddleware",
    "PullMessagesRequest",
    "PushMessagesRequest",
    "SqlLinkState",
    "TaskType",
    "authenticate_node",
    "bytes_to_public_key",
    "fleet",
    "free_key",
    "get_objectstore_linkstate_factories",
    "http_error_translator",
    "offer_again",
    "uint64_to_int64",
]

setattr(sql_mixin, "SQLITE_PRAGMAS", (*SQLITE_PRAGMAS, ("busy_timeout", "60000")))  # noqa: B010


def offer_again(state: SqlLinkState, node: int) -> None:
    """Lay out again what a node was handed and did not answer; Flower hands it out once."""
    answered = select(MessageRes.reply_to_message_id)
    lost = (
        MessageIns.dst_node_id == node,
        MessageIns.delivered_at != "",
        MessageIns.message_id.not_in(answered),
    )
    with state.session() as session:
        if session.scalar(select(MessageIns.message_id).where(*lost)) is not None:
            session.execute(update(MessageIns).where(*lost).values(delivered_at=""))


def free_key(state: LinkState, public: bytes) -> None:
    """Let the key of a removed site be admitted again, which Flower would refuse for good."""
    removed = Node.public_key == public, Node.status == NodeStatus.UNREGISTERED
    with cast(SqlLinkState, state).session() as session:
        session.execute(update(Node).where(*removed).values(public_key=None))
