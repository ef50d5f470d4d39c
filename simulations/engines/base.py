"""Where virtual hospitals compute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from client.app import make_app
from client.runtime import Runtime
from common.config.study import Study
from server.app import app as server_app
from simulations.engines.grid import answer_bytes, simulate_run
from simulations.sites import virtual_sites


class Engine(Protocol):
    """Runs the real ServerApp and ClientApp for virtual hospitals, given by their site files."""

    @property
    def runtime(self) -> Runtime:
        """What this process itself keeps open of the hospitals."""

    def prepare(self, site_files: Sequence[Path], study: Study) -> None:
        """Prepare every hospital's images, so that what is wrong with them is said at once."""

    def run(self, site_files: Sequence[Path], folder: Path) -> None:
        """Bring the run in this folder to its end."""

    def forget(self) -> None:
        """Let go of what is kept of the hospitals so far; others come."""


class InProcess:
    """All in this process, one hospital after the other."""

    def __init__(self) -> None:
        self.runtime = Runtime()
        self.app = make_app(self.runtime)

    def prepare(self, site_files: Sequence[Path], study: Study) -> None:
        """Every image decoded, and through the frozen layers."""
        virtual_sites.prepare_sites(site_files, study, self.runtime)

    def run(self, site_files: Sequence[Path], folder: Path) -> None:
        """From the last finished round on; ledgers are open as long as it takes."""
        try:
            simulate_run(server_app, self.app, site_files, folder)
        finally:
            self.runtime.close_sites()

    def answer(self, site_file: Path, message: bytes) -> bytes:
        """The reply of one hospital to one message, both as they travel."""
        return answer_bytes(self.app, site_file, message)

    def forget(self) -> None:
        """Close the sessions of this process."""
        self.runtime.close_sessions()
