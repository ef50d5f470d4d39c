"""The ledger keeps what was written, counts it once, and notices whatever was done to it since."""

import hashlib
import hmac
import json
import logging
import os
import resource
from contextlib import suppress

import pytest

from client.ledger.adoption import adopt_ledger
from client.ledger.chain import Chain
from client.ledger.entries import Contents, Release, find_adopted, list_events
from client.ledger.ledger import Ledger, read_ledger
from client.ledger.place import describe_place
from client.privacy.accountant import DpEvent
from client.privacy.parameters import PrivateRelease
from common.errors import SiteError
from tests.processes import another, limited

STUDY, OTHER = "1" * 16, "2" * 16
PRIVACY = PrivateRelease(
    mechanism="dp_sgd",
    noise_multiplier=1.25,
    sample_rate=0.0625,
    steps=16,
    delta=1e-5,
    clip_norm=1.0,
)
SPENT = DpEvent(1.25, 0.0625, 16)
CONTENTS = Contents(
    tensors={"head.weight": (7, 512), "head.bias": (7,)},
    metrics=("loss", "counts"),
    bytes=14_364,
    sha256="c" * 64,
)


def a_round(number=1, *, study=STUDY, private=True, received="a" * 64):
    return Release(
        study=study,
        name="skin",
        kind="round",
        round=number,
        received=received,
        privacy=PRIVACY if private else None,
    )


def fill(folder):
    """A ledger of six lines: created, one private round of three lines, two plain ones."""
    with Ledger(folder) as ledger:
        ledger.reserve(a_round())
        ledger.seal(a_round(), CONTENTS)
        ledger.send(a_round(), CONTENTS)
        for number in (2, 3):
            ledger.send(a_round(number, private=False), CONTENTS)
    return folder / "ledger.jsonl"


def spent(folder):
    return len(list_events(read_ledger(folder)))


def lag(folder, count=1):
    """A head as an earlier moment left it."""
    chain, path = Chain.of(folder), folder / "ledger.jsonl"
    last = json.loads(path.read_bytes().split(b"\n")[count - 1])["hash"]
    put(folder / "ledger.head", chain.make_head(count, last, describe_place(path)))


def put(path, content):
    """Write a new file: cutting an old one short would wait for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@pytest.fixture
def quick(monkeypatch):
    """Nothing here depends on what outlives a power cut."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def refused(folder, match="consilium-client ledger-adopt"):
    with pytest.raises(SiteError, match=match):
        Ledger(folder)
    with pytest.raises(SiteError, match=match):
        read_ledger(folder)


# --- what it keeps ---


def test_each_line_ends_in_a_mac_under_the_sites_secret(tmp_path):
    path = fill(tmp_path / "state")
    secret = (path.parent / "secret").read_bytes()
    key, before, nonces = hmac.digest(secret, b"ledger", hashlib.sha256), "0" * 64, set()
    for n, line in enumerate(path.read_text().splitlines(), 1):
        entry, covered = json.loads(line), line[: line.index(', "hash": ')]
        assert (entry["n"], entry["previous"]) == (n, before)
        own = hmac.digest(key, b"line:" + covered.encode(), hashlib.sha256).hex()
        assert entry["hash"] == own
        before = own
        nonces.add(entry["nonce"])
    assert len(nonces) == 6


def test_a_line_says_what_left_and_how_it_was_protected(tmp_path):
    lines = [json.loads(line) for line in fill(tmp_path / "state").read_text().splitlines()]
    states = ["created", "reserved", "sealed", "sent", "sent", "sent"]
    assert [line["state"] for line in lines] == states
    assert lines[1]["release"] == a_round().model_dump(mode="json")
    assert lines[1]["key"] == lines[2]["key"] == lines[3]["key"] == a_round().key
    assert lines[2]["contents"] == lines[3]["contents"] == CONTENTS.model_dump(mode="json")
    assert lines[4]["release"]["privacy"] is None
    assert [entry.state for entry in read_ledger(tmp_path / "state")] == states


@pytest.mark.parametrize(
    "change",
    [
        {"study": OTHER},
        {"kind": "final"},
        {"round": 2},
        {"received": "b" * 64},
        {"privacy": None},
        *({"privacy": {"steps": 17}}, {"privacy": {"delta": 1e-6}}, {"privacy": {"clip_norm": 2}}),
        *({"privacy": {"noise_multiplier": 1.5}}, {"privacy": {"sample_rate": 0.5}}),
    ],
)
def test_whatever_differs_is_another_release(change):
    if change.get("privacy"):
        change = {"privacy": PRIVACY.model_copy(update=change["privacy"])}
    assert a_round().model_copy(update=change).key != a_round().key
    assert a_round().model_copy().key == a_round().key


def test_each_reservation_counts_once_sealed_or_not_in_every_study(tmp_path):
    with Ledger(tmp_path) as ledger:
        assert list_events(ledger.spending) == ()
        ledger.reserve(a_round(1))
        ledger.seal(a_round(1), CONTENTS)
        for _ in range(3):
            ledger.send(a_round(1), CONTENTS)
        ledger.reserve(a_round(2))
        ledger.reserve(a_round(2))
        ledger.reserve(a_round(1, study=OTHER))
        ledger.send(a_round(9, private=False), CONTENTS)
        assert list_events(ledger.spending) == (SPENT,) * 4
    with Ledger(tmp_path) as ledger:
        assert list_events(ledger.spending) == list_events(read_ledger(tmp_path)) == (SPENT,) * 4
        assert list_events(ledger.spending, STUDY) == (SPENT,) * 3
        assert list_events(ledger.spending, OTHER) == (SPENT,)
        assert list_events(ledger.spending, "3" * 16) == ()
        assert ledger.sealed(a_round(1)) == CONTENTS
        assert ledger.sealed(a_round(2)) is None


def test_a_private_reply_leaves_only_after_it_was_reserved_and_sealed(tmp_path):
    with Ledger(tmp_path) as ledger:
        with pytest.raises(KeyError):
            ledger.seal(a_round(), CONTENTS)
        ledger.reserve(a_round())
        with pytest.raises(ValueError, match="sealed"):
            ledger.send(a_round(), CONTENTS)
        ledger.seal(a_round(), CONTENTS)
        with pytest.raises(ValueError, match="sealed"):
            ledger.send(a_round(), CONTENTS.model_copy(update={"sha256": "d" * 64}))
        with pytest.raises(KeyError):
            ledger.seal(a_round(), CONTENTS)


def test_a_reservation_of_a_killed_process_is_not_sealed_by_the_next(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.reserve(a_round())
    with Ledger(tmp_path) as ledger, pytest.raises(KeyError):
        ledger.seal(a_round(), CONTENTS)


def test_only_this_user_can_read_it(tmp_path):
    before = os.umask(0)
    try:
        fill(tmp_path / "state")
    finally:
        os.umask(before)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()} == {0o600}


def test_a_plain_release_costs_one_fsync(tmp_path, monkeypatch):
    with Ledger(tmp_path) as ledger:
        calls, fsync = [], os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: (calls.append(file), fsync(file)))
        for number in range(1, 11):
            ledger.send(a_round(number, private=False), CONTENTS)
    assert len(calls) == 10


def test_head_and_hash_at_let_a_server_notice_a_rollback(tmp_path):
    lines = fill(tmp_path).read_text().splitlines()
    with Ledger(tmp_path) as ledger:
        assert (ledger.head.count, ledger.head.hash) == (6, json.loads(lines[-1])["hash"])
        hashes = [json.loads(line)["hash"] for line in lines]
        assert [ledger.hash_at(n) for n in range(-1, 9)] == [None, None, *hashes, None, None]
    assert len(set(hashes)) == 6


# --- one process at a time ---


@pytest.mark.system
def test_a_second_process_is_refused_but_may_read(tmp_path):
    def work():
        ledger = Ledger(tmp_path)
        ledger.reserve(a_round())
        return ledger

    with another(work):
        for attempt in (lambda: Ledger(tmp_path), lambda: adopt_ledger(tmp_path, 1.0, 0.0)):
            with pytest.raises(SiteError, match=r"one process at a time, got another"):
                attempt()
        assert spent(tmp_path) == 1
    with Ledger(tmp_path) as ledger:
        assert list_events(ledger.spending) == (SPENT,)
        with pytest.raises(SiteError, match="one process at a time"):
            Ledger(tmp_path)


def test_a_closed_ledger_writes_nothing(tmp_path):
    with Ledger(tmp_path) as ledger:
        pass
    with pytest.raises(SiteError):
        ledger.reserve(a_round())
    assert spent(tmp_path) == 0


# --- damage ---


def test_a_change_of_any_byte_is_noticed(tmp_path):
    ledger = fill(tmp_path)
    intact = ledger.read_bytes()
    lag(tmp_path)  # the chain alone must tell
    unnoticed = []
    with ledger.open("r+b", buffering=0) as file:
        for at, byte in enumerate(intact):
            final = at == len(intact) - 1
            for other in set(range(256) if final else (byte ^ 1, byte ^ 0x20, 10)) - {byte}:
                os.pwrite(file.fileno(), bytes([other]), at)
                with suppress(SiteError):
                    read_ledger(tmp_path)
                    unnoticed.append((at, other))
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert not unnoticed
    assert len(read_ledger(tmp_path)) == 6


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("head", ["current", "lagging"])
def test_a_changed_last_line_is_not_taken_for_a_torn_one(tmp_path, head):
    ledger = fill(tmp_path)
    intact = ledger.read_bytes()
    if head == "lagging":
        lag(tmp_path, 5)
    for at in range(intact[:-1].rindex(b"\n") + 1, len(intact)):
        put(ledger, intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :])
        with pytest.raises(SiteError, match="ledger-adopt"):
            Ledger(tmp_path)
    assert not list(tmp_path.glob("ledger.torn-*"))
    # Nor is a line whose newline was changed before the next one tore.
    put(ledger, intact[:-1] + b'x{"n": 7, "time"')
    refused(tmp_path)


def test_a_byte_lost_or_added_is_noticed(tmp_path):
    ledger = fill(tmp_path)
    intact = ledger.read_bytes()
    lag(tmp_path)
    for at in range(len(intact) - 1):
        put(ledger, intact[:at] + (b"" if at % 2 else intact[at : at + 1] * 2) + intact[at + 1 :])
        with pytest.raises(SiteError):
            read_ledger(tmp_path)


@pytest.mark.parametrize("head", ["current", "lagging"])
@pytest.mark.parametrize("order", ["12356", "12346", "2345", "132456", "1223456", "1234565", "0"])
def test_lines_missing_moved_or_doubled_are_noticed(tmp_path, order, head):
    ledger = fill(tmp_path)
    lines = [b"\n", *ledger.read_bytes().splitlines(keepends=True)]
    if head == "lagging":
        lag(tmp_path)
    put(ledger, b"".join(lines[int(n)] for n in order))
    refused(tmp_path)


def test_a_cut_anywhere_is_noticed(tmp_path):
    ledger = fill(tmp_path)
    intact = ledger.read_bytes()
    for length in range(len(intact)):
        put(ledger, intact[:length])
        with pytest.raises(SiteError, match=r"adopt|first line"):
            read_ledger(tmp_path)
    for length in [n for n, byte in enumerate(intact) if byte == 10] + [0]:
        put(ledger, intact[:length])
        refused(tmp_path)
    ledger.unlink()
    refused(tmp_path, "the ledger of a site that has joined studies, got no such file")


def test_an_older_copy_of_the_ledger_is_noticed(tmp_path):
    older = fill(tmp_path).read_bytes()
    with Ledger(tmp_path) as ledger:
        ledger.reserve(a_round())
    (tmp_path / "ledger.jsonl").write_bytes(older)
    refused(tmp_path, "at least 7 lines, as ledger.head says, got 6")


def test_another_ledger_in_its_place_is_noticed(tmp_path):
    fill(tmp_path / "b")
    with Ledger(tmp_path / "b") as ledger:
        ledger.reserve(a_round())
    with Ledger(tmp_path / "a") as ledger:
        for number in range(2, 9):
            ledger.reserve(a_round(number))
    (tmp_path / "a" / "ledger.jsonl").replace(tmp_path / "b" / "ledger.jsonl")
    refused(tmp_path / "b", "line 1 as it was written")
    (tmp_path / "a" / "secret").replace(tmp_path / "b" / "secret")
    refused(tmp_path / "b", "a number of lines and a hash, as it was written, got something")


def test_a_damaged_or_missing_head_is_noticed(tmp_path):
    fill(tmp_path)
    head = tmp_path / "ledger.head"
    intact = head.read_bytes()
    for at, byte in enumerate(intact):
        for other in {byte ^ 1, 0, 10, ord("9")} - {byte}:
            put(head, intact[:at] + bytes([other]) + intact[at + 1 :])
            with pytest.raises(SiteError, match="ledger-adopt"):
                read_ledger(tmp_path)
    for wrong in (b"", intact[:-1], intact * 2, b"0" * 12 + intact[12:]):
        put(head, wrong)
        refused(tmp_path)
    head.unlink()
    refused(tmp_path, "6 lines and a hash, got no such file")


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"time": None},
        {"n": "7"},
        {"n": 8},
        {"state": "lost"},
        {"state": "created"},
        {"release": a_round().model_dump(mode="json") | {"round": 0.5}},
    ],
)
def test_a_line_nobody_here_would_write_is_damage_however_well_chained(tmp_path, change):
    ledger = fill(tmp_path)
    line = json.loads(ledger.read_bytes().splitlines()[1]) | {"n": 7} | change
    before = json.loads(ledger.read_bytes().splitlines()[-1])["hash"]
    body = {key: value for key, value in line.items() if key not in ("hash", "previous")}

    class Made:
        def model_dump(self, **_):
            return body

    with ledger.open("ab") as file:
        file.write(Chain.of(tmp_path).make_line(Made(), before)[0])
    refused(tmp_path, "line 7 as it was written")


def test_a_file_changed_under_a_running_process_is_not_written_to(tmp_path):
    older = fill(tmp_path).read_bytes()
    with Ledger(tmp_path) as ledger:
        (tmp_path / "ledger.jsonl").rename(tmp_path / "moved")
        with pytest.raises(SiteError, match="No such file"):
            ledger.reserve(a_round())
        (tmp_path / "ledger.jsonl").write_bytes(older)
        with pytest.raises(SiteError, match=r"as this process left it, got another\. Start again"):
            ledger.reserve(a_round())
    assert (tmp_path / "moved").read_bytes() == older


# --- a line that tore ---


@pytest.mark.usefixtures("quick")
def test_a_torn_last_line_of_any_length_is_set_aside(tmp_path, caplog):
    ledger = fill(tmp_path)
    with Ledger(tmp_path) as book:
        book.reserve(a_round(7))
    whole = ledger.read_bytes()
    kept = whole[: whole[:-1].rindex(b"\n") + 1]
    for n, length in enumerate(range(len(kept) + 1, len(whole)), 1):
        put(ledger, whole[:length])
        lag(tmp_path, 6)
        assert spent(tmp_path) == 1  # a reader takes it for an append in progress
        caplog.clear()
        with caplog.at_level(logging.WARNING), Ledger(tmp_path) as book:
            assert book.head.count == 6
            assert list_events(book.spending) == (SPENT,)
        assert "set aside" in caplog.text
        assert ledger.read_bytes() == kept
        assert (tmp_path / f"ledger.torn-{n}").read_bytes() == whole[len(kept) : length]
    with Ledger(tmp_path) as book:
        book.reserve(a_round(7))
        assert list_events(book.spending) == (SPENT, SPENT)
    assert spent(tmp_path) == 2


def test_a_head_that_lags_is_brought_up_to_date(tmp_path):
    fill(tmp_path)
    current = (tmp_path / "ledger.head").read_bytes()
    for count in range(1, 6):
        lag(tmp_path, count)
        Ledger(tmp_path).close()
        assert (tmp_path / "ledger.head").read_bytes() == current


# --- a disk that refuses ---


@pytest.mark.parametrize("room", [0, 1, 100, 500])
def test_a_full_disk_is_said_in_a_line_and_nothing_is_spent_or_lost(tmp_path, room):
    path = fill(tmp_path)
    before = path.read_bytes()
    with Ledger(tmp_path) as ledger:
        full = pytest.raises(SiteError, match=r"File too large.*Free space")
        with limited(resource.RLIMIT_FSIZE, len(before) + room), full as caught:
            ledger.reserve(a_round(2))
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == before
        assert list_events(ledger.spending) == (SPENT,)
        ledger.reserve(a_round(2))
    assert spent(tmp_path) == 2


def broken(*_):
    raise OSError(5, "Input/output error")


def test_a_line_that_cannot_be_made_durable_is_taken_back(tmp_path, monkeypatch):
    before = fill(tmp_path).read_bytes()
    with Ledger(tmp_path) as ledger, monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)  # the head: the line itself is on disk by then
        with pytest.raises(SiteError, match="Input/output error"):
            ledger.reserve(a_round(2))
    Ledger(tmp_path).close()
    assert spent(tmp_path) == 2  # not even the way back worked: the line stays, and counts
    with Ledger(tmp_path) as ledger, monkeypatch.context() as patch:
        before = (tmp_path / "ledger.jsonl").read_bytes()
        patch.setattr(os, "fsync", broken)
        with pytest.raises(SiteError, match="Input/output error"):
            ledger.reserve(a_round(2))
        patch.undo()
        with pytest.raises(SiteError):  # what the disk holds is unknown: start again
            ledger.reserve(a_round(2))
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    Ledger(tmp_path).close()


def test_an_interrupted_append_leaves_no_trace(tmp_path, monkeypatch):
    before, fsync = fill(tmp_path).read_bytes(), os.fsync

    def interrupt(file):
        monkeypatch.setattr(os, "fsync", fsync)
        raise KeyboardInterrupt

    with Ledger(tmp_path) as ledger:
        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ledger.reserve(a_round(2))
        assert (tmp_path / "ledger.jsonl").read_bytes() == before
        ledger.reserve(a_round(2))
    assert spent(tmp_path) == 2


# --- a ledger that was lost ---


@pytest.mark.parametrize("loss", ["damaged", "rolled back", "deleted", "no head", "none"])
def test_adopt_starts_anew_with_what_was_spent_and_keeps_the_old_file(tmp_path, loss):
    path = fill(tmp_path)
    if loss == "damaged":
        path.write_bytes(path.read_bytes()[:-50] + b"?" * 50)
    elif loss == "rolled back":
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    elif loss == "deleted":
        path.unlink()
    elif loss == "no head":
        (tmp_path / "ledger.head").unlink()
    old = path.read_bytes() if path.exists() else None
    if loss != "none":
        refused(tmp_path)
    kept = {"damaged": 4, "rolled back": 0, "deleted": 0, "no head": 5, "none": 5}[loss]
    adopt_ledger(tmp_path, epsilon=3.5, delta=1e-5)
    with Ledger(tmp_path) as ledger:
        adopted = find_adopted(ledger.spending)
        assert (adopted.epsilon, adopted.delta) == (3.5, 1e-5)
        assert list_events(ledger.spending) == (SPENT,) * bool(kept)
        assert ledger.head.count == kept + 2
        assert ledger.sealed(a_round()) == (CONTENTS if kept else None)
        ledger.reserve(a_round(2))
    assert spent(tmp_path) == 1 + bool(kept)
    assert [file.read_bytes() for file in tmp_path.glob("ledger.replaced-*")] == [old] * bool(old)


@pytest.mark.parametrize("epsilon", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("delta", [-0.1, float("nan"), 1.0])
def test_adopt_takes_no_impossible_amount_and_leaves_the_old_ledger(tmp_path, epsilon, delta):
    path = fill(tmp_path)
    before = path.read_bytes()
    for amount in ((epsilon, 0.0), (1.0, delta)):
        with pytest.raises(SiteError, match="spent at least"):
            adopt_ledger(tmp_path, *amount)
    assert path.read_bytes() == before


def test_a_ledger_of_its_own_adopted_nothing(tmp_path):
    with Ledger(tmp_path) as ledger:
        assert find_adopted(ledger.spending) is None
    assert read_ledger(tmp_path / "nowhere") == []
