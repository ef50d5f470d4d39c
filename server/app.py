"""The coordinator's Flower ServerApp: study → join → rounds → report."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import RunError
from server.reports.progress import Reporter
from server.rounds.loop import Run
from server.runs.run_folder import RunFolder

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or go on with, the study in the run folder that the run configuration names."""
    run = context.run_config.get("run")
    if not isinstance(run, str) or not run:
        raise RunError("run configuration: expected run=<run folder>, got nothing")
    folder = RunFolder.resume(Path(run))
    with folder.locked():
        Run(grid, folder, Reporter(folder)).run()
