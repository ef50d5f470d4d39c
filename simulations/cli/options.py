"""Options that several commands of `consilium-simulate` share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from common.support.terminal import StoppedError

if TYPE_CHECKING:
    from simulations.engines.base import Engine
    from simulations.studies.runner import Source

StudyFile = Annotated[Path, typer.Argument(help="The study, a YAML file; see configs/.")]
Cache = Annotated[
    Path, typer.Option(help="Prepared images, shared by all runs; delete it at will.")
]
CACHE = Path("runs/cache")
SeriesFolder = Annotated[
    Path | None, typer.Option(help="The folder of all runs; the same again goes on.")
]
Command = Callable[..., None]


def ask_for(name: str, build: Callable[..., Any]) -> Callable[[Command], Command]:
    """Put the options of `build` in place of a command's parameter `name`, which gets the result.

    Args:
      name: The name of the parameter.
      build: Its own parameters are options of the command line.
    """

    def decorate(command: Command) -> Command:
        asked = signature(build).parameters
        parameters: list[Parameter] = []
        for parameter in signature(command).parameters.values():
            parameters += asked.values() if parameter.name == name else [parameter]
        parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters]

        @wraps(command)
        def run(**given: Any) -> None:
            built = build(**{option: given.pop(option) for option in asked})
            command(**given, **{name: built})

        run.__dict__["__signature__"] = Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def name_source(
    site: Annotated[
        list[Path] | None,
        typer.Option(help="A hospital: a folder of images, or one with a site.yaml. Repeat."),
    ] = None,
    evaluate_site: Annotated[
        list[Path] | None, typer.Option(help="A hospital that never trains, only tests. Repeat.")
    ] = None,
    pool: Annotated[
        Path | None, typer.Option(help="One data set, to be cut into virtual hospitals by patient.")
    ] = None,
    partition: Annotated[
        str,
        typer.Option(
            help="How the pool is cut: iid, dirichlet:<α>, label:<k> or quantity:<α>, "
            "such as dirichlet:0.5.",
        ),
    ] = "iid",
    sites: Annotated[int, typer.Option(min=1, help="Hospitals to cut the pool into.")] = 4,
) -> "Source":
    """Name the source of the hospitals that a command is about."""
    from simulations.studies.runner import Source

    return Source(
        folders=tuple(site or ()),
        evaluators=tuple(evaluate_site or ()),
        pool=pool,
        partition=partition,
        sites=sites,
    )


def choose_engine(
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=128,
            help="Processes that share the hospitals, each computing on one core. They pay where "
            "many cores have long rounds before them. Without it, one process does all: images on "
            "all cores, rounds on as many as threads in site.yaml says, or one.",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            click_type=click.Choice(["in-process", "ray"]),
            help="Where hospitals compute: on this machine, or as actors of Ray.",
        ),
    ] = "in-process",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A Ray cluster with this machine in it. All its machines must find data, run "
            "folder and cache by the same paths.",
        ),
    ] = None,
) -> "Engine":
    """Choose the engine in which a command has hospitals compute."""
    if ray_address is not None:
        host, _, port = ray_address.rpartition(":")
        if engine != "ray" or not (host and port.isdecimal() and int(port) < 65536):
            raise typer.BadParameter("--ray-address goes with --engine ray, and is host:port")
    if engine == "ray":
        from simulations.engines.ray import Ray

        if workers is not None:
            raise typer.BadParameter("--workers and --engine ray: Ray has workers of its own")
        return Ray(ray_address)
    from simulations.engines.base import InProcess
    from simulations.engines.workers import Workers

    return InProcess() if workers is None else Workers(workers)


@contextmanager
def explain_stop(folder: Path, go_on: str) -> Iterator[None]:
    """End the block in one line at Ctrl-C; the line says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        runs = [*folder.glob("study.yaml"), *folder.rglob("seed-*/study.yaml")]
        text = f"Go on with: {go_on}" if runs else "Nothing was begun: there is no run to resume."
        raise StoppedError(f"Stopped. {text}") from None


def parse_seeds(text: str | None) -> tuple[int, ...]:
    """Parse seeds, each once; there are none where nothing is said."""
    if text is None:
        return ()
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise typer.BadParameter(f"--seeds: expected numbers such as 0,1,2, got {text!r}") from None


def parse_epsilons(text: str) -> list[float | None]:
    """Parse the values of ε to compare; None is without privacy."""
    from common.config.study import MOST_EPSILON

    try:
        found = [None if part == "none" else float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if any(epsilon is not None and not 0 < epsilon <= MOST_EPSILON for epsilon in found):
        limits = f"above 0 and up to {MOST_EPSILON:g}"
        expected = f"--epsilons: expected numbers {limits}, or none, such as none,8,3,1"
        raise typer.BadParameter(f"{expected}, got {text!r}")
    return found
