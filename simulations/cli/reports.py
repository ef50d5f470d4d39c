"""The command that writes the report of runs that are finished."""

from pathlib import Path
from typing import Annotated

import typer

from common.support.terminal import console


def report(
    run: Annotated[Path, typer.Argument(help="A finished run folder, or one of several seeds.")],
    audit: Annotated[
        Path | None,
        typer.Option(help="The folder of an audit of this study: its bound is shown beside ε."),
    ] = None,
) -> None:
    """Write a finished run's report again: one page, the model's card, and its facts as JSON.

    report.html is one file that loads nothing: it can be mailed, printed, and kept.
    """
    from server.evidence.report import REPORT, write_report
    from server.runs.run_folder import RunFolder
    from simulations.studies import summary
    from simulations.studies.audit import find_bound

    if (run / summary.SUMMARY).exists():
        summary.summarise_seeds(run, summary.read_seeds(run))
        return
    folder = RunFolder.resume(run)
    write_report(folder, find_bound(audit, folder.study) if audit else None)
    console.print(f"report: {folder.path / REPORT}")
