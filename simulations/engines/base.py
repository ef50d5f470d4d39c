"""Where virtual hospitals compute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from client.app import app as client_app
from client.session import close_sessions
from common.config.study import Study
from server.app import app as server_app
from simulations.engines.grid import simulate
from simulations.sites import virtual_sites


class Engine(Protocol):
    """Runs the real ServerApp and ClientApp for virtual hospitals, given by their site files."""

    def prepare(self, site_files: Sequence[Path], study: Study) -> None:
        """Prepare every hospital's images, so that what is wrong with them is said at once."""

    def run(self, site_files: Sequence[Path], folder: Path) -> None:
        """Bring the run in this folder to its end."""

    def forget(self) -> None:
        """Let go of what is kept of the hospitals so far; others come."""


class InProcess:
    """All in this process, one hospital after the other."""

    def prepare(self, site_files: Sequence[Path], study: Study) -> None:
        """Every image decoded, and through the frozen layers."""
        virtual_sites.prepare(site_files, study)

    def run(self, site_files: Sequence[Path], folder: Path) -> None:
        """From the last finished round on."""
        simulate(server_app, client_app, site_files, folder)

    def forget(self) -> None:
        """Close the sessions of this process."""
        close_sessions()
