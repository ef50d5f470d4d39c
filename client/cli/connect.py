"""The commands of `consilium-client` that take a hospital from nothing to its coordinator."""

import logging
import os
import shlex
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from client.cli.privacy import SiteFile
from common.support.terminal import INTERRUPTED, console, log_to

log = logging.getLogger(__name__)

_EPSILON = 8.0
"""What all studies together may spend, where nobody says otherwise."""
_STOPPED = "Stopped at once. The next start goes on with what was being answered."


def init(
    site_file: SiteFile,
    name: Annotated[str | None, typer.Option(help="Of this site, short, without spaces.")] = None,
    data: Annotated[Path | None, typer.Option(help="Where its images are.")] = None,
    data_format: Annotated[
        str | None,
        typer.Option("--format", help="manifest, image_folder or npz; otherwise looked for."),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Its private folder; by default state, beside SITE_YAML.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of the coordinator.")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(help="The coordinator's certificate; by default ca.crt, beside SITE_YAML."),
    ] = None,
    enrolled_patients: Annotated[
        int | None, typer.Option(min=1, help="About how many patients train here.")
    ] = None,
    privacy: Annotated[
        bool | None, typer.Option(help="Whether only studies with differential privacy may train.")
    ] = None,
    max_epsilon: Annotated[
        float | None, typer.Option(help="The ε that all of them together may spend.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A folder of backbone weights, if there is one.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing that has a default.")] = False,
) -> None:
    """Write a site file, make this site's key, and say what the coordinator needs to know.

    What no option says is asked for. The policy it writes is strict; loosen it where that is meant.
    Nothing is overwritten: a key that is there is kept, and so is a site file. The private key
    never leaves this machine.
    """
    from client.admin import setup
    from client.site import Site
    from common.support import keys

    if not site_file.exists():
        home = site_file.parent
        name = name or typer.prompt("Name of this site, short, without spaces")
        data = data or Path(typer.prompt("Folder or file with its images"))
        server = server or typer.prompt("The coordinator's host:port")
        epsilon = _privacy(privacy, max_epsilon, yes=yes)
        if epsilon is not None and enrolled_patients is None:
            enrolled_patients = _number()
        answers = setup.Answers(
            name=name,
            data=data,
            format=data_format,
            server=server,
            enrolled=enrolled_patients,
            epsilon=epsilon,
            state=state or home / "state",
            ca=ca or home / "ca.crt",
            weights=weights,
        )
        setup.write_site(site_file, answers)
        console.print(f"wrote {site_file}: read it, above all its policy", style="green")
    else:
        console.print(f"{site_file} is there already, and stays as it is")
    site = Site.read(site_file)
    public, key = setup.write_keys(site_file)
    unit = setup.write_unit(site_file, site.name)
    console.print(
        f"key          {setup.key_of(site_file)}: it stays here, and only you can read it"
    )
    console.print(f"public key   {public}")
    console.print(f"fingerprint  {keys.fingerprint(key)}")
    console.print("Next:")
    console.print(
        f"1. Send {public} to the coordinator, and tell the fingerprint by telephone. There:"
    )
    console.print(f"   consilium-server admit {public.name} --name {shlex.quote(site.name)}")
    for connect in site.connect:
        console.print(f"2. Put the coordinator's ca.crt at {connect.ca}.")
    console.print(f"3. consilium-client check {shlex.quote(str(site_file))}")
    console.print(f"4. consilium-client start {shlex.quote(str(site_file))}")
    if unit:
        console.print(f"   or, from every start of this machine on: see {unit}")
    console.print(
        f"5. consilium-client studies {shlex.quote(str(site_file))}: what waits for a yes"
    )


def _privacy(privacy: bool | None, max_epsilon: float | None, *, yes: bool) -> float | None:
    """The ε that all studies together may spend; None if they need no differential privacy."""
    if privacy is None:
        question = (
            "Only studies with differential privacy (otherwise nothing bounds what they tell)"
        )
        privacy = yes or max_epsilon is not None or typer.confirm(question, default=True)
    if not privacy:
        return None
    if max_epsilon is None and not yes:
        max_epsilon = typer.prompt(
            "The ε that all studies together may spend", _EPSILON, type=float
        )
    return _EPSILON if max_epsilon is None else max_epsilon


def _number() -> int:
    while True:
        text = typer.prompt("About how many patients train here, a number that you stay with")
        if text.isdecimal() and int(text):
            return int(text)


def check(
    site_file: SiteFile,
    study_file: Annotated[
        Path | None,
        typer.Argument(metavar="[STUDY_YAML]", help="A study to look at as well."),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            help="Measure what bfloat16 would gain here, on the study's own network, and whether "
            "to ask the coordinator for it. Takes seconds; nothing else should run meanwhile.",
        ),
    ] = False,
) -> None:
    """Look now at everything that could fail later: data, disk, policy, key, connection.

    Nothing is sent but this site's signature. The exit code is 1 if anything is not as it must be.
    """
    from client.admin.doctor import examine_site

    if speed and study_file is None:
        raise typer.BadParameter("--speed is measured on a study's network: name the study too")
    well = True
    for finding in examine_site(site_file, study_file, speed=speed):
        mark, style = ("ok", "green") if finding.good else ("no", "red")
        console.print(mark, style=style, end="  ")
        console.print(f"{finding.what:12} {finding.text}")
        well = well and finding.good
    raise typer.Exit(0 if well else 1)


def start(site_file: SiteFile) -> None:
    """Connect to the coordinator and answer its studies, until stopped.

    It runs this installation's own code, whatever comes over the connection, which goes outward
    only. Where the coordinator does not answer, it goes on trying. Ctrl-C lets it answer what it is
    working on first, a second one stops at once; after that, or a kill, the next start goes on with
    what was being answered. The log is in the state folder, logs/client.log.
    """
    from client.link.node import Node
    from client.site import Site

    site = Site.read(site_file)
    log_to(site.private("logs") / "client.log", dated=True)
    stop = threading.Event()

    def end(*_: object) -> None:
        if stop.is_set():
            # Not by an exception: whoever waits for a stalled coordinator would be waited for.
            os.write(2, f"{_STOPPED}\n".encode())
            os._exit(INTERRUPTED)
        log.info("stopping, as soon as what is being worked on is answered")
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    Node(site_file, stop).serve()
    log.info("stopped")
