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
    by: Annotated[
        list[str] | None,
        typer.Option(
            help="A column of the hospitals' manifests, such as sex: groups of test patients are "
            "shown. Ages, and other numbers, are cut at 40 and 60. Repeat."
        ),
    ] = None,
) -> None:
    """Write a finished run's report again: one page, the model's card, and its facts as JSON.

    report.html is one file that loads nothing: it can be mailed, printed, and kept.
    """
    from client.runtime import Runtime
    from server.evidence.report import REPORT, write_report
    from server.runs.run_folder import RunFolder
    from simulations.studies import subgroups, summary
    from simulations.studies.audit import find_bound

    if (run / summary.SUMMARY).exists():
        summary.summarise_seeds(run, summary.read_seeds(run))
        return
    folder = RunFolder.resume(run)
    bound = find_bound(audit, folder.study) if audit else None
    groups = [subgroups.describe_run(run, by, Runtime())] if by else []
    write_report(folder, bound, groups)
    console.print(f"report: {folder.path / REPORT}")
