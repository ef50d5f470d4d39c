"""The database of a SuperLink, which holds the coordinator's messages, sites and runs.

| private name | why |
|---|---|
| `LinkState`, `SqlLinkState` | Flower has no public name for what is in the database |
| `LinkStateFactory`, `get_objectstore_linkstate_factories` | they open the database |
| `NoOpFederationManager` | they ask for one; a coordinator has one federation only |
| `MessageIns`, `MessageRes`, `Node` (tables, changed) | two things that `LinkState` cannot do |
| `StoredObject` (table) | how much a reply has stored by now |
| `SQLITE_PRAGMAS` of `sql_mixin` (changed) | how long a writer waits, and that the file shrinks |
| `uint64_to_int64` | a node's number in a message, as the tables have it |
| `NodeStatus`, `TaskType`, `NOOP_FLWR_AID`, `NOOP_FEDERATION_ID` | words of the database |
"""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from filelock import FileLock
from sqlalchemy import BigInteger, Column, MetaData, String, Table, func, select, text, update

from common.flower.compat import require_flwr
from common.flower.messages import MessageLimit, Status

with require_flwr():
    from flwr.common.constant import NOOP_FLWR_AID
    from flwr.server.superlink.linkstate import LinkState, LinkStateFactory, SqlLinkState
    from flwr.supercore import sql_mixin
    from flwr.supercore.constant import NOOP_FEDERATION_ID, SQLITE_PRAGMAS, NodeStatus, TaskType
    from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes, Node
    from flwr.supercore.state.schema.objectstore_models import StoredObject
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
    "count_stored",
    "drop_ended",
    "drop_limits",
    "free_key",
    "measure_use",
    "offer_again",
    "open_factory",
    "open_state",
    "read_limit",
    "set_pragmas",
    "shrink_file",
    "write_limit",
]

_LIMITS = Table(
    "consilium_reply_limits",
    MetaData(),
    Column("message_id", String, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("parts", BigInteger, nullable=False),
)
"""Written by the process that asks, read by the one that sites answer to."""


def set_pragmas() -> None:
    """Have every connection wait a minute for another's write, and the file able to shrink.

    Flower waits five seconds; the replies of many hospitals at once take longer. A file gives freed
    pages back only if it was told so before anything was in it.
    """
    log_size = str(64 * 2**20)
    first, last = ("auto_vacuum", "INCREMENTAL"), ("busy_timeout", "60000")
    pragmas = (first, *SQLITE_PRAGMAS, last, ("journal_size_limit", log_size))
    setattr(sql_mixin, "SQLITE_PRAGMAS", pragmas)  # noqa: B010


set_pragmas()


def open_state(database: Path) -> LinkState:
    """The messages, sites and runs in a database that several processes may have open."""
    return open_factory(database).state()


def open_factory(database: Path) -> LinkStateFactory:
    """Opens the database, one process at a time: two that make it at once would both fail."""
    _, factory = get_objectstore_linkstate_factories(str(database), NoOpFederationManager())
    with FileLock(database.with_name(f".{database.name}.lock"), mode=0o600):
        state = cast(SqlLinkState, factory.state())
        with state.session() as session:
            _LIMITS.metadata.create_all(session.connection())
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


def write_limit(state: LinkState, message_id: str, limit: MessageLimit) -> None:
    """Say how much may be stored in answer to a message, before the message is there."""
    with cast(SqlLinkState, state).session() as session:
        session.execute(_LIMITS.delete().where(_LIMITS.c.message_id == message_id))
        session.execute(_LIMITS.insert().values(message_id=message_id, **limit._asdict()))


def read_limit(state: LinkState, message_id: str) -> MessageLimit | None:
    """How much may be stored in answer to a message; None if nobody waits for one."""
    wanted = select(_LIMITS.c.size, _LIMITS.c.parts).where(_LIMITS.c.message_id == message_id)
    with cast(SqlLinkState, state).session() as session:
        row = session.execute(wanted).first()
    return None if row is None else MessageLimit(*row)


def drop_limits(state: LinkState, message_ids: Iterable[str]) -> None:
    """Forget the limits of messages that are gone."""
    with cast(SqlLinkState, state).session() as session:
        session.execute(_LIMITS.delete().where(_LIMITS.c.message_id.in_(list(message_ids))))


def count_stored(state: LinkState, objects: Iterable[str]) -> int:
    """Bytes of those of these objects that are stored."""
    size = func.coalesce(func.sum(func.length(StoredObject.content)), 0)
    with cast(SqlLinkState, state).session() as session:
        stored = session.scalar(select(size).where(StoredObject.object_id.in_(list(objects))))
    return int(stored or 0)


def measure_use(state: LinkState) -> int:
    """Bytes of the database that hold something."""
    with cast(SqlLinkState, state).session() as session:
        names = ("page_count", "freelist_count", "page_size")
        pages, free, size = (int(session.scalar(text(f"PRAGMA {n}"))) for n in names)
    return (pages - free) * size


def drop_ended(state: LinkState) -> None:
    """Delete messages of runs that ended; one that was killed leaves its own behind."""
    for run in state.get_run_info(statuses=[Status.FINISHED]):
        state.cleanup_run(run.run_id)


def shrink_file(state: LinkState) -> None:
    """Give back to the disk what was deleted; without it, a database keeps its largest size."""
    with cast(SqlLinkState, state).session() as session:
        cursor = session.connection().connection.cursor()
        # A script is stepped to its end; otherwise one page is given back.
        cursor.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")
        cursor.close()
