"""The coordinator's link, up: the Fleet interface over TLS, in this process until it is stopped."""

import asyncio
import logging
import signal
import socket
from contextlib import suppress

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.errors import LinkError
from common.flower.compat import VERSION, VERSION_HEADER
from common.support.terminal import log_to
from server.link.fleet_api import make_fleet_app
from server.link.identity import Identity
from server.link.sites import SiteVersions
from server.project import certificates
from server.project.project import Project

log = logging.getLogger(__name__)

_HANDSHAKE = 10.0
"""Seconds in which a new connection must have spoken TLS."""
_WAITING, _WAITING_EACH = 200, 30
"""Connections without TLS yet, in all and from one address; the oldest makes room."""
_PATIENCE = 30.0
"""Seconds in which a connection must have said what it wants."""
_CONNECTIONS, _CONNECTIONS_EACH = 500, 100
"""At once, in all and from one address; each hospital has up to six."""
_LOOK = 60.0
"""Seconds between looks at the certificate and the database."""
_GRACE = 10
"""Seconds that requests under way have when the link is stopped."""


def serve_hospitals(project: Project, host: str, port: int | None) -> None:
    """Serve hospitals until SIGTERM or Ctrl-C.

    Args:
      project: Whose link it is; only one process at a time can serve it.
      host: The address of this machine to listen on; 0.0.0.0 is all of them.
      port: By default the one in `coordinator.yaml`.

    Raises:
      LinkError: the certificate, the address or the port is of no use.
    """
    with project.locked("start"):
        log_to(project.log)
        certificates.renew_in_time(project.folder, project.settings.hosts)
        for warning in certificates.check_certificate(project.folder, project.settings.hosts):
            log.warning("%s", warning)
        serving = make_server(project)  # before any request that it would count as old
        listening = open_socket(host, project.settings.port if port is None else port)
        at, on = listening.getsockname()[:2]
        log.info("serving hospitals at https://%s:%d", at, on)
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn's own would end in a traceback
            signal.signal(number, serving.handle_exit)
        serving.run(sockets=[listening])
        log.info("stopped")


def make_server(project: Project) -> uvicorn.Server:
    """The server of a project, whatever its certificate is worth; `run(sockets=…)` serves."""
    identity = Identity(project)
    versions = SiteVersions(project.versions)
    app = make_fleet_app(
        project.database, identity.hosts, project.settings.quota, versions.note_version
    )
    config = uvicorn.Config(
        app,
        http=_Impatient,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level=logging.ERROR,
        access_log=False,
        server_header=False,
        headers=[(VERSION_HEADER, VERSION)],
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE,
    )
    return _LinkServer(config, identity)


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; raises `LinkError` if it cannot be had."""
    where, expected = f"{host}:{port}", "a port to listen at"
    try:
        listening = socket.create_server((host, port), backlog=128)
        # Answers are small: without this each waits for the kernel to send it with more.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except PermissionError:
        got = "one that this user may not have"
        remedy = "Ports below 1024 need the systemd unit or root; or choose another by --port."
    except OSError as ex:
        got = str(ex.strerror).partition(" (")[0]
        remedy = "Another program has it, or this machine has no such address."
    raise LinkError(where, expected=expected, got=got, remedy=remedy)


class _LinkServer(uvicorn.Server):
    """uvicorn behind an accept loop of our own, which bounds what has not spoken TLS yet.

    asyncio's own takes every connection, and waits a minute for each to begin.
    """

    def __init__(self, config: uvicorn.Config, identity: Identity) -> None:
        super().__init__(config)
        self._identity = identity
        self._waiting: dict[asyncio.Task[None], str] = {}
        """Connections without TLS yet, the oldest first, by address."""
        self._work: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.servers = []
        for listening in sockets or []:
            listening.setblocking(False)
            self._work.append(asyncio.create_task(self._accept(listening)))
        self._work.append(asyncio.create_task(self._look_after()))
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in (*self._work, *self._waiting):
            task.cancel()
        await super().shutdown(sockets)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                plain, (host, *_) = await loop.sock_accept(listening)
            except OSError:  # it has gone again, or too many files are open
                await asyncio.sleep(0.1)
                continue
            self._make_room(host)
            task = loop.create_task(self._greet(plain))
            self._waiting[task] = host
            task.add_done_callback(lambda done: self._waiting.pop(done, None))

    def _make_room(self, host: str) -> None:
        """Hang up on the oldest of those that wait, if there are too many."""
        same = [task for task, other in self._waiting.items() if other == host]
        if len(same) >= _WAITING_EACH:
            self._hang_up(same[0])
        if len(self._waiting) >= _WAITING:
            self._hang_up(next(iter(self._waiting)))

    def _hang_up(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        self._waiting.pop(task, None)

    async def _greet(self, plain: socket.socket) -> None:
        def make() -> asyncio.Protocol:
            return _Impatient(self.config, self.server_state, {}, loop)

        loop, trust = asyncio.get_running_loop(), self._identity.context
        with suppress(OSError):  # TLS that fails, too
            await loop.connect_accepted_socket(
                make, plain, ssl=trust, ssl_handshake_timeout=_HANDSHAKE, ssl_shutdown_timeout=1.0
            )

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            if self._identity.refresh():
                for connection in self.server_state.connections:
                    if isinstance(connection, _Impatient):
                        connection.retire()


class _Impatient(H11Protocol):
    """Hangs up on who connects and asks nothing, or comes when too many are here; waits for none.

    uvicorn itself would keep a silent connection for ever, and one that lets go slowly at the end.
    """

    _retired = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        same = sum(_host(other) == _host(self) for other in self.connections)
        if len(self.connections) > _CONNECTIONS or same > _CONNECTIONS_EACH:
            transport.abort()
        self.loop.call_later(_PATIENCE, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._retired and self.cycle and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def retire(self) -> None:
        """Answer one more request, then close: the next connection is shown a new certificate."""
        self._retired = True

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
        else:
            super().shutdown()

    def _give_up(self) -> None:
        if self.cycle is None:
            self.transport.abort()


def _host(connection: object) -> str | None:
    client = getattr(connection, "client", None)
    return client[0] if client else None
