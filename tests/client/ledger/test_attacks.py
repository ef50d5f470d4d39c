"""Who can write the ledger's files gets no budget back; who is told of it learns nothing."""

import hashlib
import hmac
import json
import os
import shutil

import pytest

from client.ledger.adoption import adopt_ledger, salvage_ledger
from client.ledger.chain import Chain, SecretError
from client.ledger.entries import Contents, Created, Release, Sealed, find_adopted, list_events
from client.ledger.ledger import Ledger, check_place, read_ledger
from client.ledger.place import describe_place
from client.ledger.spending import Spending
from client.privacy.parameters import PrivateRelease
from common.errors import SiteError

STUDY, DELTA, ROUNDS = "1" * 16, 1e-5, 5
PRIVACY = PrivateRelease(
    mechanism="dp_sgd", noise_multiplier=2.0, sample_rate=1.0, steps=1, delta=DELTA, clip_norm=1.0
)
CONTENTS = Contents(tensors={}, metrics=(), bytes=1, sha256="c" * 64)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing here depends on what outlives a power cut."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def work(ledger, *rounds, study=STUDY):
    """Private rounds, three lines each; round 0 is the end, of one line."""
    for number in rounds:
        kind, privacy = ("round", PRIVACY) if number else ("final", None)
        what = Release(
            study=study,
            name="skin",
            kind=kind,
            round=number or None,
            received=f"{number:064x}",
            privacy=privacy,
        )
        if number:
            ledger.reserve(what)
            ledger.seal(what, CONTENTS)
        ledger.send(what, CONTENTS)


@pytest.fixture
def state(tmp_path):
    """Five private rounds, and an end."""
    with Ledger(tmp_path / "state", bound=True) as ledger:
        work(ledger, *range(1, ROUNDS + 1), 0)
    return tmp_path / "state"


def epsilon(state):
    return Spending(read_ledger(state), DELTA).total()


def events(state):
    return len(list_events(read_ledger(state)))


# --- rewriting ---


def relink(bodies, make):
    """A whole ledger anew, as an attacker would who knows how it is made."""
    data, before = b"", "0" * 64
    for n, body in enumerate(bodies, 1):
        text = json.dumps(body | {"n": n}).encode()[:-1]
        linked = b'%s, "previous": "%s"' % (text, before.encode())
        before = make(linked)
        data += b'%s, "hash": "%s"}\n' % (linked, before.encode())
    return data, n, before


def by_sha256(text):
    return hashlib.sha256(text).hexdigest()


def by_a_guessed_secret(text):
    key = hmac.digest(b"\0" * 32, b"ledger", hashlib.sha256)
    return hmac.digest(key, b"line:" + text, hashlib.sha256).hex()


@pytest.mark.parametrize("make", [by_sha256, by_a_guessed_secret])
@pytest.mark.parametrize("change", ["rounds taken out", "more noise", "nothing"])
def test_a_ledger_rewritten_without_the_secret_is_refused(state, make, change):
    path = state / "ledger.jsonl"
    bodies = [json.loads(line) for line in path.read_bytes().splitlines()]
    for body in bodies:
        del body["previous"], body["hash"]
    if change == "rounds taken out":
        bodies = bodies[:4]
    if change == "more noise":
        for body in bodies[1:]:
            if body["release"]["privacy"]:
                body["release"]["privacy"]["noise_multiplier"] = 2000.0
    data, count, last = relink(bodies, make)
    path.write_bytes(data)
    for head in (
        (state / "ledger.head").read_bytes(),
        f"{count:012d} {last}\n".encode(),
        f"{count:012d} {last} {'0' * 64} {make(last.encode())}\n".encode(),
    ):
        (state / "ledger.head").write_bytes(head)
        with pytest.raises(SiteError, match=r"ledger-adopt"):
            Ledger(state)
        with pytest.raises(SiteError, match=r"ledger-adopt"):
            read_ledger(state)


@pytest.mark.parametrize("lines", [1, 4, 16])
def test_lines_cut_off_with_a_head_made_to_match_are_noticed(state, lines):
    """The hash of each line can be read; under which a head is signed cannot."""
    path = state / "ledger.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)[:lines]
    old = (state / "ledger.head").read_bytes()
    path.write_bytes(b"".join(kept))
    last = json.loads(kept[-1])["hash"].encode()
    (state / "ledger.head").write_bytes(b"%012d %s" % (lines, last) + old[77:])
    with pytest.raises(SiteError, match=r"ledger\.head: expected .* as it was written"):
        Ledger(state)


# --- a secret that is lost, or another ---


def test_a_lost_secret_is_told_from_a_damaged_ledger_and_none_is_drawn(state):
    secret = (state / "secret").read_bytes()
    (state / "secret").unlink()
    for attempt in (Ledger, read_ledger, salvage_ledger, lambda it: adopt_ledger(it, 0.0, 0.0)):
        with pytest.raises(SiteError, match=r"secret: expected the secret .* got no such file"):
            attempt(state)
    assert not (state / "secret").exists()
    (state / "secret").write_bytes(b"x" * 32)
    for attempt in (Ledger, read_ledger, salvage_ledger, lambda it: adopt_ledger(it, 0.0, 0.0)):
        with pytest.raises(SecretError, match=r"secret is another now.*Restore the file"):
            attempt(state)
    (state / "secret").write_bytes(secret)
    assert events(state) == ROUNDS


def test_a_ledger_damaged_from_its_first_line_to_its_last_is_not_blamed_on_the_secret(state):
    path = state / "ledger.jsonl"
    path.write_bytes(bytes(len(path.read_bytes())))
    for damaged in (path.read_bytes(), b"x\n" * 9):
        path.write_bytes(damaged)
        with pytest.raises(SiteError, match=r"ledger-adopt") as caught:
            Ledger(state)
        assert not isinstance(caught.value, SecretError)


# --- what is told of it ---


def test_a_hash_that_was_told_cannot_be_tried_out(tmp_path, monkeypatch):
    """Who knows every word of a line, but neither its nonce nor the secret, cannot confirm it."""
    told = set()
    monkeypatch.setattr("client.ledger.ledger.write_time", lambda: "2026-01-01T00:00:00Z")
    for ward in "ab":
        with Ledger(tmp_path / ward) as ledger:
            for _ in range(3):
                work(ledger, 0)
            told |= {ledger.hash_at(n) for n in range(1, 5)}
    assert len(told) == 8
    # Even who read the whole line in a stolen backup without the secret has no function to try.
    line = (tmp_path / "a" / "ledger.jsonl").read_bytes().splitlines()[1]
    covered, own = line[: line.index(b', "hash"')], json.loads(line)["hash"]
    assert own not in (by_sha256(covered), by_a_guessed_secret(covered))


# --- adopting ---


@pytest.mark.parametrize("line", range(17))
def test_adopting_after_one_damaged_byte_gives_no_budget_back(state, line):
    """Before, `ledger-adopt --epsilon 0` restored all of it."""
    before, path = epsilon(state), state / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for at in (0, 12, len(lines[line]) // 2, -3, -1):
        broken = bytearray(lines[line])
        broken[at] ^= 1
        path.write_bytes(b"".join([*lines[:line], bytes(broken), *lines[line + 1 :]]))
        with pytest.raises(SiteError):
            Ledger(state)
        here = state.with_name(f"{line}{at}")
        shutil.copytree(state, here)
        adopt_ledger(here, 0.0, 0.0)
        assert epsilon(here) == before
        with Ledger(here) as ledger:
            lost = line == 16 and at != -1
            assert ledger.models(STUDY, "final") == (set() if lost else {"0" * 64})


def test_adopting_again_and_again_gives_nothing_back_either(state):
    path, before = state / "ledger.jsonl", epsilon(state)
    adopt_ledger(state, 1.0, 0.0)
    adopt_ledger(state, 0.5, 1e-6)
    for damaged in (b"", b"?" * 99 + b"\n"):
        path.write_bytes(damaged)
        adopt_ledger(state, 0.0, 0.0)
        found = read_ledger(state)
        assert events(state) == ROUNDS
        assert find_adopted(found).epsilon >= 1.0
        assert Spending(found, DELTA).total() >= before + 1.0
        with Ledger(state) as ledger:
            assert ledger.models(STUDY, "final") == {"0" * 64}


def test_what_was_sealed_or_sent_proves_what_was_reserved(state):
    path = state / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b'"reserved"' not in line))
    adopt_ledger(state, 0.0, 0.0)
    assert events(state) == ROUNDS
    path.write_bytes(b"".join(line for line in lines if b'"sent"' in line))
    adopt_ledger(state, 0.0, 0.0)
    assert events(state) == ROUNDS


def test_an_invented_line_is_not_salvaged(state):
    """It could have an invented reply leave for free."""
    chain = Chain(b"y" * 32)
    what = Release(study=STUDY, name="skin", kind="round", round=9, privacy=PRIVACY)
    sealed = Sealed(n=2, time="", key=what.key, release=what, contents=CONTENTS)
    first = Created(n=1, time="")
    with (state / "ledger.jsonl").open("ab") as file:
        file.write(chain.make_lines([first, sealed])[0])
    adopt_ledger(state, 0.0, 0.0)
    with Ledger(state) as ledger:
        assert ledger.sealed(what) is None


# --- a copy ---


@pytest.mark.parametrize("where", ["beside", "another machine"])
def test_a_copied_state_folder_is_refused_until_somebody_says_it_was_moved(
    state, where, monkeypatch
):
    copy = state
    if where == "beside":
        copy = state.with_name("copy")
        shutil.copytree(state, copy)
    else:
        monkeypatch.setattr("client.ledger.place._read_machine", lambda: "another")
    with pytest.raises(SiteError, match=r"last in use, got a copy.*consilium-client ledger-move"):
        Ledger(copy, bound=True)
    with pytest.raises(SiteError, match="ledger-move"):
        check_place(copy)  # as `check` does
    assert len(read_ledger(copy)) == 17  # to be read, it may lie anywhere
    Ledger(copy).close()  # as ledger-move does
    for _ in range(2):
        with Ledger(copy, bound=True) as ledger:
            work(ledger, 9)
    if where == "beside":
        with Ledger(state, bound=True):
            pass  # a coordinator's receipt tells the two apart


def test_a_place_is_named_to_nobody_and_needs_no_machine_id(state, monkeypatch, tmp_path):
    place = describe_place(state / "ledger.jsonl")
    assert place.split()[-1] == str((state / "ledger.jsonl").stat().st_ino).encode()
    assert place not in (state / "ledger.head").read_bytes()
    monkeypatch.setattr("client.ledger.place._MACHINE", (tmp_path / "no", tmp_path))
    assert describe_place(state / "ledger.jsonl").startswith(b" ")
    with Ledger(tmp_path / "ward", bound=True) as ledger:
        work(ledger, 1)
    with Ledger(tmp_path / "ward", bound=True) as ledger:
        work(ledger, 2)


# --- receipts ---


def back_up(state, word="backup"):
    shutil.copytree(state, state.with_name(word))


def restore(state, word="backup"):
    shutil.rmtree(state)
    shutil.copytree(state.with_name(word), state)


def test_a_whole_state_folder_rolled_back_is_noticed_by_what_it_told_and_stays_refused(state):
    back_up(state)
    with Ledger(state) as ledger:
        work(ledger, 6)
        told = ledger.head
    restore(state)
    with Ledger(state) as ledger:
        with pytest.raises(SiteError, match=r"line 20 as this site told.*got 17 lines\. Restore"):
            ledger.check_receipt(told)
        with pytest.raises(SiteError, match="as this site told"):
            work(ledger, 7)
    with pytest.raises(SiteError, match=r"at least 20 lines, as ledger\.head says, got 17"):
        Ledger(state)  # for whichever coordinator


def test_of_two_copies_that_went_on_one_is_noticed(state):
    back_up(state)
    with Ledger(state) as ledger:
        work(ledger, 6)
        told = ledger.head
    restore(state)
    with Ledger(state) as ledger:
        work(ledger, 7, 8)  # longer than the other
        with pytest.raises(SiteError, match="line 20 as this site told a coordinator, got another"):
            ledger.check_receipt(told)
    with pytest.raises(SiteError, match=r"line 20 as ledger\.head says, got another"):
        Ledger(state)


def test_an_invented_receipt_does_no_harm(state, tmp_path):
    with Ledger(tmp_path / "other") as other:
        work(other, *range(1, 30))
        theirs = other.head
    with Ledger(state) as ledger:
        ours = ledger.head
        for change in (
            {"count": 99},
            {"count": 3},
            {"hash": "a" * 64},
            {"receipt": "a" * 64},
            theirs.model_dump(),
        ):
            ledger.check_receipt(ours.model_copy(update=change))
        ledger.check_receipt(ours)
        work(ledger, 6)
        ledger.check_receipt(ours)
    assert events(state) == ROUNDS + 1


def test_what_was_told_of_a_ledger_that_was_replaced_does_no_harm(state):
    with Ledger(state) as ledger:
        work(ledger, 6)
        told = ledger.head
    adopt_ledger(state, 0.0, 0.0)
    with Ledger(state) as ledger:
        ledger.check_receipt(told)
        work(ledger, 7)
    assert events(state) == ROUNDS + 2


def test_a_folder_of_before_an_adoption_or_emptied_of_its_ledger_is_noticed(state):
    back_up(state)
    adopt_ledger(state, 3.0, 0.0)
    with Ledger(state) as ledger:
        told = ledger.head
    restore(state)
    with Ledger(state) as ledger, pytest.raises(SiteError, match="as this site told"):
        ledger.check_receipt(told)
    restore(state)
    with Ledger(state) as ledger:
        told = ledger.head
    for path in state.glob("ledger.*"):
        path.unlink()
    with Ledger(state) as ledger, pytest.raises(SiteError, match="as this site told"):
        ledger.check_receipt(told)
