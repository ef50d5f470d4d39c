"""One study from the coordinator's command to its end: wait for sites, then the round loop."""

import os
import time
from pathlib import Path

from flwr.serverapp import Grid

from common.config.study import Study
from common.errors import RunError
from common.support.terminal import console, table
from server.evidence.report import REPORT, write_report
from server.link.grid import open_grid
from server.reports.progress import Joined, Reporter
from server.reports.tables import show_results
from server.rounds.loop import Run
from server.rounds.start import check_start
from server.runs.results import read_results
from server.runs.run_folder import RunFolder

_LOOK = 1.0
"""Seconds between counts of the sites that are connected."""


def create_run(study: Study, folder: Path) -> RunFolder:
    """Create a run folder, after everything is checked that needs no site.

    Raises:
      StudyError: the study cannot be run as it is.
      RunError: the folder is taken.
    """
    check_start(study)
    run = RunFolder.create(folder)
    run.write_study(study)
    return run


def run_study(
    run: RunFolder, database: Path, ledgers: Path, *, wait: float, mlflow: str | None = None
) -> None:
    """Run a study, or go on with it, on the sites that are connected.

    Args:
      run: The run; one process at a time can be on it.
      database: The file in which the link keeps its messages.
      ledgers: The file of how far each site's ledger went, in whatever run.
      wait: The seconds within which as many sites as the quorum must connect, and persons at
        hospitals may approve the study.
      mlflow: The address of an MLflow server that is given the figures, too.

    Raises:
      RunError: too few sites, or too few that can take part; the run can be resumed.
    """
    with run.locked(), open_grid(database) as grid:
        run.write("process", str(os.getpid()), durable=False)
        try:
            limit = time.monotonic() + wait
            _await(grid, run.study.aggregate.quorum, limit)
            Run(grid, run, Announcer(run, mlflow), ledgers).run(limit - time.monotonic())
        finally:
            (run.path / "process").unlink(missing_ok=True)


class Announcer(Reporter):
    """A reporter that also shows a coordinator the terms that every site agreed to."""

    def report_join(self, joined: Joined) -> None:
        """Also print a table with one row for each site."""
        super().report_join(joined)
        columns = "site", "role", "trains on", "weight", "tells", "ledger", "software", "contract"
        shown = table(*columns)
        for reply in joined.replies:
            tells, weight = reply.disclosure, joined.weights.get(reply.name)
            shown.add_row(
                reply.name,
                reply.role,
                "–" if weight is None or weight.told is None else str(weight.told),
                "–" if weight is None else f"{weight.number:g}",
                f"counts {tells.counts}, metrics {tells.metrics}",
                f"{reply.ledger.count} lines",
                f"torch {reply.versions.torch}, flwr {reply.versions.flwr}",
                reply.contract.fingerprint[:12],
            )
        console.print(shown)


def show_run(run: RunFolder) -> None:
    """Print the tables of a finished run, and write its report."""
    results, facts = read_results(run.path, len(run.study.classes))
    show_results(results, run.study.classes, facts.get("withheld", {}), run.path)
    write_report(run)
    console.print(f"report: {run.path / REPORT}")


def _await(grid: Grid, quorum: int, limit: float) -> None:
    with console.status("") as shown:
        while (found := len(list(grid.get_node_ids()))) < quorum:
            left = limit - time.monotonic()
            if left <= 0:
                expected, got = f"{quorum} sites connected (aggregate.quorum)", str(found)
                remedy = "See consilium-server status: is the link up? Go on with run --resume."
                raise RunError("join", expected=expected, got=got, remedy=remedy)
            shown.update(f"{found} of {quorum} sites connected; waiting {left:.0f} s more")
            time.sleep(min(_LOOK, left))
