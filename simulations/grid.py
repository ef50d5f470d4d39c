"""A Flower `Grid` that runs the real ClientApp in this process, one message after the other."""

import copy
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from common.errors import ConsiliumError
from common.flower import (
    SUPERLINK_NODE_ID,
    ClientAppCallable,
    Run,
    TaskIdentity,
    error_reply,
    recorddict_from_proto,
    recorddict_to_proto,
)

log = logging.getLogger(__name__)

_RUN_ID = 1
_FIRST_NODE = 1000


class InProcessGrid(Grid):
    """Nodes in this process, one for each site file.

    Every message is serialised and parsed again as on a network, so that nothing passes here that
    would not pass there.
    """

    def __init__(self, app: ClientAppCallable, site_files: Sequence[Path]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id = 1, _RUN_ID
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        self._app = app
        self._contexts = {
            node: Context(_RUN_ID, node, {"site": str(path)}, RecordDict(), {})
            for node, path in enumerate(site_files, start=_FIRST_NODE)
        }
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """There is one run only."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(run_id=_RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As Flower's own grids do."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Every node; none ever goes away."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages until their replies are asked for."""
        sent = list(messages)
        for message in sent:
            message.metadata.__dict__["_message_id"] = uuid4().hex
        self._waiting.update({message.metadata.message_id: message for message in sent})
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the ClientApp on these messages now."""
        return [self._work(self._waiting.pop(identity)) for identity in message_ids]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Replies of all nodes; nothing here takes longer for being waited for."""
        return self.pull_messages(self.push_messages(messages))

    def _work(self, message: Message) -> Message:
        return answer(self._app, message, self._contexts[message.metadata.dst_node_id])


def answer(app: ClientAppCallable, message: Message, context: Context) -> Message:
    """What a node replies: as a SuperNode does, less an exception's text, which stays here."""
    try:
        return _wired(app(_wired(message), context))
    except Exception:
        log.exception("%s: the client app failed", context.node_config["site"])
        return error_reply(message, ConsiliumError.code)


def _wired(message: Message) -> Message:
    """The message as it would arrive over a network."""
    if message.has_error():
        return message
    arrived = copy.copy(message)
    arrived.__dict__["_content"] = recorddict_from_proto(recorddict_to_proto(message.content))
    return arrived


def simulate(
    server_app: ServerApp, client_app: ClientAppCallable, site_files: Sequence[Path], run: Path
) -> None:
    """Run the real ServerApp on the run folder `run` against virtual sites in this process."""
    grid = InProcessGrid(client_app, site_files)
    context = Context(_RUN_ID, SUPERLINK_NODE_ID, {}, RecordDict(), {"run": str(run)})
    server_app(grid=grid, context=context)
