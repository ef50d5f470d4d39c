"""Flower `Grid`s of virtual sites: the real ClientApp in this process, or wherever bytes go."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from common.errors import ConsiliumError
from common.flower.messages import (
    SUPERLINK_NODE_ID,
    ClientAppCallable,
    Run,
    copy_as_sent,
    identify_task,
    make_error_reply,
    message_from_bytes,
    message_to_bytes,
    name_message,
)
from server.link.base_grid import OneRunGrid

log = logging.getLogger(__name__)

_RUN_ID = 1
_FIRST_NODE = 1000


class _SitesGrid(OneRunGrid):
    """One node for each site file."""

    def __init__(self, site_files: Sequence[Path]) -> None:
        identify_task(1, _RUN_ID)
        self._sites = dict(enumerate(site_files, start=_FIRST_NODE))
        self._waiting: dict[str, Message] = {}

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(run_id=_RUN_ID)

    def get_node_ids(self) -> list[int]:
        """Every node; none ever goes away."""
        return list(self._sites)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages until their replies are asked for."""
        sent = list(messages)
        for message in sent:
            name_message(message, uuid4().hex)
        self._waiting.update({message.metadata.message_id: message for message in sent})
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Have these messages answered now."""
        waiting = [self._waiting.pop(identity) for identity in message_ids]
        return self._answers([(self._sites[m.metadata.dst_node_id], m) for m in waiting])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Replies of all nodes; nothing here takes longer for being waited for."""
        return self.pull_messages(self.push_messages(messages))

    def _answers(self, messages: Sequence[tuple[Path, Message]]) -> list[Message]:
        """The replies to messages to these sites, in any order."""
        raise NotImplementedError


class InProcessGrid(_SitesGrid):
    """Nodes in this process, one for each site file.

    Every message is serialised and parsed again as on a network, so that nothing passes here that
    would not pass there.
    """

    def __init__(self, app: ClientAppCallable, site_files: Sequence[Path]) -> None:
        super().__init__(site_files)
        self._app = app

    def _answers(self, messages: Sequence[tuple[Path, Message]]) -> list[Message]:
        return [
            copy_as_sent(answer_message(self._app, copy_as_sent(message), _context(site, message)))
            for site, message in messages
        ]


@dataclass(frozen=True)
class SiteMessage:
    """A message to a site, made bytes only when it is about to leave."""

    site: Path
    message: Message

    def to_bytes(self) -> bytes:
        """Serialise the message as it travels; `answer_bytes` takes it."""
        return message_to_bytes(self.message)


class RemoteGrid(_SitesGrid):
    """Nodes in other processes, one for each site file; messages and replies travel as bytes.

    Args:
      carry: Takes messages to their sites and yields the replies that `answer_bytes` gives there.
      site_files: The site files.
    """

    def __init__(
        self, carry: Callable[[Sequence[SiteMessage]], Iterable[bytes]], site_files: Sequence[Path]
    ) -> None:
        super().__init__(site_files)
        self._carry = carry

    def _answers(self, messages: Sequence[tuple[Path, Message]]) -> list[Message]:
        return [
            message_from_bytes(reply)
            for reply in self._carry([SiteMessage(*one) for one in messages])
        ]


def answer_bytes(app: ClientAppCallable, site_file: Path, data: bytes) -> bytes:
    """Answer a message of a `RemoteGrid` at a site."""
    identify_task(1, _RUN_ID)
    message = message_from_bytes(data)
    return message_to_bytes(answer_message(app, message, _context(site_file, message)))


def answer_message(app: ClientAppCallable, message: Message, context: Context) -> Message:
    """Answer as a SuperNode does, without the text of an exception, which stays here."""
    try:
        return app(message, context)
    except Exception:
        log.exception("%s: the client app failed", context.node_config["site"])
        return make_error_reply(message, ConsiliumError.code)


def _context(site_file: Path, message: Message) -> Context:
    node = message.metadata.dst_node_id
    return Context(_RUN_ID, node, {"site": str(site_file)}, RecordDict(), {})


def simulate_run(
    server_app: ServerApp, client_app: ClientAppCallable, site_files: Sequence[Path], run: Path
) -> None:
    """Run the real ServerApp on the run folder `run` against virtual sites in this process."""
    serve_run(server_app, InProcessGrid(client_app, site_files), run)


def serve_run(server_app: ServerApp, grid: Grid, run: Path) -> None:
    """Run the real ServerApp on the run folder `run`."""
    context = Context(_RUN_ID, SUPERLINK_NODE_ID, {}, RecordDict(), {"run": str(run)})
    server_app(grid=grid, context=context)
