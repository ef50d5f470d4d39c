"""Rows come back as they went in, or are noticed and made again; whoever writes, none is lost."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from datetime import date

import pytest
import torch

from client.features import store as shelf
from client.features.store import Rows, Store, Stores
from common.errors import DataError
from tests.builders import ROOT
from tests.processes import limited

WRITER = """
import sys, time
from pathlib import Path
import torch
from client.features.store import Store

folder, name, shards = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = Store(folder)
(folder / f"{name}.ready").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
for i in range(shards):
    store.add([f"{name}/{i}"], torch.full((1, 3), float(i)))
store.add(["both"], torch.full((1, 3), 7.0))
"""

FORGETTER = """
import sys, time
from pathlib import Path
from client.features.store import Store

folder, word, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(folder / f"{word}.ready").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
assert Store(folder).forget([f"{word}{i}" for i in range(count)]) >= count
"""


def table(rows=4, seed=0):
    return torch.randn(rows, 2, 3, generator=torch.Generator().manual_seed(seed))


def names(rows=4, word="image"):
    return [f"{word}/{i}" for i in range(rows)]


def everything(rows):
    return rows[torch.arange(len(rows))]


def opened(folder):
    """What another process finds."""
    store = Store(folder)
    store.refresh()
    return store


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    "rows",
    [
        torch.arange(256, dtype=torch.uint8).reshape(4, 64),
        torch.tensor([[float("nan"), -0.0], [1e-42, float("inf")], [1 / 3, -1e38], [0.1, 0.2]]),
        table().half(),
        table().transpose(1, 2),
    ],
)
def test_rows_come_back_bit_for_bit(tmp_path, rows):
    Store(tmp_path / "s").add(names(), rows)
    found = everything(opened(tmp_path / "s").rows(names()))
    assert found.dtype == rows.dtype
    assert found.shape == rows.shape
    assert found.numpy().tobytes() == rows.contiguous().numpy().tobytes()


def test_rows_come_in_the_order_asked_for_from_several_shards(tmp_path):
    store = Store(tmp_path)
    store.add(names(4, "a"), table(4, 1))
    store.add(names(2, "b"), table(2, 2))
    rows = store.rows(["b/1", "a/3", "b/0"])
    assert len(rows) == 3
    wanted = torch.stack([table(2, 2)[1], table(4, 1)[3], table(2, 2)[0]])
    assert torch.equal(everything(rows), wanted)
    assert torch.equal(rows[torch.tensor([2, 0, 2])], wanted[[2, 0, 2]])
    joined = rows + store.rows(["a/0"])
    assert torch.equal(joined[torch.tensor([3, 0])], torch.stack([table(4, 1)[0], wanted[0]]))


def test_rows_in_memory_and_beyond_it_are_equal(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.add(names(5), table(5))
    near = store.rows(names(5))
    monkeypatch.setattr(shelf, "_IN_MEMORY", table(5).nbytes - 1)
    far = store.rows(names(5))
    assert near._memory is not None
    assert far._memory is None
    for indices in (torch.arange(5), torch.tensor([4, 0, 4]), torch.tensor([2])):
        assert torch.equal(near[indices], far[indices])
        assert torch.equal(far[indices], table(5)[indices])


def test_no_rows_are_no_error():
    assert len(Rows([])) == 0


def test_missing_gives_the_positions_without_a_row(tmp_path):
    store = Store(tmp_path)
    store.add(names(2), table(2))
    assert store.missing(["image/1", "new", "image/0", "newer"]) == [1, 3]


@pytest.mark.parametrize("damage", ["first byte", "header", "a value", "last byte", "cut", "empty"])
def test_a_damaged_shard_is_noticed_deleted_and_made_again(tmp_path, caplog, damage):
    store = Store(tmp_path)
    store.add(names(4, "kept"), table(4, 1))
    (kept,) = shards(tmp_path)
    store.add(names(4, "hurt"), table(4, 2))
    (hurt,) = set(shards(tmp_path)) - {kept}
    data = bytearray(hurt.read_bytes())
    if damage == "cut":
        del data[-5:]
    elif damage == "empty":
        data.clear()
    else:
        at = {"first byte": 0, "header": 20, "a value": -30, "last byte": -1}[damage]
        data[at] ^= 1
    hurt.write_bytes(data)

    with caplog.at_level(logging.WARNING):
        again = opened(tmp_path)
    assert hurt.name in caplog.text
    assert kept.name not in caplog.text
    assert shards(tmp_path) == [kept]
    assert again.missing(names(4, "hurt")) == [0, 1, 2, 3]
    assert torch.equal(everything(again.rows(names(4, "kept"))), table(4, 1))

    again.add(names(4, "hurt"), table(4, 2))
    assert torch.equal(everything(opened(tmp_path).rows(names(4, "hurt"))), table(4, 2))


def test_a_whole_shard_under_a_name_not_its_own_is_refused(tmp_path, caplog):
    store = Store(tmp_path)
    store.add(names(), table())
    (shard,) = shards(tmp_path)
    shard.rename(tmp_path / f"{'0' * 64}.safetensors")
    assert opened(tmp_path).missing(names()) == [0, 1, 2, 3]


def test_a_half_written_shard_is_not_there_yet(tmp_path, caplog):
    Store(tmp_path).add(names(), table())
    (shard,) = shards(tmp_path)
    part = tmp_path / f".{shard.name}.12345678.part"
    part.write_bytes(shard.read_bytes()[:40])
    shard.unlink()
    with caplog.at_level(logging.WARNING):
        store = opened(tmp_path)
    assert store.missing(names()) == [0, 1, 2, 3]
    assert not caplog.records
    assert part.exists()  # another process may still be writing it


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ)


def writer(folder, name, count):
    return run(WRITER, folder, name, count)


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.system
def test_processes_writing_at_once_lose_nothing_and_one_killed_leaves_no_wreck(tmp_path, caplog):
    Store(tmp_path)
    running = {name: writer(tmp_path, name, 25) for name in ("a", "b")}
    killed = writer(tmp_path, "killed", 10**6)
    until(lambda: len(list(tmp_path.glob("*.ready"))) == 3)
    (tmp_path / "go").touch()
    assert [process.wait(60) for process in running.values()] == [0, 0]
    killed.kill()
    killed.wait(60)

    with caplog.at_level(logging.WARNING):
        store = opened(tmp_path)
    assert not caplog.records
    for name in running:
        values = everything(store.rows([f"{name}/{i}" for i in range(25)]))
        assert torch.equal(values, torch.arange(25.0)[:, None].expand(25, 3))
    assert torch.equal(everything(store.rows(["both"])), torch.full((1, 3), 7.0))
    assert store.missing(["killed/0"]) == []


def test_a_store_sees_what_another_wrote_after_it_opened(tmp_path):
    ours, theirs = Store(tmp_path), Store(tmp_path)
    theirs.add(names(), table())
    assert ours.missing(names()) == [0, 1, 2, 3]
    ours.refresh()
    assert torch.equal(everything(ours.rows(names())), table())


def test_only_this_user_can_read_it(tmp_path):
    before = os.umask(0)
    try:
        Store(tmp_path / "s").add(names(), table())
    finally:
        os.umask(before)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700
    assert len(list((tmp_path / "s").iterdir())) == 2
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "s").iterdir()] == [0o600] * 2


def test_virtual_sites_of_one_process_share_a_store(tmp_path):
    stores = Stores()
    assert stores.open(tmp_path, {}) is stores.open(tmp_path, {})
    assert stores.open(tmp_path, {}) is not stores.open(tmp_path / "other", {})


def test_a_shard_that_cannot_be_opened_now_is_kept(tmp_path):
    Store(tmp_path).add(names(), table())
    store, (shard,) = Store(tmp_path), shards(tmp_path)
    wanted = pytest.raises(OSError, match="Too many open files")
    with limited(resource.RLIMIT_NOFILE, 3), wanted:
        store._open(shard)
    store.refresh()
    assert torch.equal(everything(store.rows(names())), table())


def test_what_cannot_be_opened_is_said_in_a_line_and_not_deleted(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(DataError, match=r"a place to read and write, got .*Is a directory"):
        Store(tmp_path).refresh()
    assert shards(tmp_path)


def test_a_file_where_the_folder_should_be_is_said_in_a_line(tmp_path):
    (tmp_path / "s").write_text("mine")
    for use in (lambda store: store.use({}), lambda store: store.add(names(), table())):
        with pytest.raises(DataError, match=r"a place to read and write, got .*File exists"):
            use(Store(tmp_path / "s"))


def test_a_full_disk_is_said_in_a_line_and_keeps_what_is_finished(tmp_path):
    store = Store(tmp_path)
    store.add(names(4, "kept"), table(4, 1))
    wanted = pytest.raises(DataError, match=r"Free space .*what is finished is kept\.$")
    with limited(resource.RLIMIT_FSIZE, 20), wanted as caught:
        store.add(names(), table())
    assert "\n" not in str(caught.value)
    assert len(shards(tmp_path)) == 1
    assert not list(tmp_path.glob("*.part"))
    assert opened(tmp_path).missing(names(4, "kept")) == []


# --- what it says of itself ---


def test_it_says_once_what_it_holds_and_always_when_it_was_used(tmp_path):
    folder = tmp_path / "cache" / "s"
    stores = Stores()
    stores.open(folder, {"backbone": "squeezenet1_0", "rows": "pixels"})
    about = folder / "about.json"
    told = json.loads(about.read_text())
    assert told == {"backbone": "squeezenet1_0", "rows": "pixels", "created": told["created"]}
    assert date.fromisoformat(told["created"]) <= date.today()
    os.utime(about, (1e9, 1e9))
    stores.open(folder, {"backbone": "another"})  # the same object, and used again
    assert time.time() - about.stat().st_mtime < 60
    assert json.loads(about.read_text()) == told


def test_a_store_deleted_under_a_process_is_made_anew_by_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "_IN_MEMORY", 0)  # so that rows are read from the deleted files
    store = Stores().open(tmp_path / "s", {"backbone": "squeezenet1_0"})
    store.add(names(), table())
    rows = store.rows(names())
    shutil.rmtree(tmp_path / "s")
    assert torch.equal(everything(rows), table())
    store.add(names(2, "new"), table(2, 2))
    found = opened(tmp_path / "s")
    assert torch.equal(everything(found.rows(names(2, "new"))), table(2, 2))
    assert found.missing(names()) == [0, 1, 2, 3]
    assert json.loads((tmp_path / "s/about.json").read_text())["backbone"] == "squeezenet1_0"


# --- forgetting ---


def in_any_file(folder, what):
    return [path for path in folder.rglob("*") if path.is_file() and what in path.read_bytes()]


def test_what_is_forgotten_is_in_no_file_and_all_else_is_as_it_was(tmp_path):
    store = Store(tmp_path)
    values = table(6)
    store.add(["a", "b", "a/flip/1"], values[:3])
    store.add(["ab", "a/flip+crop/2"], values[3:5])
    store.add(["a/flip/3"], values[5:])
    untouched = Store(tmp_path)
    untouched.add(["c"], table(1, 9))
    part = tmp_path / f".{'0' * 64}.safetensors.12345678.part"
    part.write_bytes(shards(tmp_path)[0].read_bytes())
    kept = {row: values[row].numpy().tobytes() for row in (1, 3)}
    gone = {row: values[row].numpy().tobytes() for row in (0, 2, 4, 5)}
    assert all(in_any_file(tmp_path, data) for data in (*kept.values(), *gone.values()))

    assert store.forget(["a", "unknown"]) == 4
    assert [in_any_file(tmp_path, data) for data in gone.values()] == [[]] * 4
    assert in_any_file(tmp_path, b"a/flip") == []
    assert store.missing(["a", "b", "a/flip/1", "ab", "c"]) == [0, 2]
    again = opened(tmp_path)
    assert again.missing(["a", "b", "a/flip/1", "ab", "a/flip+crop/2", "a/flip/3"]) == [0, 2, 4, 5]
    assert torch.equal(everything(again.rows(["b", "ab"])), values[[1, 3]])
    assert torch.equal(everything(again.rows(["c"])), table(1, 9))
    assert len(shards(tmp_path)) == 3
    assert store.forget(["a"]) == 0


def test_forgetting_takes_up_where_it_was_interrupted(tmp_path):
    store = Store(tmp_path)
    store.add(names(), table())
    (before,) = shards(tmp_path)
    data = before.read_bytes()
    store.forget(["image/2"])
    before.write_bytes(data)  # as if killed once the new shard was there, the old one not yet gone
    assert store.forget(["image/2"]) == 1
    assert in_any_file(tmp_path, table()[2].numpy().tobytes()) == []
    rest = ["image/0", "image/1", "image/3"]
    assert torch.equal(everything(opened(tmp_path).rows(rest)), table()[[0, 1, 3]])


def test_a_damaged_shard_that_may_hold_what_is_forgotten_goes(tmp_path):
    Store(tmp_path).add(names(), table())
    (shard,) = shards(tmp_path)
    shard.write_bytes(shard.read_bytes().replace(b"image/2", b"imago/2"))
    Store(tmp_path).forget(["image/2"])
    assert shards(tmp_path) == []


def test_a_shard_that_another_rewrote_first_is_not_put_back(tmp_path):
    class Late(Store):
        def _write(self, names, rows):
            if len(names) == 3 and "image/1" in names:  # another process, between read and write
                Store(tmp_path).forget(["image/1"])
            return super()._write(names, rows)

    Store(tmp_path).add(names(), table())
    Late(tmp_path).forget(["image/0"])
    assert [in_any_file(tmp_path, table()[i].numpy().tobytes()) for i in (0, 1)] == [[], []]
    left = opened(tmp_path)
    assert torch.equal(everything(left.rows(["image/2", "image/3"])), table()[2:])


@pytest.mark.system
def test_processes_forgetting_at_once_put_nothing_back(tmp_path):
    store = Store(tmp_path)
    for i in range(20):
        store.add([f"a{i}", f"b{i}", f"c{i}"], table(3, i))
    words = ("a", "b")
    running = [run(FORGETTER, tmp_path, word, 20) for word in words]
    until(lambda: all((tmp_path / f"{word}.ready").exists() for word in words))
    (tmp_path / "go").touch()
    assert [process.wait(60) for process in running] == [0, 0]
    for i in range(20):
        for row in (0, 1):
            assert in_any_file(tmp_path, table(3, i)[row].numpy().tobytes()) == []
    left = opened(tmp_path)
    for i in range(20):  # never damaged; at worst made again
        if not left.missing([f"c{i}"]):
            assert torch.equal(everything(left.rows([f"c{i}"])), table(3, i)[2:])
