"""The same study on Flower's simulation engine: the same numbers, by our own code, and quietly."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from client.ledger.ledger import Ledger
from common.flower.messages import identify_task
from common.protocol.join import JoinReply, JoinRequest
from simulations.cli.main import main
from simulations.engines import ray
from simulations.engines.ray_site import SitesApp, check_machine, fingerprint_code
from tests.builders import DEMO, PHANTOMS, ROOT, find_phantoms, read_study, write_sites

pytestmark = pytest.mark.numbers

NO_RAY = "needs Ray: pip install '.[ray]'"
MAIN = "from simulations.cli.main import main; main()"


def _ask(nodes: SitesApp, content: RecordDict, kind: str = MessageType.QUERY) -> Message:
    identify_task(1, 1)
    context = Context(1, 1000, {"partition-id": 0}, RecordDict(), {})
    return nodes(Message(content, 1000, kind), context)


@pytest.fixture
def east(phantoms: Path, tmp_path: Path, new_process: Callable[[], None]) -> Path:
    """The site file of one virtual hospital."""
    found = find_phantoms(phantoms, ["east"])
    (file,) = write_sites(found, read_study("demo"), tmp_path, tmp_path / "cache")
    return file


def test_an_actor_lets_go_of_the_ledger_after_each_message(east: Path) -> None:
    nodes = SitesApp((str(east),), fingerprint_code())
    joined = _ask(nodes, JoinRequest(proposal=read_study("demo").proposal()).record())
    assert JoinReply.read(joined.content).name == "east"
    with Ledger(east.parent / "state") as ledger:  # as another actor would
        assert ledger.head.count == 2


def test_an_actor_replies_with_a_public_word_and_logs_the_text(east: Path) -> None:
    nodes = SitesApp((str(east),), fingerprint_code())
    reply = _ask(nodes, RecordDict({"config": ConfigRecord({"doe": "jane"})}))
    assert reply.error.reason == "contract"
    assert "ERROR" in (east.parent / "state/logs/client.log").read_text()


def test_an_actor_with_other_code_does_nothing(east: Path) -> None:
    with pytest.raises(ImportError, match="other code"):
        _ask(SitesApp((str(east),), "0" * 64), RecordDict())
    assert not (east.parent / "state/logs").exists()


def test_a_machine_tells_which_site_files_it_cannot_read(east: Path) -> None:
    code, lacking = check_machine([str(east), "/nowhere/site.yaml"])
    assert code == fingerprint_code()
    assert lacking == ["/nowhere/site.yaml"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--ray-address", "127.0.0.1:6379"], "--ray-address goes with --engine ray"),
        (["--engine", "ray", "--ray-address", "127.0.0.1"], "is host:port"),
        (["--engine", "horse"], "'in-process', 'ray'"),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["utility", "study.yaml"], ["run", "--resume", "r"]])
def test_wrong_options_are_refused(
    command: list[str],
    options: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["consilium-simulate", *command, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_without_ray_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(ray, "version", missing)
    monkeypatch.setattr(sys, "argv", ["consilium-simulate", "run", "s.yaml", "--engine", "ray"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install --require-hashes -r constraints-ray.txt" in line


# --- with a cluster ---


@pytest.fixture(scope="module")
def decoy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packages of our names, which tell if anybody imports them."""
    folder = tmp_path_factory.mktemp("decoy")
    for package in ("common", "client", "server", "simulations"):
        (folder / package).mkdir()
        told = f"open({str(folder / 'imported')!r}, 'w').close()\n"
        (folder / package / "__init__.py").write_text(told)
    return folder


@pytest.fixture(scope="module")
def cluster(decoy: Path) -> Iterator[str]:
    """The address of a Ray cluster that somebody started in that very folder."""
    pytest.importorskip("ray", reason=NO_RAY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not pytest's own folder: names of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray-") as scratch:
        options = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
        options += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={scratch}"]
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", *options]
        environment = {**os.environ, "PYTHONPATH": str(decoy)}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started = subprocess.Popen(ray, cwd=decoy, env=environment, **quiet)  # type: ignore[call-overload]
        try:
            yield f"127.0.0.1:{port}"
        finally:
            started.terminate()
            started.wait(60)


def _command(
    folder: Path, *arguments: object, program: tuple[str, ...] = ("-P", "-c", MAIN)
) -> subprocess.CompletedProcess[str]:
    """Runs `consilium-simulate` in a folder, as a process of its own."""
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _run(phantoms: Path, out: Path, rounds: int = 3) -> list[object]:
    sites = [part for name in PHANTOMS for part in ("--site", phantoms / name)]
    study: list[object] = ["run", DEMO, "--set", f"train.rounds={rounds}"]
    return [*study, *sites, "--out", out, "--cache", out.parent / "cache"]


def _same(one: Path, other: Path) -> None:
    """Two run folders with the same parameters and figures, to the last bit."""
    for name in ("last.safetensors", "model.safetensors", "metrics.jsonl", "report.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.system
@pytest.mark.slow
def test_the_same_numbers_whatever_folder_it_all_starts_in(
    cluster: str, decoy: Path, phantoms: Path, tmp_path: Path
) -> None:
    plain = _command(tmp_path, *_run(phantoms, tmp_path / "plain"))
    assert plain.returncode == 0, plain.stderr
    options = ("--engine", "ray", "--ray-address", cluster)
    run = _command(decoy, *_run(phantoms, tmp_path / "there"), *options)
    assert run.returncode == 0, run.stderr
    _same(tmp_path / "there", tmp_path / "plain")
    assert not (decoy / "imported").exists()
    assert not run.stderr
    assert "ray" not in run.stdout.lower()


@pytest.mark.system
@pytest.mark.slow
def test_other_code_in_the_cluster_is_refused(cluster: str, phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "client").mkdir()
    (tmp_path / "client/__init__.py").write_text("raise SystemExit")
    # Ray puts the folder of the command's own script before everything else.
    script = tmp_path / "simulate.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{MAIN}\n")
    arguments = (*_run(phantoms, tmp_path / "run"), "--engine", "ray", "--ray-address", cluster)
    run = _command(tmp_path, *arguments, program=(str(script),))
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert "expected Consilium's own code, got another" in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


def _start(phantoms: Path, run: Path) -> subprocess.Popen[str]:
    """A run on Ray, as soon as its first round is finished."""
    command = [sys.executable, "-P", "-c", MAIN, *map(str, _run(phantoms, run, rounds=12))]
    started = subprocess.Popen(
        [*command, "--engine", "ray"],
        cwd=run.parent,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (run / "last.json").exists():
        assert started.poll() is None
        time.sleep(0.05)
    return started


@pytest.mark.system
@pytest.mark.slow
def test_interrupted_it_goes_on(phantoms: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason=NO_RAY)
    plain = _command(tmp_path, *_run(phantoms, tmp_path / "plain", rounds=12))
    assert plain.returncode == 0, plain.stderr
    run = tmp_path / "run"
    started = _start(phantoms, run)
    os.killpg(started.pid, signal.SIGINT)  # Ctrl-C reaches Ray's processes too
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130
    assert said.strip() == f"Stopped. Go on with: consilium-simulate run --resume {run}"
    again = _command(tmp_path, "run", "--resume", run, "--engine", "ray")
    assert again.returncode == 0, again.stderr
    assert "going on after round" in again.stdout
    _same(run, tmp_path / "plain")


@pytest.mark.system
@pytest.mark.slow
def test_a_killed_actor_ends_the_run(phantoms: Path, tmp_path: Path) -> None:
    """Else Flower would have hospital after hospital fail, and the average be of fewer."""
    pytest.importorskip("ray", reason=NO_RAY)
    started = _start(phantoms, tmp_path / "run")
    actors = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.read_bytes().startswith(b"ray::ClientAppActor")
    ]
    os.kill(actors[0], signal.SIGKILL)
    _, said = started.communicate(timeout=120)
    assert started.returncode == 1
    (line,) = said.splitlines()
    assert "Ray: expected actors that stay until the end, got one that was killed" in line


@pytest.mark.system
@pytest.mark.slow
def test_an_address_where_nobody_answers(phantoms: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason=NO_RAY)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        options = ("--engine", "ray", "--ray-address", f"127.0.0.1:{port}")
        began = time.monotonic()
        run = _command(tmp_path, *_run(phantoms, tmp_path / "run"), *options)
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert "expected a Ray cluster that answers" in line
    assert time.monotonic() - began < 90  # most of it imports, on a busy machine
