"""A Flower `Grid` over the database that the coordinator's link serves to hospitals."""

import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Message

from common.errors import RunError
from common.flower.compat import APP, VERSION
from common.flower.database import (
    NOOP_FEDERATION_ID,
    NOOP_FLWR_AID,
    LinkState,
    TaskType,
    drop_ended,
    drop_limits,
    open_state,
    shrink_file,
    write_limit,
)
from common.flower.messages import (
    MessageLimit,
    NodeInfo,
    Run,
    Status,
    identify_task,
    limit_message,
    list_objects,
    mark_lost,
    message_from_proto,
    pack_message,
    unpack_message,
)
from common.protocol.noised import NOISED, size_noised
from common.protocol.sums import SUMS, size_reply
from server.link.base_grid import OneRunGrid

log = logging.getLogger(__name__)

_LOOK = 0.05
"""Seconds between looks for replies."""
_HEARTBEAT = 10.0
"""Seconds between heartbeats; after a minute without any, the run counts as ended."""


@dataclass
class _Arriving:
    """A reply, those of its parts that are there, and the names of the others once known."""

    envelope: Message
    parts: dict[str, bytes] = field(default_factory=dict)
    wanted: list[str] | None = None


class LinkGrid(OneRunGrid):
    """The sites that are connected to this coordinator's link, for one run.

    Args:
      state: Of the link's database.
      run_id: Flower's number of the run.
    """

    def __init__(self, state: LinkState, run_id: int) -> None:
        self._state, self._run_id = state, run_id
        self._arriving: dict[str, _Arriving] = {}

    @property
    def run(self) -> Run:
        """As the database has it."""
        (run,) = self._state.get_run_info(run_ids=[self._run_id])
        return run

    def get_node_ids(self) -> list[int]:
        """Sites that are connected now."""
        return sorted(self._state.get_nodes(self._run_id))

    def get_nodes(self) -> list[NodeInfo]:
        """What is known of them: the names that they were admitted by, among other things."""
        return list(self._state.get_node_info(node_ids=self.get_node_ids()))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Lay messages out for their sites; returns the ids of those whose sites are admitted.

        Raises:
          RunError: Flower counts this run as ended.
        """
        session = self._state.start_session(self._run_id)
        wanted: dict[str, bytes] = {}
        ids = []
        for message in messages:
            packed = pack_message(message)
            envelope = message_from_proto(packed.envelope)
            name = envelope.metadata.message_id
            write_limit(self._state, name, limit_reply(message))
            stored, missing = self._state.store_message_and_object_tree(
                envelope, packed.tree, session
            )
            wanted |= {part: packed.objects[part] for part in missing}
            if stored:
                ids.append(name)
            else:
                self._still_on()
        for part, content in wanted.items():
            self._state.store_object(self._run_id, session, part, content)
        return ids

    def _still_on(self) -> None:
        if self.run.status.status != Status.RUNNING:
            expected, got = "a run that is going on", "one that counts as ended"
            remedy = "It was paused for over a minute; go on with run --resume."
            raise RunError("the link", expected=expected, got=got, remedy=remedy)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Those of the replies to these messages that have arrived whole."""
        for envelope in self._state.get_message_res(set(message_ids), self._run_id):
            self._arriving[envelope.metadata.reply_to_message_id] = _Arriving(envelope)
        whole = {asked: self._open(reply) for asked, reply in self._arriving.items()}
        replies = {asked: reply for asked, reply in whole.items() if reply is not None}
        self._withdraw(replies)
        return list(replies.values())

    def _open(self, reply: _Arriving) -> Message | None:
        """The whole reply; None while parts of it are still on their way."""
        envelope, store = reply.envelope, self._state.object_store
        if envelope.has_error():
            return envelope
        identity = envelope.metadata.message_id
        try:
            if reply.wanted is None:
                reply.wanted = list_objects(store.get_object_tree(identity))
            while reply.wanted:
                part = self._state.get_object(self._run_id, reply.wanted[-1])
                if not part:
                    return mark_lost(envelope, "run") if part is None else None
                reply.parts[reply.wanted.pop()] = part
            return unpack_message(identity, reply.parts)
        except Exception:  # whatever a site sent that is no message
            log.warning("a reply that cannot be read is left out")
            return mark_lost(envelope, "run")

    def _withdraw(self, message_ids: Iterable[str]) -> None:
        """Forget messages with their replies: a site that still works on one learns so."""
        message_ids = list(message_ids)
        for asked in message_ids:
            if reply := self._arriving.pop(asked, None):
                self._state.object_store.delete(reply.envelope.metadata.message_id)
            self._state.object_store.delete(asked)
        self._state.delete_messages(set(message_ids))
        drop_limits(self._state, message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Replies of all sites that answer in time; whatever comes later is refused.

        A site that is gone counts as having answered, with an error, once it gave no sign of life
        for half a minute.
        """
        waiting = set(self.push_messages(messages))
        limit = math.inf if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and time.monotonic() < limit:
            arrived = self.pull_messages(waiting)
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            if waiting:
                time.sleep(_LOOK)
        self._withdraw(waiting)
        return replies


def limit_reply(asked: Message) -> MessageLimit:
    """How large a reply may be: as large as the tensors it answers, and a little beside.

    Equal tensors travel once, and count as often as they are named: trained, they differ. Sums have
    the size that was asked for.
    """
    if asked.metadata.message_type == SUMS:
        return limit_message(size_reply(asked.content))
    if asked.metadata.message_type in NOISED:
        return limit_message(size_noised(asked.content))
    records = asked.content.array_records.values()
    return limit_message(len(array.data) for record in records for array in record.values())


@contextmanager
def open_grid(database: Path) -> Iterator[LinkGrid]:
    """A grid for one new run, which ends with the block; sites drop what was left of it."""
    state = open_state(database)
    drop_ended(state)
    run_id = state.create_run(
        APP, VERSION, "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
    )
    (task,) = state.get_tasks(run_ids=[run_id])
    state.claim_task(task.task_id)
    state.activate_task(task.task_id)
    identify_task(task.task_id, run_id)
    done = threading.Event()

    def send_heartbeats() -> None:
        while not done.wait(_HEARTBEAT):
            try:
                state.acknowledge_task_heartbeat(task.task_id)
            except Exception as ex:  # the next may succeed; if none does, the run says so
                log.warning("no sign of life could be given: %s", type(ex).__name__)

    heartbeats = threading.Thread(target=send_heartbeats, daemon=True)
    heartbeats.start()
    try:
        yield LinkGrid(state, run_id)
    finally:
        done.set()
        heartbeats.join()
        state.stop_run(run_id)
        shrink_file(state)
