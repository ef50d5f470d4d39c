"""What TensorBoard reads: the figures of `metrics.jsonl`, each once, whatever became of the run."""

import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from flwr.app import Context, Message
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from server.app import app as server_app
from server.reports.tensorboard import Events
from server.runs.run_folder import RunFolder
from simulations.engines.grid import simulate_run
from simulations.sites import virtual_sites
from tests.builders import PHANTOMS, client_app, create_run, edit_site, read_curves, read_study

ClientApp = Callable[[Message, Context], Message]


class Interrupted(BaseException):
    """As sudden as a killed process, as far as this process can tell."""


def create_demo(folder: Path, sites: Sequence[Path], *changes: str) -> RunFolder:
    """A run of virtual hospitals that has not started."""
    study = read_study("demo", "train.local_epochs=1", *changes)
    found = [virtual_sites.find_site(site) for site in sites]
    create_run(found, study, folder, sites[0].parent / "cache")
    return RunFolder(folder)


def run_apps(run: RunFolder, app: ClientApp = client_app) -> None:
    simulate_run(server_app, app, virtual_sites.find_site_files(run.path), run.path)  # type: ignore[arg-type]


@pytest.fixture
def four(phantoms: Path) -> list[Path]:
    return [phantoms / name for name in PHANTOMS]


def curves(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every event that TensorBoard would show, by tag."""
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_an_interrupted_run_shows_each_round_once(tmp_path: Path, four: list[Path]) -> None:
    run = create_demo(tmp_path / "run", four, "train.rounds=5")

    def stops(message: Message, context: Context) -> Message:
        config = message.content.config_records.get("config", {})
        if config.get("server-round") == 4:
            raise Interrupted
        return client_app(message, context)

    with pytest.raises(Interrupted):
        run_apps(run, stops)
    (written,) = (run.path / "tensorboard").iterdir()
    assert curves(run) == read_curves(run)
    assert [step for step, _ in curves(run)["training loss"]] == [1, 2, 3]
    # As after a SIGKILL in the middle of writing: the end of round 2 and all of 3 are missing.
    whole = written.read_bytes()
    written.write_bytes(whole[: len(whole) // 2])
    run_apps(run)
    told = curves(run)
    assert told == read_curves(run)
    assert {"training loss/west", "validation balanced accuracy/north"} < set(told)
    assert [step for step, _ in told["training loss/north"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in told["validation AUROC"]] == [0, 1, 2, 3, 4, 5]


def test_what_a_site_keeps_to_itself_is_absent(tmp_path: Path, four: list[Path]) -> None:
    run = create_demo(tmp_path / "run", four, "train.rounds=1")
    for name, tells in (("north", {"metrics": "none"}), ("south", {"counts": "rounded"})):
        path = run.path / f"sites/{name}/site.yaml"
        edit_site(path, policy={"disclose": tells})
    run_apps(run)
    told = curves(run)
    assert told == read_curves(run)
    assert not [tag for tag in told if "north" in tag]
    assert "validation AUROC/south" not in told  # it takes scores, which are withheld
    assert "training loss/east" in told
    for path in (run.path / "tensorboard").iterdir():
        assert socket.gethostname() not in path.name
        assert str(tmp_path).encode() not in path.read_bytes()


def test_many_sites_are_shown_together_only(tmp_path: Path, phantoms: Path) -> None:
    copies = [shutil.copytree(phantoms / "north", tmp_path / f"copy-{i}") for i in range(7)]
    run = create_demo(tmp_path / "run", copies, "train.rounds=1")
    run_apps(run)
    assert set(curves(run)) == {
        "training loss",
        "validation balanced accuracy",
        "validation AUROC",
    }


def test_a_run_goes_on_without_events(
    tmp_path: Path, four: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = create_demo(tmp_path / "run", four, "train.rounds=2")
    (run.path / "tensorboard").write_text("in the way")
    run_apps(run)
    assert (run.path / "report.json").exists()
    assert caplog.text.count("tensorboard: expected a folder for TensorBoard's events, got") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_once(
    tmp_path: Path, four: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    run = create_demo(tmp_path / "run", four)
    events = Events(run, by_site=False)
    (written,) = (run.path / "tensorboard").iterdir()
    written.unlink()
    written.symlink_to("/dev/full")
    figures = dict.fromkeys(("balanced_accuracy", "auroc"), 0.5)
    line = {"round": 1, "model_round": 0, "site": None, "train_loss": 1.0, **figures}
    for _ in range(3):
        events.add([line])
    assert caplog.text.count("got No space left on device. The run goes on without.") == 1
