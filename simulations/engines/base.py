"""The engine, in which virtual hospitals compute."""

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
        """The sites and sessions that this process itself keeps open."""

    def prepare(self, site_files: Sequence[Path], study: Study) -> None:
        """Prepare every hospital's images, so that what is wrong with them is said at once."""

    def run(self, site_files: Sequence[Path], folder: Path) -> None:
        """Bring the run in this folder to its end."""

    def forget(self) -> None:
        """Forget the hospitals so far, as others come."""


class InProcess:
    """An engine in this process, one hospital after the other."""

    def __init__(self) -> None:
        self.runtime = Runtime()
        self.app = make_app(self.runtime)

    def prepare(self, site_files: Sequence[Path], study: Study) -> None:
        """Decode every image, and run it through the frozen layers."""
        virtual_sites.prepare_sites(site_files, study, self.runtime)

    def run(self, site_files: Sequence[Path], folder: Path) -> None:
        """Run from the last finished round on; ledgers are open as long as it takes."""
        try:
            simulate_run(server_app, self.app, site_files, folder)
        finally:
            self.runtime.close_sites()

    def answer(self, site_file: Path, message: bytes) -> bytes:
        """Answer one message to one hospital, both as they travel."""
        return answer_bytes(self.app, site_file, message)

    def forget(self) -> None:
        """Close the sessions of this process."""
        self.runtime.close_sessions()
