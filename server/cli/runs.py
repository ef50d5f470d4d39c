"""The coordinator's commands about runs: begin, go on, stop, read."""

import os
import signal
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from common.cli import models
from common.errors import RunError
from common.support.terminal import Changes, StoppedError, console, log_to

Folder = Annotated[
    Path,
    typer.Option("--project", envvar="CONSILIUM_PROJECT", help="The folder that init made."),
]
HERE = Path()


def run(
    study: Annotated[Path | None, typer.Argument(help="The study, a YAML file.")] = None,
    changes: Changes = None,
    resume: Annotated[
        Path | None, typer.Option(help="A run to go on with, by folder or name.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; by default a new one under runs/.")
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds for a quorum of sites to connect, and for hospitals to approve."
        ),
    ] = 3600.0,
    project: Folder = HERE,
) -> None:
    """Run a study on the hospitals that are connected, or go on with one that was interrupted.

    The link must be up: consilium-server start. It begins once no hospital has a person's yes or
    no pending, or after --wait with those that agreed. This may be interrupted, or killed, at any
    time; --resume goes on after the last finished round, and with the approvals given meanwhile.
    """
    from common.config.study import Study
    from server import coordinator
    from server.project.project import Project
    from server.reports.mlflow import check_mlflow
    from server.runs.run_folder import RunFolder

    place = Project.open(project)
    if place.settings.mlflow:
        check_mlflow()
    if (study is None) == (resume is None):
        raise typer.BadParameter("name a study file, or a run with --resume")
    if resume is not None:
        if changes or out:
            raise typer.BadParameter("--resume goes on with the run's own study")
        folder = RunFolder.resume(_find(resume, project))
    else:
        assert study is not None  # noqa: S101  (one of the two is there)
        name = f"{study.stem}-{datetime.now():%Y%m%d-%H%M%S}"
        wanted = Study.read(study, tuple(changes or ()))
        folder = coordinator.create_run(wanted, out or place.runs / name)
    log_to(folder.path / "run.log")
    again = f"consilium-server run --resume {folder.path}"
    try:
        if not (folder.path / "report.json").exists():
            mlflow = place.settings.mlflow
            coordinator.run_study(folder, place.database, place.ledgers, wait=wait, mlflow=mlflow)
        coordinator.show_run(folder)
    except KeyboardInterrupt:
        raise StoppedError(f"Stopped. Go on with: {again}") from None


def report(
    run: Annotated[Path, typer.Argument(help="A finished run, by folder or name.")],
    project: Folder = HERE,
) -> None:
    """Write a finished run's report again: one page, the model's card, and its facts as JSON.

    report.html is one file that loads nothing: it can be mailed, printed, and kept.
    """
    from server.evidence.report import REPORT, write_report
    from server.runs.run_folder import RunFolder

    folder = RunFolder.resume(_find(run, project))
    write_report(folder)
    console.print(f"report: {folder.path / REPORT}")


def stop(
    run: Annotated[Path, typer.Argument(help="The run, by folder or name.")],
    project: Folder = HERE,
) -> None:
    """Stop a run that is going on; it can be resumed."""
    from server.runs.run_folder import RunFolder

    run = _find(run, project)
    if not RunFolder.resume(run).busy:
        raise RunError(run, expected="a run that is going on", got="none")
    process = run / "process"
    if not process.is_file():
        expected, got = "a run of consilium-server", "one that another command is on"
        raise RunError(run, expected=expected, got=got)
    os.kill(int(process.read_text()), signal.SIGINT)
    console.print(f"Stopping. Go on with: consilium-server run --resume {run}")


def logs(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run, by folder or name; without one, the link's own log."),
    ] = None,
    lines: Annotated[int, typer.Option(min=1, help="How many of the last.")] = 50,
    project: Folder = HERE,
) -> None:
    """Show the last lines of a run's log, or of the link's."""
    from server.project.project import Project

    path = _find(run, project) / "run.log" if run else Project.open(project).log
    if not path.is_file():
        raise RunError(path, expected="a log", got="no such file")
    for line in path.read_text(encoding="utf-8").splitlines()[-lines:]:
        console.print(line)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, by folder or name.")],
    folder: models.Folder,
    project: Folder = HERE,
) -> None:
    """Take a released model home: its tensors, all that they need, and one ONNX file.

    model.onnx needs nothing else: pixels in, probabilities and decisions out. It is written where
    the extra export is installed, and checked against PyTorch.
    """
    models.export_files(_find(run, project), folder)


def _find(run: Path, project: Path) -> Path:
    """The folder of a run, which may be given by its name alone, as status shows it."""
    named = project / "runs" / run
    return named if named.is_dir() and not run.is_dir() else run
