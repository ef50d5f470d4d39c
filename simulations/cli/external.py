"""The command that validates a released model at hospitals that no round saw."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from simulations.cli.options import CACHE, Cache


def evaluate(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    site: Annotated[
        list[Path],
        typer.Option(
            help="A hospital that no round saw: a folder of images, or one with a site.yaml. "
            "Repeat."
        ),
    ],
    part: Annotated[
        Literal["train", "validation", "test"] | None,
        typer.Option(help="Only this part of data that brings its own split; by default all."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the report; by default in RUN/external.")
    ] = None,
    cache: Cache = CACHE,
) -> None:
    """Validate the released model externally: on labelled images of hospitals that no round saw.

    All of their labelled images are tested on, and nothing is fitted to them. Their classes are
    the study's, by name, or some of them. A hospital that trained in the run is refused. Images
    that are also a training hospital's, byte for byte, are counted, and said.
    """
    from simulations.studies.external import validate_model

    validate_model(run, site, out, part=part, cache=cache)
