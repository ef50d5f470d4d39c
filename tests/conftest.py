"""What every test may use: one torch thread, the shared test data, four small phantom hospitals."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from common.support.terminal import console
from simulations.sites import phantom
from tests.builders import RUNTIME


def pytest_configure() -> None:
    # Small networks: more threads only make the suite slower, and its figures vary.
    torch.set_num_threads(1)
    # Behind `nohup` or in a job of a script SIGINT is ignored, also by every process started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Workers of a parallel run have 80 columns by their environment; alone there are more.
    os.environ.pop("COLUMNS", None)
    console.width = 140


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.parent.name == "system":
        item.add_marker("system")


def pytest_report_header() -> str:
    return f"computes as on a CPU with: {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture(autouse=True)
def _own_umask() -> Iterator[None]:
    """The commands of a hospital set the process's: no other test may depend on who ran before."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and weights that the repository does not hold."""
    default = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("CONSILIUM_TEST_DATA", default))
    if not all((folder / part).is_dir() for part in ("data", "weights")):
        pytest.skip(f"no test data at {folder}; set CONSILIUM_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hospitals, one folder each, with 40 phantom patients between them."""
    folder = tmp_path_factory.mktemp("phantoms")
    phantom.write_phantoms(folder, patients=40)
    return folder


@pytest.fixture
def new_process() -> Iterator[Callable[[], None]]:
    """From each call on as in another process: no site is open, no session is loaded."""

    def begin() -> None:
        RUNTIME.close()

    yield begin
    begin()


@pytest.fixture
def run_main(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    """Runs a command line here, with its arguments and what is typed: exit code, all it printed."""

    def run(main: Callable[[], None], *arguments: object, typed: str = "") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["consilium", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out + err

    return run
