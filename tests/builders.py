"""What tests build: sessions, sites, studies, small and fast."""

from collections.abc import Sequence
from pathlib import Path

from client.app import make_app
from client.preparation import Workspace, prepare_site
from client.runtime import Runtime
from client.session import Session
from client.site import Site
from common.config.study import Study
from simulations.sites import virtual_sites
from simulations.sites.virtual_sites import VirtualSite

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DEMO = CONFIGS / "demo.yaml"

PHANTOMS = ("east", "north", "south", "west")
"""The hospitals in the fixture `phantoms`."""

RUNTIME = Runtime()
"""What the sites of this test process keep open, until `new_process`."""

client_app = make_app(RUNTIME)


def session_of(site: Site, study: Study) -> Session:
    """A session of its own, that shares nothing with any other."""
    return Session(prepare_site(site, study, Workspace()))


def write_sites(found: Sequence[VirtualSite], study: Study, run: Path, cache: Path) -> list[Path]:
    """The site files of virtual hospitals, written into a run folder."""
    return virtual_sites.write_sites(virtual_sites.plan_sites(found, study), study, run, cache)
