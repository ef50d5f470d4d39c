"""What tests do to processes: limit this one, fork another, serve a link in a thread."""

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn

from server.link.serve import make_server, open_socket
from server.project.project import Project


def sleep(_: object, seconds: float) -> None:
    """A long job of a worker."""
    time.sleep(seconds)


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """A limit of this process, lowered for a while; `RLIMIT_FSIZE` is as a full disk."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextmanager
def another(work: Callable[[], object]) -> Iterator[None]:
    """A forked process that has done `work`, keeps what it gave, and ends by being killed."""
    ready, go = os.pipe()
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            kept = work()
            os.write(go, b"!")
            signal.pause()
            del kept
        os._exit(1)
    os.close(go)
    try:
        assert os.read(ready, 1) == b"!"
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)


@contextmanager
def link_up(project: Project, port: int | None = None) -> Iterator[int]:
    """The link of a project in a thread of this process, at its port or another; that port."""
    link: uvicorn.Server = make_server(project)
    listening = open_socket("127.0.0.1", project.settings.port if port is None else port)
    thread = threading.Thread(target=link.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not link.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield int(listening.getsockname()[1])
    finally:
        link.should_exit = True
        thread.join(timeout=30)
    assert not thread.is_alive()
