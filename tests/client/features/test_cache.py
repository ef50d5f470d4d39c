"""Prepared images go when room or time is up, or when asked: whole stores, only ours, never in use.

Every folder and process here is real.
"""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from client.features.cache import forget_rows, list_stores, prune_stores, purge_stores
from client.features.store import Store
from common.errors import DataError
from tests.builders import ROOT

pytestmark = pytest.mark.numbers

DAY = 86400
KEYS = [letter * 24 for letter in "abcdef"]

READER = """
import sys
from pathlib import Path
import torch
from client.features import store as shelf

shelf._IN_MEMORY = 0
store = shelf.Store(Path(sys.argv[1]))
store.refresh()
rows = store.rows(["0", "1", "2"])
print("open", flush=True)
sys.stdin.readline()
assert torch.equal(rows[torch.arange(3)], torch.arange(3.0)[:, None].expand(3, 1000))
store.use({"kind": "reader"})
store.add(["3"], torch.full((1, 1000), 3.0))
"""

WRITER = """
import sys
from pathlib import Path
import torch
from client.features.store import Stores

cache, key = Path(sys.argv[1]), sys.argv[2]
print("open", flush=True)
stores = Stores()
for i in range(int(sys.argv[3])):
    store = stores.open(cache / key, {"kind": "writer"})
    store.refresh()
    store.add([f"{i}"], torch.full((1, 10), float(i)))
    assert store.missing([f"{j}" for j in range(i + 1)]) == []
store.add(["last"], torch.full((1, 10), -1.0))
"""


def make(cache, key, *, days=0, rows=3, **about):
    """A store last used so many days ago; its size in bytes."""
    store = Store(cache / key)
    store.use(about)
    store.add([f"{i}" for i in range(rows)], torch.arange(float(rows))[:, None].expand(rows, 1000))
    used(cache / key, days)
    return sum(path.stat().st_size for path in (cache / key).iterdir())


def used(folder, days):
    when = time.time() - days * DAY
    os.utime(folder / "about.json", (when, when))


def keys(cache):
    return sorted(path.name for path in cache.iterdir())


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_stores_are_listed_with_what_they_say_the_one_used_longest_ago_first(tmp_path):
    make(tmp_path, KEYS[0], rows=5, backbone="squeezenet1_0")
    Store(tmp_path / KEYS[0]).add(["more", "rows"], torch.zeros(2, 3))
    used(tmp_path / KEYS[0], days=2)
    bytes_of = {KEYS[1]: make(tmp_path, KEYS[1], days=9, rows=1), KEYS[2]: make(tmp_path, KEYS[2])}
    found = list_stores(tmp_path)
    assert [kept.folder for kept in found] == [tmp_path / KEYS[i] for i in (1, 0, 2)]
    assert [kept.rows for kept in found] == [1, 7, 3]
    assert [kept.bytes for kept in found if kept.folder.name != KEYS[0]] == list(bytes_of.values())
    assert found[1].about["backbone"] == "squeezenet1_0"
    assert [round((time.time() - kept.used.timestamp()) / DAY) for kept in found] == [9, 2, 0]
    assert list_stores(tmp_path / "none") == []


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[1]", b"[" * 100_000, b'{"a": {"b": 1}}'])
def test_a_spoilt_description_spoils_no_listing(tmp_path, content):
    size = make(tmp_path, KEYS[0])
    about = tmp_path / KEYS[0] / "about.json"
    size += len(content) - about.stat().st_size
    about.write_bytes(content)
    (kept,) = list_stores(tmp_path)
    assert (kept.rows, kept.bytes) == (3, size)
    assert all(isinstance(value, str) for value in kept.about.values())


def test_a_store_from_before_there_were_descriptions_is_one_too(tmp_path):
    make(tmp_path, KEYS[0])
    (tmp_path / KEYS[0] / "about.json").unlink()
    (kept,) = list_stores(tmp_path)
    assert (kept.rows, dict(kept.about)) == (3, {})
    assert time.time() - kept.used.timestamp() < 60


# --- pruning ---


def test_beyond_the_limit_those_used_longest_ago_go_and_no_more(tmp_path):
    order = [3, 0, 2, 1]  # the last used last
    sizes = [make(tmp_path, KEYS[i], days=10 - n, rows=n + 1) for n, i in enumerate(order)]
    assert prune_stores(tmp_path, limit=sum(sizes), days=None) == []
    gone = prune_stores(tmp_path, limit=sum(sizes) - sizes[0] - 1, days=None)
    assert [kept.folder.name for kept in gone] == [KEYS[3], KEYS[0]]
    assert keys(tmp_path) == [KEYS[1], KEYS[2]]


def test_those_unused_for_too_long_go(tmp_path):
    for key, days in zip(KEYS, (0, 29.9, 30.1, 400), strict=False):
        make(tmp_path, key, days=days)
    assert prune_stores(tmp_path, limit=None, days=None) == []
    assert len(prune_stores(tmp_path, limit=None, days=30)) == 2
    assert keys(tmp_path) == KEYS[:2]


def test_those_in_use_stay_whatever_they_take(tmp_path, monkeypatch, caplog):
    make(tmp_path, KEYS[0], days=400)
    make(tmp_path, KEYS[1], days=1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with caplog.at_level(logging.WARNING):
        prune_stores(tmp_path / "link", limit=1, days=30, keep={Path(KEYS[0])})
    assert keys(tmp_path) == [KEYS[0], "link"]
    assert "more than the 0.0 kB that cache.limit_gb allows" in caplog.text


def test_what_was_left_half_written_goes_after_a_day(tmp_path):
    make(tmp_path, KEYS[0])
    old, new, other = (
        tmp_path / KEYS[0] / name
        for name in (
            f".{'0' * 64}.safetensors.12345678.part",
            f".{'1' * 64}.safetensors.12345678.part",
            "mine.part",
        )
    )
    for path in (old, new, other):
        path.write_bytes(b"rows")
    for path in (old, other):
        os.utime(path, (time.time() - DAY - 60,) * 2)
    assert prune_stores(tmp_path, limit=None, days=None) == []
    assert not old.exists()
    assert new.exists()
    assert other.exists()
    assert list_stores(tmp_path)[0].rows == 3


def test_a_store_that_cannot_be_deleted_stops_no_study_but_a_purge(tmp_path, caplog):
    for key in KEYS[:2]:
        make(tmp_path, key, days=400)
    stuck = tmp_path / KEYS[0] / f"{'0' * 64}.safetensors"
    stuck.mkdir()
    with caplog.at_level(logging.WARNING):
        gone = prune_stores(tmp_path, limit=None, days=30)
    assert [kept.folder.name for kept in gone] == [KEYS[1]]
    assert stuck.name in caplog.text
    with pytest.raises(DataError, match="a place to read and write"):
        purge_stores(tmp_path)


# --- purging ---


def test_a_purge_deletes_all_that_is_ours_and_nothing_else(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    cache = tmp_path / "cache"
    make(elsewhere, KEYS[5])
    for key in KEYS[:2]:
        make(cache, key)
    make(cache, "models")  # not a store's name
    make(cache, KEYS[2].upper())
    (cache / KEYS[1] / f".{'0' * 64}.safetensors.12345678.part").write_bytes(b"rows")
    (cache / KEYS[1] / "thesis.docx").write_text("mine")
    (cache / KEYS[1] / "weights.safetensors").write_text("mine")
    (cache / KEYS[3]).mkdir()
    (cache / KEYS[3] / "notes.txt").write_text("mine")
    (cache / KEYS[4]).write_text("a file")
    (cache / KEYS[5]).symlink_to(elsewhere / KEYS[5])
    (cache / "notes.json").write_text("{}")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}

    assert [kept.folder.name for kept in purge_stores(cache)] == KEYS[:2]
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.parent.name for path in before - after} == set(KEYS[:2])
    assert not (cache / KEYS[0]).exists()
    assert sorted(path.name for path in (cache / KEYS[1]).iterdir()) == [
        "thesis.docx",
        "weights.safetensors",
    ]
    assert list_stores(elsewhere)[0].rows == 3
    assert list_stores(cache) == []
    assert purge_stores(cache) == []
    assert purge_stores(tmp_path / "none") == []


@pytest.mark.system
def test_who_has_a_store_open_reads_on_and_makes_it_anew(tmp_path):
    make(tmp_path, KEYS[0])
    reader = start(READER, tmp_path / KEYS[0])
    assert reader.stdout.readline() == "open\n"
    assert len(purge_stores(tmp_path)) == 1
    assert keys(tmp_path) == []
    reader.communicate("go on\n", timeout=60)
    assert reader.returncode == 0
    (kept,) = list_stores(tmp_path)
    assert (kept.rows, kept.about["kind"]) == (1, "reader")


@pytest.mark.system
def test_who_writes_while_others_delete_never_fails(tmp_path):
    writers = [start(WRITER, tmp_path, KEYS[0], 40) for _ in range(2)]
    assert [writer.stdout.readline() for writer in writers] == ["open\n"] * 2
    deleted = 0
    while any(writer.poll() is None for writer in writers):
        deleted += len(purge_stores(tmp_path)) + len(prune_stores(tmp_path, limit=0, days=None))
        time.sleep(0.01)
    assert [writer.communicate(timeout=60) and writer.returncode for writer in writers] == [0, 0]
    assert deleted > 5
    make(tmp_path, KEYS[0])
    again = Store(tmp_path / KEYS[0])
    again.refresh()
    assert again.missing(["0", "1", "2"]) == []


# --- forgetting ---


def test_a_patient_is_forgotten_in_every_store(tmp_path):
    for i, key in enumerate(KEYS[:3]):
        Store(tmp_path / key).add(
            ["lovelace", "lovelace/flip/1", "bob"], torch.full((3, 4), 7.0 + i)
        )
    assert forget_rows(tmp_path, ["lovelace"]) == 6
    for i, key in enumerate(KEYS[:3]):
        store = Store(tmp_path / key)
        store.refresh()
        assert store.missing(["lovelace", "bob", "lovelace/flip/1"]) == [0, 2]
        assert torch.equal(store.rows(["bob"])[torch.tensor([0])], torch.full((1, 4), 7.0 + i))
    assert not [path for path in tmp_path.rglob("*.*") if b"lovelace" in path.read_bytes()]
    assert forget_rows(tmp_path / "none", ["lovelace"]) == 0
