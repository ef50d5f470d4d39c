"""A deployment on one machine, told step by step; one hospital loses its power on the way."""

import time
from pathlib import Path

from client.site import Site
from common.config.study import Study
from common.errors import RunError
from common.support.terminal import console
from simulations.demo.loopback import Loopback, wait_until
from simulations.sites import phantom, virtual_sites

_STUDY = Path(__file__).parents[2] / "configs" / "demo.yaml"
_ROUNDS = 20
_UNLUCKY = "north"


def show_deployment(folder: Path) -> None:
    """Run it in a new folder, which keeps the certificates, the run, and what everybody printed.

    Raises:
      RunError: a step failed; says which log tells more.
    """
    began = time.monotonic()

    def tell(text: str) -> None:
        console.print(f"{time.monotonic() - began:5.1f} s  {text}")

    phantoms = folder / "phantoms"
    phantom.write_phantoms(phantoms)
    study = Study.read(_STUDY, (f"train.rounds={_ROUNDS}",))
    found = [virtual_sites.find_site(phantoms / name) for name in ("east", "north", "south")]
    with Loopback(folder, study, found) as world:
        tell(f"An authority, a server certificate, and a key of each hospital: {folder}")
        world.start_link()
        tell(f"The coordinator listens at https://127.0.0.1:{world.project.settings.port}")
        for name in world.sites:
            world.start_hospital(name)
        tell(f"Three hospitals start: {', '.join(world.sites)}")
        run = folder / "run"
        process = world.start_run(str(world.study), "--out", str(run))
        wait_until(lambda: (run / "last.json").exists() or process.poll() is not None, 90)
        tell("The first round is over")
        state = Site.read(world.sites[_UNLUCKY]).state
        wait_until(lambda: any(state.glob("link/*/letter")) or process.poll() is not None, 30)
        world.kill_process(_UNLUCKY)
        tell(f"{_UNLUCKY} is killed at work")
        world.start_hospital(_UNLUCKY)
        tell(f"{_UNLUCKY} starts again, and answers what it was asked")
        if process.wait(150):
            remedy = "What everybody printed is there."
            got = "an error"
            where = folder / "logs"
            raise RunError(where, expected="a finished run", got=got, remedy=remedy)
        tell("The study is over")
    console.print(world.read_output("run"))
