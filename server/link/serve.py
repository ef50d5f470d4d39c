"""The coordinator's link, up: the Fleet interface over TLS, in this process until it is stopped."""

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.errors import LinkError
from common.flower.compat import VERSION, VERSION_HEADER
from common.support.terminal import log_to
from server.link.fleet_api import make_fleet_app
from server.link.sites import SiteVersions
from server.project import certificates
from server.project.project import Project

log = logging.getLogger(__name__)

_PATIENCE = 30.0
"""Seconds in which a new connection must have said what it wants."""
_CONNECTIONS = 500
"""At once; each hospital has two or three."""
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
        for warning in certificates.check_certificate(project.folder, project.settings.hosts):
            log.warning("%s", warning)
        listening = open_socket(host, project.settings.port if port is None else port)
        at, on = listening.getsockname()[:2]
        log.info("serving hospitals at https://%s:%d", at, on)
        serving = make_server(project)
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn's own would end in a traceback
            signal.signal(number, serving.handle_exit)
        serving.run(sockets=[listening])
        log.info("stopped")


def make_server(project: Project) -> uvicorn.Server:
    """The server of a project, whatever its certificate is worth; `run(sockets=…)` serves."""

    def context(config: uvicorn.Config, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        made = default()
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        return made

    config = uvicorn.Config(
        make_fleet_app(project.database, SiteVersions(project.versions).note_version),
        ssl_certfile=project.folder / f"{certificates.SERVER}.crt",
        ssl_keyfile=project.folder / f"{certificates.SERVER}.key",
        ssl_context_factory=context,
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
    return uvicorn.Server(config)


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


class _Impatient(H11Protocol):
    """Hangs up on who connects and asks nothing, or comes when too many are here; waits for none.

    uvicorn itself would keep a silent connection for ever, and one that lets go slowly at the end.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            transport.abort()
        self.loop.call_later(_PATIENCE, self._give_up)

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
        else:
            super().shutdown()

    def _give_up(self) -> None:
        if self.cycle is None:
            self.transport.abort()
