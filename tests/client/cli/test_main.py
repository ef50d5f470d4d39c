"""The hospital's command line: what it shows is so, and nothing goes without a yes."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from client.cli import main as cli
from client.features.store import Store
from tests.builders import ROOT, write_site

KEYS = [letter * 24 for letter in "ab"]

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    run_main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """Runs `consilium-client` in an empty folder, with what is typed: exit code, all it printed."""
    monkeypatch.chdir(tmp_path)
    return partial(run_main, cli.main)


@pytest.fixture(autouse=True)
def closed(tmp_path: Path) -> None:
    """The cache folder, closed to others whatever the umask."""
    (tmp_path / "prepared").mkdir(mode=0o700)


def cached(folder: Path, **limits: object) -> Path:
    """A site's file in `folder`, and its cache folder beside it."""
    return write_site(folder, cache={"folder": "prepared", **limits})


def fill(cache: Path) -> int:
    """Two stores, the first used longer ago; bytes of both."""
    for key, rows, when in zip(KEYS, (3, 1200), (1e9, 1.5e9), strict=True):
        store = Store(cache / key)
        store.use({"backbone": f"net-{key[0]}", "rows": "pixels"})
        store.add([f"{i}" for i in range(rows)], torch.zeros(rows, 1000, dtype=torch.uint8))
        os.utime(cache / key / "about.json", (when, when))
    return sum(path.stat().st_size for path in cache.rglob("*.*"))


def test_the_cache_is_shown_as_it_is(command: Command, tmp_path: Path) -> None:
    total = fill(tmp_path / "prepared")
    code, text = command("cache", cached(tmp_path, limit_gb=2, days=180))
    assert code == 0, text
    new, old = (next(x for x in text.splitlines() if f"net-{word}" in x) for word in "ba")
    assert text.index(new) < text.index(old)
    assert "backbone net-a, rows pixels" in old
    assert " 3 " in old
    assert "2001-09-0" in old
    assert " 1,200 " in new
    assert "1.2 MB" in new
    assert "2017-07-1" in new
    assert f"total {total / 1e6:.1f} MB of at most 2.0 GB in {tmp_path / 'prepared'}" in text
    assert "unused for 180 days, they go when a study opens next" in text


def test_an_empty_cache_without_limits(command: Command, tmp_path: Path) -> None:
    code, text = command("cache", cached(tmp_path))
    assert (code, text) == (0, f"total 0.0 kB in {tmp_path / 'prepared'}\n")


def test_a_description_steers_no_terminal(command: Command, tmp_path: Path) -> None:
    Store(tmp_path / "prepared" / KEYS[0]).use({"backbone": "[red]x\x1b[2J"})
    code, text = command("cache", cached(tmp_path))
    assert code == 0
    assert "[red]x\\x1b[2J" in text


@pytest.mark.parametrize(
    ("options", "typed", "code", "said"),
    [
        ((), "n\n", 1, "Nothing was deleted."),
        ((), "\n", 1, "Nothing was deleted."),
        ((), "", 130, "Stopped."),
        ((), "y\n", 0, "Deleted 1.2 MB."),
        (("--yes",), "", 0, "Deleted 1.2 MB."),
    ],
)
def test_a_purge_asks_first(
    options: tuple[str, ...], typed: str, code: int, said: str, command: Command, tmp_path: Path
) -> None:
    fill(tmp_path / "prepared")
    (tmp_path / "prepared/mine.txt").write_text("mine")
    found, text = command("purge", cached(tmp_path), *options, typed=typed)
    assert (found, said in text) == (code, True), text
    for word in ("net-a", "patient data", "makes them again", "Other sites whose cache.folder"):
        assert word in text
    left = {path.name for path in (tmp_path / "prepared").iterdir()}
    assert left == ({"mine.txt"} if code == 0 else {*KEYS, "mine.txt"})


def test_a_purge_of_a_private_cache_touches_nothing_else_in_state(
    command: Command, tmp_path: Path
) -> None:
    path = write_site(tmp_path)
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state/secret").write_bytes(b"x" * 32)
    (tmp_path / "state/cache").mkdir(mode=0o700)
    fill(tmp_path / "state/cache")
    code, text = command("purge", path, "--yes")
    assert code == 0, text
    assert "Other sites" not in text
    assert [path.name for path in (tmp_path / "state").rglob("*")] in (
        ["cache", "secret"],
        ["secret", "cache"],
    )
    assert "nothing to delete" in command("purge", path)[1]


@pytest.mark.parametrize("name", ["cache", "purge"])
def test_a_wrong_site_file_ends_in_a_line(name: str, command: Command, tmp_path: Path) -> None:
    code, text = command(name, tmp_path / "none.yaml")
    assert (code, text.count("\n")) == (1, 1)
    assert "none.yaml: expected a readable YAML file, got No such file" in text
    path = write_site(tmp_path, cache="/scratch")
    code, text = command(name, path)
    assert code == 1
    assert "Write cache: {folder: /scratch}." in text
    code, text = command(name)
    assert code == 2
    assert "Missing argument" in text


@pytest.mark.system
def test_it_runs_as_installed_and_teaches(tmp_path: Path) -> None:
    """In a process of its own, by the name that pyproject gives it."""
    code = "from importlib import import_module as i; import sys; m, f = sys.argv.pop(1).split(':')"
    wanted = 'consilium-client = "'
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    entry = next(line for line in lines if line.startswith(wanted)).removeprefix(wanted)[:-1]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; getattr(i(m), f)()", entry, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for word in (
        "cache",
        "purge",
        "init",
        "check",
        "start",
        "Begin with: consilium-client init site.yaml",
    ):
        assert word in done.stdout
