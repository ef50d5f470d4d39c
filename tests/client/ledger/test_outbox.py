"""A private round may be killed anywhere: what is spent is exact, what leaves leaves unchanged."""

import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from client.ledger.adoption import adopt_ledger
from client.ledger.entries import Release, find_adopted, list_events
from client.ledger.ledger import Ledger, read_ledger
from client.ledger.outbox import Outbox
from client.ledger.release import Reply, release
from client.privacy.parameters import PrivateRelease
from common.errors import RefusedError, SiteError

STUDY, OTHER = "1" * 16, "2" * 16


def a_round(number=1, *, study=STUDY, noise=1.0, private=True, received="a"):
    privacy = PrivateRelease(
        mechanism="dp_sgd",
        noise_multiplier=noise,
        sample_rate=0.0625,
        steps=16,
        delta=1e-5,
        clip_norm=1.0,
    )
    return Release(
        study=study,
        name="skin",
        kind="round",
        round=number,
        received=received * 64,
        privacy=privacy if private else None,
    )


def draw():
    """A reply nobody could compute twice."""
    return Reply(os.urandom(40), {"head.weight": (10,)})


def never():
    raise AssertionError("must not be called")


def refuse():
    raise RefusedError("the budget is spent")


@contextmanager
def open_site(state):
    """The ledger and the outbox of one site."""
    with Ledger(state) as ledger:
        yield ledger, Outbox(state / "outbox")


def spent(state):
    return len(list_events(read_ledger(state)))


# --- what a release does ---


def test_a_sealed_reply_is_sent_again_byte_for_byte_for_free_with_the_budget_spent(tmp_path):
    with open_site(tmp_path) as (ledger, outbox):
        first = release(ledger, outbox, a_round(), draw)
        assert release(ledger, outbox, a_round(), never, refuse) == first
    with open_site(tmp_path) as (ledger, outbox):
        assert release(ledger, outbox, a_round(), never, refuse) == first
        assert len(list_events(ledger.spending)) == 1
        for other in (a_round(2), a_round(received="b"), a_round(study=OTHER), a_round(noise=2.0)):
            assert release(ledger, outbox, other, draw) != first
        assert len(list_events(ledger.spending)) == 5
    states = [entry.state for entry in read_ledger(tmp_path)]
    assert states[:6] == ["created", "reserved", "sealed", "sent", "sent", "sent"]


def test_a_refused_release_computes_nothing_spends_nothing_and_leaves_no_line(tmp_path):
    with open_site(tmp_path) as (ledger, outbox):
        with pytest.raises(RefusedError):
            release(ledger, outbox, a_round(), never, refuse)
        assert list_events(ledger.spending) == ()
        assert ledger.head.count == 1


def test_work_sees_its_reservation_on_disk_and_stays_spent_if_it_fails(tmp_path):
    def work():
        assert [entry.state for entry in read_ledger(tmp_path)] == ["created", "reserved"]
        raise ArithmeticError

    with open_site(tmp_path) as (ledger, outbox):
        with pytest.raises(ArithmeticError):
            release(ledger, outbox, a_round(), work)
        release(ledger, outbox, a_round(), draw)
        assert len(list_events(ledger.spending)) == 2


def test_a_release_without_privacy_is_one_line_and_no_file(tmp_path):
    with open_site(tmp_path) as (ledger, outbox):
        replies = [release(ledger, outbox, a_round(private=False), draw) for _ in range(2)]
        assert replies[0] != replies[1]
        assert list_events(ledger.spending) == ()
    assert [entry.state for entry in read_ledger(tmp_path)] == ["created", "sent", "sent"]
    assert not list((tmp_path / "outbox").iterdir())


@pytest.mark.parametrize("damage", ["a byte", "cut", "empty", "gone"])
def test_a_damaged_reply_never_leaves_and_the_round_spends_anew(tmp_path, damage, caplog):
    with open_site(tmp_path) as (ledger, outbox):
        first = release(ledger, outbox, a_round(), draw)
        (file,) = (tmp_path / "outbox").iterdir()
        if damage == "gone":
            file.unlink()
        else:
            wrong = bytes([first[0] ^ 1]) + first[1:]
            file.write_bytes({"a byte": wrong, "cut": first[:-1], "empty": b""}[damage])
        with pytest.raises(RefusedError):
            release(ledger, outbox, a_round(), never, refuse)
        again = release(ledger, outbox, a_round(), draw)
        assert again not in (first, wrong if damage == "a byte" else None)
        assert len(list_events(ledger.spending)) == 2
        assert release(ledger, outbox, a_round(), never, refuse) == again
    assert "is lost" in caplog.text


def test_a_file_no_line_vouches_for_is_never_sent(tmp_path):
    with open_site(tmp_path) as (ledger, outbox):
        ledger.reserve(a_round())
        outbox.write(a_round(), b"orphan")
    with open_site(tmp_path) as (ledger, outbox):
        assert release(ledger, outbox, a_round(), draw) != b"orphan"
    (file,) = (tmp_path / "outbox").iterdir()
    assert file.read_bytes() != b"orphan"


def test_purge_deletes_the_replies_of_one_study(tmp_path):
    with open_site(tmp_path) as (ledger, outbox):
        for number in (1, 2):
            release(ledger, outbox, a_round(number), draw)
        kept = release(ledger, outbox, a_round(study=OTHER), draw)
        (tmp_path / "outbox" / f".{STUDY}-{'0' * 64}.12345678.part").touch()
        outbox.purge(STUDY)
        assert len(list((tmp_path / "outbox").iterdir())) == 1
        assert release(ledger, outbox, a_round(study=OTHER), never, refuse) == kept
        assert len(list_events(ledger.spending)) == 3


def test_only_this_user_can_read_a_reply(tmp_path):
    before = os.umask(0)
    try:
        with open_site(tmp_path / "state") as (ledger, outbox):
            release(ledger, outbox, a_round(), draw)
    finally:
        os.umask(before)
    folder = tmp_path / "state" / "outbox"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [file.stat().st_mode & 0o777 for file in folder.iterdir()] == [0o600]


def test_a_reply_that_does_not_fit_on_the_disk_does_not_leave(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = pytest.raises(SiteError, match=r"File too large.*Free space")
    with open_site(tmp_path) as (ledger, outbox):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            with full:
                release(ledger, outbox, a_round(), lambda: Reply(bytes(30_000), {}))
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
            with full:
                release(ledger, outbox, a_round(2), never)
            with full:
                release(ledger, outbox, a_round(3, private=False), draw)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [entry.state for entry in read_ledger(tmp_path)] == ["created", "reserved"]
        assert not list((tmp_path / "outbox").iterdir())
        release(ledger, outbox, a_round(), draw)
        assert len(list_events(ledger.spending)) == 2


# --- killed, or without power, at every edge ---

CUTS = ("kill", "power", "power, head kept", "power, names kept")
WATCHED = ("open", "write", "pwrite", "fsync", "ftruncate", "replace", "rename", "unlink", "mkdir")


class Edge:
    """Where a process meets the disk: counts its calls and ends it just before one of them.

    It leaves one folder for each way to end. On a kill all that was done stays. On a power cut only
    what was fsynced stays; of the rest the disk may still keep some, of which the two worst for us
    are tried: the ledger's head alone, and all names of files without their contents.
    """

    def __init__(self, root: Path, end: int = 0, half: bool = False) -> None:
        self.root, self.end, self.half = root, end, half
        self.calls, self.real = 0, {name: getattr(os, name) for name in WATCHED}
        self.log = self.real["open"](f"{root}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.files: dict[int, bytes] = {}
        self.folders: dict[Path, dict[str, int]] = {}
        for folder in self.all_folders():  # what stood there before is durable
            self.folders[folder] = names(folder)
            self.files |= {p.stat().st_ino: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        for name in WATCHED:
            setattr(os, name, lambda *a, name=name, **k: self.call(name, *a, **k))

    def all_folders(self):
        return [self.root, *(path for path in self.root.rglob("*") if path.is_dir())]

    def call(self, name, *given, **keys):
        where = given[0]
        path = Path(f"/proc/self/fd/{where}").readlink() if isinstance(where, int) else Path(where)
        if not path.is_relative_to(self.root):
            return self.real[name](*given, **keys)
        self.step(f"{name} {path.name}", lambda: self.real[name](where, given[1][:100]))
        result = None if name == "fsync" else self.real[name](*given, **keys)
        if name == "open" and given[1] & os.O_CREAT and not os.fstat(result).st_size:
            self.files[os.fstat(result).st_ino] = b""
        elif name == "fsync" and path.is_dir():
            self.folders[path] = names(path)
        elif name == "fsync":
            self.files[path.stat().st_ino] = path.read_bytes()
        return result

    def step(self, what, begin=lambda: None):
        """One call, or a draw or a send; noted unless the process ends before or halfway."""
        self.calls += 1
        if self.calls == self.end:
            if self.half:
                begin()
            self.over()
        self.real["write"](self.log, f"{what}\n".encode())

    def over(self):
        for name in WATCHED:
            setattr(os, name, self.real[name])
        inodes = {folder.stat().st_ino for folder in self.all_folders()}
        head = self.root / "state" / "ledger.head"
        kept = {head.stat().st_ino: head.read_bytes()} if head.exists() else {}
        everywhere = {folder: names(folder) for folder in self.all_folders()}

        def rebuild(source, target, files, folders):
            target.mkdir(mode=0o700)
            for name, inode in folders.get(source, {}).items():
                if inode in inodes:
                    rebuild(source / name, target / name, files, folders)
                else:
                    (target / name).write_bytes(files.get(inode, b""))

        rebuild(self.root, after(self.root, "power"), self.files, self.folders)
        rebuild(self.root, after(self.root, "power, head kept"), self.files | kept, self.folders)
        rebuild(self.root, after(self.root, "power, names kept"), self.files, everywhere)
        os._exit(9)


def names(folder):
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def after(root, cut):
    """The folder a process working in `root` left when it ended in this way."""
    return root if cut == "kill" else root.with_name(f"{root.name}, {cut}")


def ended(began, root, work, end=0, half=False):
    """What a process had done in a copy of `began`, by call, when it ended before number `end`."""
    shutil.copytree(began, root)
    pid = os.fork()
    if not pid:
        try:
            work(root, Edge(root, end, half))
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (9 if end else 0)
    return Path(f"{root}.log").read_text().splitlines()


def one_round(root, edge):
    """A private round, from opening the ledger to the send."""

    def drawing():
        edge.step("draw")
        return draw()

    with open_site(root / "state") as (ledger, outbox):
        data = release(ledger, outbox, a_round(), drawing)
        edge.step(f"send {data.hex()}")


def lasting(done, cut):
    """How many lines beyond those before the disk must hold, told from the calls alone."""
    written = [i for i, call in enumerate(done) if call == "write ledger.jsonl"]
    return sum(cut == "kill" or "fsync ledger.jsonl" in done[i:] for i in written)


@pytest.fixture
def quick(monkeypatch):
    """Power is cut in the process under test alone; the next one need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def began(tmp_path):
    """Where each process under test begins, in a copy."""
    folder = tmp_path / "began"
    folder.mkdir()
    return folder


def again(root):
    """The same round in the next process: what was spent before, whether it drew, what it sends."""
    draws = []
    with open_site(root / "state") as (ledger, outbox):
        before = len(list_events(ledger.spending))
        data = release(ledger, outbox, a_round(), lambda: draws.append(1) or draw())
        assert len(list_events(ledger.spending)) == before + len(draws)
    return before, len(draws), data


@pytest.mark.system
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("start", ["first round", "retry"])
def test_a_round_ended_at_any_edge_is_counted_exactly(tmp_path, began, start):
    if start == "retry":
        with open_site(began / "state") as (ledger, outbox):
            ledger.reserve(a_round())
            outbox.write(a_round(), b"orphan")
    calls = ended(began, tmp_path / "whole", one_round)
    assert "draw" in calls
    assert calls[-1].startswith("send")
    ends = [(end, False) for end in range(1, len(calls) + 1)]
    ends += [(end, True) for end, call in enumerate(calls, 1) if call == "write ledger.jsonl"]
    for end, half in ends:
        root = tmp_path / f"{end} {half}"
        done = ended(began, root, one_round, end, half)
        assert len(done) == end - 1
        for cut in CUTS:
            lines = lasting(done, cut)
            counted, drew, data = again(after(root, cut))
            assert counted == (start == "retry") + (lines >= 1), (end, half, cut)
            assert drew == (lines < 2), (end, half, cut)  # from the second on it is sealed
            assert lines >= 1 or "draw" not in done
            assert data != b"orphan"


@pytest.mark.system
@pytest.mark.usefixtures("quick")
def test_a_resend_ended_at_any_edge_costs_nothing_and_changes_nothing(tmp_path, began):
    with open_site(began / "state") as (ledger, outbox):
        sealed = release(ledger, outbox, a_round(), draw)
    calls = ended(began, tmp_path / "whole", one_round)
    assert "draw" not in calls
    for end in range(1, len(calls) + 1):
        ended(began, tmp_path / str(end), one_round, end)
        for cut in CUTS:
            assert again(after(tmp_path / str(end), cut)) == (1, 0, sealed)


@pytest.mark.system
@pytest.mark.usefixtures("quick")
def test_a_power_cut_after_the_send_keeps_the_very_bytes_that_left(tmp_path, began):
    def work(root, edge):
        one_round(root, edge)
        edge.step("the end")

    end = len(ended(began, tmp_path / "whole", work))
    sent = ended(began, tmp_path / "cut", work, end)[-1]
    for cut in CUTS:
        counted, drew, data = again(after(tmp_path / "cut", cut))
        assert (counted, drew, f"send {data.hex()}") == (1, 0, sent)


@pytest.mark.system
@pytest.mark.usefixtures("quick")
def test_a_power_cut_soon_after_a_kill_refuses_nobody(tmp_path, began):
    """What a kill left unsynced the next process builds on, and must sync before it does."""

    def work(root, edge):
        ledger = root / "state" / "ledger.jsonl"
        edge.files[ledger.stat().st_ino] = ledger.read_bytes().splitlines(keepends=True)[0]
        one_round(root, edge)

    end = ended(began, tmp_path / "whole", one_round).index("write ledger.jsonl") + 2
    assert ended(began, tmp_path / "killed", one_round, end)[-1] == "write ledger.jsonl"
    calls = ended(tmp_path / "killed", tmp_path / "next", work)
    for end in range(1, calls.index("draw") + 1):
        done = ended(tmp_path / "killed", tmp_path / str(end), work, end)
        for cut in CUTS:
            lasts = cut == "kill" or "fsync ledger.jsonl" in done
            assert again(after(tmp_path / str(end), cut))[0] == lasts + lasting(done, cut)


@pytest.mark.system
@pytest.mark.usefixtures("quick")
def test_setting_a_torn_line_aside_may_end_at_any_edge_too(tmp_path, began):
    end = ended(began, tmp_path / "whole", one_round).index("write ledger.jsonl") + 1
    ended(began, tmp_path / "torn", one_round, end, half=True)
    assert not (tmp_path / "torn" / "state" / "ledger.jsonl").read_bytes().endswith(b"\n")
    calls = ended(tmp_path / "torn", tmp_path / "mended", one_round)
    assert "ftruncate ledger.jsonl" in calls
    for end in range(1, calls.index("draw") + 1):
        done = ended(tmp_path / "torn", tmp_path / str(end), one_round, end)
        for cut in CUTS:
            assert again(after(tmp_path / str(end), cut))[:2] == (lasting(done, cut), 1)


@pytest.mark.system
@pytest.mark.usefixtures("quick")
def test_adopting_ended_at_any_edge_never_starts_an_empty_ledger(tmp_path, began):
    with open_site(began / "state") as (ledger, outbox):
        release(ledger, outbox, a_round(), draw)

    def work(root, edge):
        adopt_ledger(root / "state", 3.0, 1e-5)

    for end in range(1, len(ended(began, tmp_path / "whole", work)) + 1):
        ended(began, tmp_path / str(end), work, end)
        for cut in CUTS:
            state = after(tmp_path / str(end), cut) / "state"
            with suppress(SiteError), Ledger(state) as ledger:
                assert len(list_events(ledger.spending)) == 1
                if find_adopted(ledger.spending):
                    continue
            adopt_ledger(state, 3.0, 1e-5)
            with Ledger(state) as ledger:
                assert find_adopted(ledger.spending).epsilon == 3.0
                assert len(list_events(ledger.spending)) == 1


def note(path, text):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{text}\n".encode())
    os.close(file)


def busy(root, seed):
    """Rounds without end, some sent twice, each draw and each send noted elsewhere first."""
    choose = random.Random(seed)  # noqa: S311
    with open_site(root / "state") as (ledger, outbox):
        number = max([1, *(int(p.noise_multiplier) for p in list_events(ledger.spending))])
        while True:
            what = a_round(number, noise=float(number))

            def work(number=number):
                note(root / "draws", number)
                return draw()

            data = release(ledger, outbox, what, work)
            note(root / "sends", f"{number} {data.hex()}")
            number += choose.random() < 0.7


@pytest.mark.system
def test_fifty_random_kills_lose_nothing_and_change_nothing_that_left(tmp_path):
    kills, choose = 50, random.Random(1)  # noqa: S311
    for seed in range(kills):
        pid = os.fork()
        if not pid:
            with suppress(BaseException):
                busy(tmp_path, seed)
            os._exit(1)
        time.sleep(choose.uniform(0.01, 0.12))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    drawn = Counter(int(line) for line in (tmp_path / "draws").read_text().split())
    counted = Counter(int(p.noise_multiplier) for p in list_events(read_ledger(tmp_path / "state")))
    assert counted >= drawn
    assert sum((counted - drawn).values()) <= kills
    sent = {tuple(line.split()) for line in (tmp_path / "sends").read_text().splitlines()}
    assert len(sent) == len({number for number, _ in sent}) > 3


# --- whatever happens, in whatever order ---


class Killed(BaseException):
    """The process is gone."""


class Hospital(RuleBasedStateMachine):
    """A site through joins, rounds, retries, kills, losses; recounted by hand beside it."""

    rounds = st.builds(
        a_round,
        st.integers(1, 3),
        study=st.sampled_from([STUDY, OTHER]),
        noise=st.sampled_from([1.0, 2.0]),
        private=st.sampled_from([True, True, False]),
        received=st.sampled_from("ab"),
    )

    def __init__(self):
        super().__init__()
        self.fsync, os.fsync = os.fsync, lambda file: None
        self.root, self.lives = Path(tempfile.mkdtemp()), 0
        self.drawn: Counter[tuple[str, float]] = Counter()
        self.unsure = 0
        self.sent: dict[str, bytes] = {}
        self.open()

    @property
    def state(self):
        return self.root / str(self.lives)

    def open(self):
        self.ledger, self.outbox = Ledger(self.state), Outbox(self.state / "outbox")

    def run(self, what, work=draw):
        def drawing():
            if what.privacy:
                self.drawn[what.study, what.privacy.noise_multiplier] += 1
            return work()

        data = release(self.ledger, self.outbox, what, drawing)
        if what.privacy:
            assert self.sent.setdefault(what.key, data) == data

    @rule(what=rounds)
    def round(self, what):
        self.run(what)

    @rule(what=rounds)
    def fails(self, what):
        def work():
            raise ArithmeticError

        with suppress(ArithmeticError):
            self.run(what, work)

    @rule(what=rounds, at=st.integers(1, 12))
    def killed(self, what, at):
        """The disk as it is before call number `at` goes on; the process does not."""
        calls, after = 0, self.root / str(self.lives + 1)
        real = {name: getattr(os, name) for name in ("write", "pwrite", "fsync", "replace")}

        def call(name, *given):
            nonlocal calls
            calls += 1
            if calls == at:
                for each, function in real.items():
                    setattr(os, each, function)
                shutil.copytree(self.state, after)
                raise Killed
            return None if name == "fsync" else real[name](*given)

        for name in real:
            setattr(os, name, lambda *given, name=name: call(name, *given))
        try:
            self.run(what)
        except Killed:
            self.unsure += 1
            self.ledger.close()
            self.lives += 1
            self.open()
        finally:
            for name, function in real.items():
                setattr(os, name, function)

    @rule()
    def restarts(self):
        self.ledger.close()
        self.open()

    @rule(study=st.sampled_from([STUDY, OTHER]))
    def ends(self, study):
        self.outbox.purge(study)
        self.sent.clear()

    @rule()
    def loses_the_outbox(self):
        shutil.rmtree(self.state / "outbox")
        self.outbox = Outbox(self.state / "outbox")
        self.sent.clear()

    @rule()
    def adopts(self):
        self.ledger.close()
        adopt_ledger(self.state, epsilon=0.0, delta=0.0)
        self.open()

    @invariant()
    def no_draw_is_forgotten_and_none_counted_twice(self):
        counted = Counter(
            (study, spent.noise_multiplier)
            for study in (STUDY, OTHER)
            for spent in list_events(self.ledger.spending, study)
        )
        assert counted >= self.drawn
        assert sum((counted - self.drawn).values()) <= self.unsure
        assert list_events(self.ledger.spending) == list_events(read_ledger(self.state))

    def teardown(self):
        os.fsync = self.fsync
        self.ledger.close()
        shutil.rmtree(self.root)


TestHospital = Hospital.TestCase
TestHospital.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None, derandomize=True
)
