"""The database of a SuperLink, which holds the coordinator's messages, sites and runs.

| private name | why |
|---|---|
| `LinkState`, `SqlLinkState` | Flower has no public name for what is in the database |
| `LinkStateFactory`, `get_objectstore_linkstate_factories` | they open the database |
| `NoOpFederationManager` | they ask for one; a coordinator has one federation only |
| `MessageIns`, `MessageRes`, `Node` (tables, changed) | two things that `LinkState` cannot do |
| `SQLITE_PRAGMAS` of `sql_mixin` (changed) | Flower has no setting for how long a writer waits |
| `uint64_to_int64` | a node's number in a message, as the tables have it |
| `NodeStatus`, `TaskType`, `NOOP_FLWR_AID`, `NOOP_FEDERATION_ID` | words of the database |
"""

from pathlib import Path
from typing import cast

from filelock import FileLock
from sqlalchemy import select, update

from common.flower.compat import require_flwr

with require_flwr():
    from flwr.common.constant import NOOP_FLWR_AID
    from flwr.server.superlink.linkstate import LinkState, LinkStateFactory, SqlLinkState
    from flwr.supercore import sql_mixin
    from flwr.supercore.constant import NOOP_FEDERATION_ID, SQLITE_PRAGMAS, NodeStatus, TaskType
    from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes, Node
    from flwr.supercore.utils import uint64_to_int64
    from flwr.superlink.config_loader import get_objectstore_linkstate_factories
    from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager

__all__ = [
    "NOOP_FEDERATION_ID",
    "NOOP_FLWR_AID",
    "LinkState",
    "LinkStateFactory",
    "NodeStatus",
    "TaskType",
    "free_key",
    "offer_again",
    "open_factory",
    "open_state",
    "wait_for_writers",
]


def wait_for_writers() -> None:
    """Have every connection wait a minute for another's write.

    Flower waits five seconds; the replies of many hospitals at once take longer.
    """
    pragmas = (*SQLITE_PRAGMAS, ("busy_timeout", "60000"))
    setattr(sql_mixin, "SQLITE_PRAGMAS", pragmas)  # noqa: B010


wait_for_writers()


def open_state(database: Path) -> LinkState:
    """The messages, sites and runs in a database that several processes may have open."""
    return open_factory(database).state()


def open_factory(database: Path) -> LinkStateFactory:
    """Opens the database, one process at a time: two that make it at once would both fail."""
    _, factory = get_objectstore_linkstate_factories(str(database), NoOpFederationManager())
    with FileLock(database.with_name(f".{database.name}.lock"), mode=0o600):
        factory.state()
    return factory


def offer_again(state: LinkState, node: int) -> None:
    """Lay out again what a node was handed and did not answer; Flower hands it out once."""
    answered = select(MessageRes.reply_to_message_id)
    lost = (
        MessageIns.dst_node_id == uint64_to_int64(node),
        MessageIns.delivered_at != "",
        MessageIns.message_id.not_in(answered),
    )
    with cast(SqlLinkState, state).session() as session:
        if session.scalar(select(MessageIns.message_id).where(*lost)) is not None:
            session.execute(update(MessageIns).where(*lost).values(delivered_at=""))


def free_key(state: LinkState, public: bytes) -> None:
    """Let the key of a removed site be admitted again, which Flower would refuse for good."""
    removed = Node.public_key == public, Node.status == NodeStatus.UNREGISTERED
    with cast(SqlLinkState, state).session() as session:
        session.execute(update(Node).where(*removed).values(public_key=None))
