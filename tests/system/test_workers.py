"""SitesApp in worker processes: the same results, the same errors, and nobody left behind."""

import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from threading import Thread

import pytest

from common import errors
from common.config.study import Study
from common.errors import ConsiliumError, DataError, RunError
from simulations.cli.main import main
from simulations.engines.base import Engine, InProcess
from simulations.engines.workers import Workers
from simulations.sites import virtual_sites
from tests.builders import DEMO, PHANTOMS, ROOT, create_run, read_study

pytestmark = pytest.mark.numbers

SAME = ("last.safetensors", "model.safetensors", "metrics.jsonl", "report.json")


@pytest.fixture(scope="module")
def crew() -> Iterator[Workers]:
    """Up to three workers, to be used by one test after the other."""
    workers = Workers(3)
    yield workers
    workers.close()


def create_demo(folder: Path, places: list[Path], rounds: int = 3) -> tuple[Study, list[Path]]:
    """A run that has just begun, with a cache of its own."""
    study = read_study("demo", f"train.rounds={rounds}")
    found = [virtual_sites.find_site(place) for place in places]
    return study, create_run(found, study, folder, folder / "cache")


def run(engine: Engine, folder: Path, phantoms: Path, rounds: int = 3) -> dict[str, bytes]:
    """What a whole run ends with."""
    study, site_files = create_demo(folder, [phantoms / name for name in PHANTOMS], rounds)
    engine.prepare(site_files, study)
    engine.run(site_files, folder)
    return end(folder)


def end(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SAME}


@pytest.fixture(scope="module")
def alone(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What three rounds end with in one process, on one thread."""
    return run(InProcess(), tmp_path_factory.mktemp("alone") / "run", phantoms, rounds=3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_however_many_workers_end_the_same(
    count: int,
    crew: Workers,
    alone: dict[str, bytes],
    phantoms: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    crew._count = count
    with caplog.at_level(logging.INFO):
        assert run(crew, tmp_path / "run", phantoms, rounds=3) == alone
    assert len(active_children()) == count
    assert {
        r.getMessage() for r in caplog.records if r.name == "simulations.sites.virtual_sites"
    } == {*PHANTOMS}
    for name in PHANTOMS:  # this process never opened them
        assert (tmp_path / "run/sites" / name / "state/ledger.jsonl").exists()
    crew.forget()


def test_a_killed_worker_ends_the_run_and_loses_nothing(
    crew: Workers, alone: dict[str, bytes], phantoms: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"

    def kill() -> None:
        until(lambda: (folder / "last.safetensors").exists())
        os.kill(active_children()[-1].pid or 0, signal.SIGKILL)

    Thread(target=kill).start()
    with pytest.raises(RunError, match=rf"one that was killed. --resume {folder}, with fewer --w"):
        run(crew, folder, phantoms, rounds=3)
    assert not active_children()
    assert not (folder / "report.json").exists()
    crew._count = 1
    crew.run(virtual_sites.find_site_files(folder), folder)
    assert end(folder) == alone


def test_an_image_problem_is_the_same_error(crew: Workers, phantoms: Path, tmp_path: Path) -> None:
    hospital = Path(shutil.copytree(phantoms / "west", tmp_path / "west"))
    next((hospital / "images").iterdir()).write_bytes(b"not an image")
    study, site_files = create_demo(tmp_path / "run", [hospital])
    told = []
    for engine in (InProcess(), crew):
        with pytest.raises(DataError, match="cannot be read") as error:
            engine.prepare(site_files, study)
        told.append(re.sub("0x[0-9a-f]+", "", str(error.value)))
    assert told[0] == told[1]
    assert not active_children()  # what others were still at is not wanted any more


def test_every_error_of_ours_can_travel() -> None:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in (kind for kind in found if issubclass(kind, ConsiliumError)):
        again = pickle.loads(pickle.dumps(kind("where: expected …")))  # noqa: S301
        assert (type(again), str(again)) == (kind, "where: expected …")


@pytest.mark.parametrize("count", ["0", "-1", "129", "many"])
def test_impossible_numbers_of_workers(
    count: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["consilium-simulate", "run", "--workers", count])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--workers" in capsys.readouterr().err


def test_ctrl_c_ends_all_in_one_line(phantoms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sites = [part for name in PHANTOMS for part in ("--site", phantoms / name)]
    options = ["--set", "train.rounds=10000", "--cache", tmp_path / "cache", "--workers", 2]
    code = "from simulations.cli.main import main; main()"
    arguments = ["run", DEMO, *sites, *options, "--out", folder]
    process, workers = popen(code, *arguments)
    until(lambda: (folder / "last.safetensors").exists())
    left = workers()
    assert len(left) == 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip() == f"Stopped. Go on with: consilium-simulate run --resume {folder}"
    until(lambda: not any(map(alive, left)))


def test_workers_go_with_the_process_that_started_them() -> None:
    """Even with SIGKILL, and in the middle of long work."""
    code = (
        "from pathlib import Path; from simulations.engines.workers import Workers; "
        "from tests.processes import sleep; "
        "w = Workers(1); w._shared([Path()]); w.forget(); print('up', flush=True); "
        "w._do([[(sleep, 600)]], '')"
    )
    process, workers = popen(code)
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    until(lambda: len(workers()) == 1)  # on a busy machine it is not there at once
    left = workers()
    time.sleep(0.5)
    process.kill()
    process.communicate()
    until(lambda: not any(map(alive, left)))


def popen(code: str, *arguments: object) -> tuple[subprocess.Popen[str], Callable[[], list[int]]]:
    """A process in a group of its own, and how to find its workers."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def workers() -> list[int]:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [
            int(pid)
            for pid in children
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    return process, workers


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def until(what: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)
