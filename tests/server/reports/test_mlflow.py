"""What MLflow shows: the figures of a run, each once, whatever became of the run or of MLflow."""

import getpass
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from flwr.app import Context, Message

from server.cli import main as server
from server.project.project import Project
from server.reports.mlflow import connect_mlflow
from server.reports.progress import Reporter
from server.rounds.loop import Run
from server.runs.results import FEDERATED
from server.runs.run_folder import RunFolder
from simulations.engines.grid import InProcessGrid
from simulations.sites import virtual_sites
from tests.builders import (
    PHANTOMS,
    ROOT,
    client_app,
    create_run,
    edit_site,
    find_phantoms,
    read_curves,
    read_study,
    write_study,
)

ClientApp = Callable[[Message, Context], Message]

PASSWORD = "hush"  # noqa: S105


class Interrupted(BaseException):
    """As sudden as a killed process, as far as this process can tell."""


@pytest.fixture(scope="module")
def mlflow() -> None:
    pytest.importorskip("mlflow", reason="needs MLflow: pip install '.[mlflow]'")


@pytest.fixture(scope="module")
def empty(mlflow: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without a run; MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect_mlflow(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty: Path, tmp_path: Path) -> str:
    """The address of a database of its own."""
    return f"sqlite:///{shutil.copy(empty, tmp_path / 'mlflow.db')}"


@pytest.fixture
def nobody() -> str:
    """The address of a server that is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://me:{PASSWORD}@127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def run(phantoms: Path, tmp_path: Path) -> RunFolder:
    """A run of four virtual hospitals that has not started."""
    study = read_study("demo", "train.local_epochs=1", "train.rounds=3")
    create_run(find_phantoms(phantoms, PHANTOMS), study, tmp_path / "run", phantoms / "cache")
    return RunFolder(tmp_path / "run")


def go_on(run: RunFolder, address: str, app: ClientApp = client_app) -> None:
    """Run as a process of the coordinator does, from wherever the run is."""
    grid = InProcessGrid(app, virtual_sites.find_site_files(run.path))
    Run(grid, run, Reporter(run, address)).run()


def stop_in(number: int) -> ClientApp:
    """Hospitals that work until a round."""

    def app(message: Message, context: Context) -> Message:
        config = message.content.config_records.get("config", {})
        if config.get("server-round") == number:
            raise Interrupted
        return client_app(message, context)

    return app


def read(store: str) -> tuple[dict[str, str], dict[str, list[tuple[int, float]]], str]:
    """Of the one run there: its parameters, each curve's steps and values, and its status."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    curves = {
        tag: sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, tag))
        for tag in found.data.metrics
    }
    return dict(found.data.params), curves, found.info.status


def rounds_of(curves: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {tag: points for tag, points in curves.items() if not tag.startswith("test ")}


def test_an_interrupted_run_is_one_run_and_each_figure_there_once(
    run: RunFolder, store: str
) -> None:
    with pytest.raises(Interrupted):
        go_on(run, store, stop_in(3))
    _, curves, status = read(store)
    assert curves == read_curves(run)
    assert [step for step, _ in curves["training loss"]] == [1, 2]
    assert status == "RUNNING"
    go_on(run, store)
    parameters, curves, status = read(store)
    assert rounds_of(curves) == read_curves(run)
    assert [step for step, _ in curves["training loss/north"]] == [1, 2, 3]
    assert [step for step, _ in curves["validation AUROC"]] == [0, 1, 2, 3]
    assert status == "FINISHED"
    assert parameters["train.rounds"] == "3"
    assert parameters["aggregate.strategy"] == "fedavg"
    report = json.loads((run.path / "report.json").read_text())["results"][FEDERATED]
    (step, figure), *more = curves[f"test AUROC/{FEDERATED}"]
    assert (step, figure, more) == (3, report["overall"]["auroc"], [])
    of_sites = {name: site["accuracy"] for name, site in report["sites"].items() if site["images"]}
    assert len(of_sites) > 1
    for name, accuracy in of_sites.items():
        assert curves[f"test accuracy/{FEDERATED}/{name}"] == [(3, accuracy)]


def test_what_a_server_missed_is_there_once_the_run_goes_on(
    run: RunFolder, store: str, nobody: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Interrupted):
        go_on(run, nobody, stop_in(3))
    assert [line["round"] for line in run.read_history() if not line["site"]] == [1, 2]
    said = "coordinator.yaml: mlflow: expected MLflow to take the figures, got ConnectionError"
    assert caplog.text.count(said) == 1
    assert PASSWORD not in caplog.text
    go_on(run, store)
    assert rounds_of(read(store)[1]) == read_curves(run)


def test_a_run_ends_without_a_server(
    mlflow: None, run: RunFolder, nobody: str, caplog: pytest.LogCaptureFixture
) -> None:
    go_on(run, nobody)
    assert (run.path / "report.json").exists()
    assert caplog.text.count("The run goes on without.") == 1


def test_a_silent_server_is_waited_for_once(
    mlflow: None, run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        go_on(run, f"http://127.0.0.1:{silent.getsockname()[1]}")
        silent.settimeout(0)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()  # nobody asked again
    assert (run.path / "report.json").exists()
    assert caplog.text.count("The run goes on without.") == 1


def test_what_a_site_keeps_to_itself_is_absent(run: RunFolder, store: str) -> None:
    edit_site(run.path / "sites/north/site.yaml", policy={"disclose": {"metrics": "none"}})
    go_on(run, store)
    _, curves, _ = read(store)
    assert rounds_of(curves) == read_curves(run)
    assert not [tag for tag in curves if "north" in tag]


def test_nothing_of_this_machine_is_there(run: RunFolder, store: str, tmp_path: Path) -> None:
    """But the place that MLflow itself would keep files in, which no run has."""
    from mlflow import MlflowClient

    go_on(run, store)
    client = MlflowClient(tracking_uri=store)
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    told = json.dumps([found.data.params, found.data.tags, found.info.user_id])
    for own in (str(tmp_path), str(ROOT), socket.gethostname(), f'"{getpass.getuser()}"'):
        assert own not in told
    assert not client.list_artifacts(found.info.run_id)


def test_mlflow_tells_its_makers_nothing(mlflow: None) -> None:
    """MLflow decides it once in a process, when it is imported."""
    code = (
        "import os; [os.environ.pop(name, None) for name in ('CI', 'PYTEST_CURRENT_TEST')]\n"
        "from server.reports.mlflow import connect_mlflow\n"
        "connect_mlflow('http://127.0.0.1:1')\n"
        "from mlflow.telemetry import get_telemetry_client\n"
        "assert get_telemetry_client() is None"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_without_the_extra_nothing_begins(
    tmp_path: Path, run_main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project.create(tmp_path / "coordinator", ("study.example.org",), 8443)
    settings = project.folder / "coordinator.yaml"
    asked = settings.read_text().replace("mlflow: null", "mlflow: http://127.0.0.1:5000")
    settings.write_text(asked)
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as where it is not installed
    study = write_study(tmp_path)
    code, text = run_main(server.main, "run", study, "--project", project.folder)
    assert code == 1
    assert "pip install 'consilium[mlflow]'" in text
    assert not list(project.runs.iterdir())


@pytest.mark.parametrize("place", ["./mlruns", "file:///tmp/runs", "http://", 5])
def test_no_other_place_is_taken(
    tmp_path: Path, run_main: Callable[..., tuple[int, str]], place: Sequence[str]
) -> None:
    project = Project.create(tmp_path / "coordinator", ("study.example.org",), 8443)
    settings = project.folder / "coordinator.yaml"
    settings.write_text(settings.read_text().replace("mlflow: null", f"mlflow: {place}"))
    code, text = run_main(server.main, "status", "--project", project.folder)
    assert code == 1
    assert "coordinator.yaml: mlflow: expected" in text
