"""`consilium-server`: a coordinator runs a project that hospitals connect to."""

import os
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import LinkError
from common.support import terminal
from common.support.terminal import console, table
from server.cli import runs
from server.cli.runs import HERE, Folder

if TYPE_CHECKING:
    from server.link.sites import AdmittedSite
    from server.project.project import RunState

app = typer.Typer(
    help="Coordinate studies: admit hospitals, be there for them, run what they agreed to.",
    epilog="Begin with: consilium-server init DIR --host NAME",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

SiteName = Annotated[str, typer.Argument(metavar="NAME", help="The site, as it was admitted.")]


def main() -> None:
    """Run the command line; a mistake with a known remedy ends in one line, never a traceback."""
    os.umask(0o077)  # databases, logs and locks too are for this user alone
    try:
        terminal.run(app, remedy="Free some space, or mend the rights, then try again.")
    except Exception as ex:
        if not type(ex).__module__.startswith("sqlalchemy"):
            raise
        expected, got = "a database that can be used", type(ex).__name__
        remedy = "Is the disk full? Else restore link.db from a backup. A run can be resumed."
        terminal.end(LinkError("link.db", expected=expected, got=got, remedy=remedy))


@app.command(epilog="Example: consilium-server init coordinator --host study.example.org")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    host: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[:PORT]",
            help="How hospitals reach this machine, a name or an IPv4 address. Repeat.",
        ),
    ],
) -> None:
    """Make a project: its authority, made once, and the certificate of its server.

    Back the folder up, ca.key above all: who has it can pose as this coordinator, and without it no
    hospital can be kept beyond the server certificate's month. While it is in the folder, start
    renews that certificate by itself. To keep it offline, move it to a medium that you lock away,
    and have it back every two weeks: consilium-server renew --authority-key PATH.
    """
    from common.support import keys
    from server.project import certificates
    from server.project.project import Project

    names, port = _hosts(host)
    project = Project.create(folder, names, port)
    authority = certificates.find_authority_file(project.folder)
    at = f"--project {shlex.quote(str(project.folder))}"
    console.print(f"Made {project.folder}, which nobody but you can read. Back it up.")
    console.print(f"authority   {keys.fingerprint(keys.read_certificate(authority))}")
    console.print(f"address     {', '.join(f'{name}:{port}' for name in names)}")
    console.print(f"To hospitals: {authority} and the address. Neither is secret;")
    console.print("read them the authority's fingerprint by telephone.")
    console.print(f"Admit each:   consilium-server admit site.pub --name NAME {at}")
    console.print(f"Then serve:   consilium-server start {at}")
    console.print("Offline key:  move ca.key to a medium that you lock away; every two weeks then")
    console.print(f"              consilium-server renew --authority-key PATH {at}")
    console.print(f"or, at boot:  {project.folder / 'consilium-server.service'} (systemd)")


@app.command(epilog="Example: consilium-server renew --host new-name.example.org")
def renew(
    project: Folder = HERE,
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="One more name of this machine. Repeat."),
    ] = None,
    authority_key: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Where ca.key is, if you keep it elsewhere."),
    ] = None,
) -> None:
    """Make a new server key, and a certificate for a month; hospitals need do nothing.

    While ca.key is in the project, start does it in time by itself. Do it at once if somebody else
    may know server.pem: a hospital that has met the new certificate refuses every older one. It is
    for the hosts in coordinator.yaml, and those given here, which are added there.
    """
    from server.project import certificates
    from server.project.project import Project

    opened = Project.open(project).renew(tuple(host or ()), authority_key)
    end = certificates.read_expiry(opened.folder)
    console.print(f"New certificate for {', '.join(opened.settings.hosts)}, until {end:%Y-%m-%d}.")
    if opened.is_up():
        console.print("consilium-server start takes it up within a minute.")


@app.command(epilog="Example: consilium-server admit east.pub --name east")
def admit(
    public: Annotated[
        Path, typer.Argument(metavar="SITE.pub", help="The public key that the hospital sent.")
    ],
    name: Annotated[str, typer.Option(help="The site's name, as in its site.yaml.")],
    project: Folder = HERE,
    yes: Annotated[bool, typer.Option("--yes", help="The fingerprint has been compared.")] = False,
) -> None:
    """Let one hospital connect, by its key; nothing else changes.

    The fingerprint must be the one that consilium-client init showed there: compare by telephone,
    since whoever can change the hospital's mail can send another key.
    """
    from common.config.study import NAME, NAMED
    from common.support import keys
    from server.link.sites import Sites
    from server.project.project import Project

    opened, key = Project.open(project), keys.read_public(public)
    if not re.fullmatch(NAME, name):
        raise LinkError("--name", expected=NAMED, got=repr(name))
    console.print(f"key of {name}: {keys.fingerprint(key)}")
    if not yes and not typer.confirm("Does the hospital read out the same?"):
        console.print("Nothing was changed.")
        raise typer.Exit(1)
    Sites(opened).admit(key, name)
    console.print(f"{name} is admitted.")


@app.command(epilog="Example: consilium-server remove east")
def remove(name: SiteName, project: Folder = HERE) -> None:
    """Let a hospital connect no more, from now on; a study that runs goes on without it.

    Its key, or another under the same name, can be admitted later.
    """
    from server.link.sites import Sites
    from server.project.project import Project

    Sites(Project.open(project)).remove(name)
    console.print(f"{name} is removed.")


@app.command(epilog="Example: consilium-server sites")
def sites(project: Folder = HERE) -> None:
    """List the admitted hospitals: who is connected, who was last seen when, with what version."""
    from server.link.sites import Sites
    from server.project.project import Project

    found = Sites(Project.open(project)).list_sites()
    if not found:
        console.print(
            "No site is admitted. Begin with: consilium-server admit SITE.pub --name NAME"
        )
        return
    shown = table("site", "key", "admitted", "connected", "release")
    for site in found:
        row = (site.name, site.fingerprint[:19], _when(site.admitted))
        shown.add_row(*row, _seen(site), site.version or "–")
    console.print(shown)


@app.command(epilog="Example: consilium-server start --project coordinator")
def start(
    project: Folder = HERE,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "0.0.0.0",  # noqa: S104
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="The port to listen at, if not coordinator.yaml's."),
    ] = None,
) -> None:
    """Be there for hospitals, over TLS, until stopped; studies are run beside it, by run.

    Hospitals reach nothing here but their own messages. It can be stopped and started at any time,
    also while a study runs: sites come back by themselves. What it does is in coordinator.log.
    """
    from server.link import serve
    from server.project.project import Project

    serve.serve_hospitals(Project.open(project), host, port)


@app.command(epilog="Example: consilium-server status")
def status(project: Folder = HERE) -> None:
    """Show whether the link is up, how long its certificate holds, who is connected, what runs."""
    from server.link.sites import Sites
    from server.project import certificates
    from server.project.project import Project

    opened = Project.open(project)
    up = opened.is_up()
    console.print(f"link         {'up' if up else 'down; consilium-server start'}")
    end = certificates.read_expiry(opened.folder)
    left = (end - datetime.now(UTC)).days
    console.print(f"certificate  until {end:%Y-%m-%d}, {left} days")
    found = Sites(opened).list_sites()
    here = sum(site.connected for site in found)
    console.print(f"sites        {here} of {len(found)} connected")
    if states := opened.list_runs():
        shown = table("run", "round", "state")
        for state in states:
            shown.add_row(state.name, f"{state.round} of {state.rounds or '?'}", _doing(state))
        console.print(shown)
    for warning in certificates.check_certificate(opened.folder, opened.settings.hosts):
        console.print(warning, style="yellow")


def _hosts(given: list[str]) -> tuple[tuple[str, ...], int]:
    """Names and the one port of `NAME[:PORT]`."""
    from server.project.project import HTTPS

    names, ports = [], set()
    for text in given:
        name, colon, port = text.partition(":")
        if colon and not port.isdecimal():
            raise typer.BadParameter(f"--host: expected NAME or NAME:PORT, got {text!r}")
        names.append(name)
        ports.add(int(port) if colon else HTTPS)
    if len(ports) > 1:
        raise typer.BadParameter("--host: expected the same port for all, got several")
    return tuple(dict.fromkeys(names)), ports.pop()


def _when(time: datetime) -> str:
    return f"{time.astimezone():%Y-%m-%d %H:%M}"


def _seen(site: "AdmittedSite") -> str:
    if site.connected:
        return "now"
    return f"last {_when(site.seen)}" if site.seen else "never"


def _doing(state: "RunState") -> str:
    if state.busy:
        return "running"
    if state.finished:
        return "finished"
    return "stopped; consilium-server run --resume"


for command, name, rest in (
    (runs.run, "run", "study.yaml"),
    (runs.report, "report", "runs/skin-20260101-120000"),
    (runs.stop, "stop", "runs/skin-20260101-120000"),
    (runs.logs, "logs", "--lines 20"),
    (runs.export, "export", "skin-20260101-120000 exported/"),
):
    app.command(name, epilog=f"Example: consilium-server {name} {rest}")(command)
