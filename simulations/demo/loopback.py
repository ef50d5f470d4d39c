"""A coordinator and hospitals as real processes of this machine, over TLS, on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from client.site import Site
from common.config.study import Study
from common.config.yaml import dump
from common.errors import RunError
from common.support import files, keys
from server.link.sites import Sites
from server.project.project import Project
from simulations.sites import virtual_sites
from simulations.sites.virtual_sites import VirtualSite

_HOST = "127.0.0.1"
_SERVER = "from server.cli.main import main; main()"
_CLIENT = "from client.cli.main import main; main()"


class Loopback:
    """A deployment in one folder; every process is ended with the block.

    Args:
      folder: New; holds the coordinator's project, the hospitals, and what every process printed.
      study: The study whose seed keys the hospitals' holdouts, as in a simulation.
      found: The hospitals.
    """

    def __init__(self, folder: Path, study: Study, found: Sequence[VirtualSite]) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        """The processes, by name."""
        self.project = Project.create(folder / "coordinator", (_HOST,), find_free_port())
        self.study = folder / "study.yaml"
        files.write(self.study, study.yaml())
        planned = virtual_sites.plan_sites(found, study)
        written = virtual_sites.write_sites(planned, study, folder, folder / "cache")
        self.sites = {path.parent.name: path for path in written}
        for name, path in self.sites.items():
            self._enrol(name, path)

    def _enrol(self, name: str, path: Path) -> None:
        key = keys.new()
        keys.write_private(path.with_name("site.key"), key)
        server = f"{_HOST}:{self.project.settings.port}"
        ca = str(self.project.folder / "ca.crt")
        change_site_file(path, connect={"server": server, "ca": ca, "key": "site.key"})
        Sites(self.project).admit(key.public_key(), name)

    def start_link(self) -> subprocess.Popen[bytes]:
        """Start the coordinator's link; returns once it answers."""
        process = self._start("link", _SERVER, "start", "--host", _HOST)
        wait_until(lambda: _answers(self.project.settings.port), 60)
        return process

    def start_hospital(self, name: str) -> subprocess.Popen[bytes]:
        """Start a hospital's client."""
        return self._start(name, _CLIENT, "start", str(self.sites[name]))

    def start_run(self, *options: str) -> subprocess.Popen[bytes]:
        """Start the study, or go on with it, by `run` and these options."""
        return self._start("run", _SERVER, "run", *options)

    def kill_process(self, name: str) -> None:
        """End a process as a power cut would."""
        process = self.running.pop(name)
        with suppress(ProcessLookupError):  # it had ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def read_output(self, name: str) -> str:
        """Read all that the processes of this name have printed."""
        path = self.folder / "logs" / f"{name}.txt"
        return path.read_text("utf-8", errors="replace") if path.exists() else ""

    def _start(self, name: str, code: str, *arguments: str) -> subprocess.Popen[bytes]:
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        environment = {**os.environ, "CONSILIUM_PROJECT": str(self.project.folder)}
        environment.setdefault("OMP_NUM_THREADS", "1")
        with (logs / f"{name}.txt").open("ab") as out:
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-c", code, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        self.running[name] = process
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in list(self.running):
            self.kill_process(name)


def change_site_file(site_file: Path, **keys_of_site: Any) -> None:
    """Change a site file in place."""
    content = yaml.safe_load(site_file.read_text("utf-8"))
    files.write(site_file, dump(content | keys_of_site))
    Site.read(site_file)


def wait_until(condition: Any, seconds: float) -> None:
    """Wait for a condition; raises `RunError` if it does not come true in time."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            expected, got = f"it within {seconds:g} s", "nothing"
            raise RunError("deployment", expected=expected, got=got)
        time.sleep(0.1)


def find_free_port() -> int:
    """Find a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((_HOST, port), timeout=1):
            return True
    except OSError:
        return False
