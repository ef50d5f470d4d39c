"""A hospital's node with the real app, over TLS: whatever is killed, it answers once."""

import hashlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path

import pytest
import yaml
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.fab import Fab

from client.cli import main as cli
from client.ledger.entries import Sent
from client.ledger.ledger import read_ledger
from client.link import node as node_module
from client.link.node import Node
from common.config.study import Study
from common.errors import RunError
from common.flower.compat import APP, VERSION
from common.flower.database import NOOP_FEDERATION_ID, NOOP_FLWR_AID, TaskType, open_state
from common.flower.messages import identify_task, record_to_bytes
from common.model.network import assemble
from common.protocol.fields import ARRAYS, CONFIG
from common.protocol.join import JoinReply, JoinRequest
from common.protocol.round import make_round_config
from common.protocol.tensors import to_arrays
from common.support import keys
from server.link.grid import LinkGrid, open_grid
from server.link.sites import Sites
from server.project import certificates
from server.project.project import Project
from simulations.demo.loopback import find_free_port
from tests.builders import OPEN, PHANTOM_CLASSES, make_study, write_site
from tests.processes import link_up
from tests.system.test_fleet_client import lay_out_slowly

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["client.link.node"])  # seconds, once
study = partial(
    make_study,
    name="together",
    classes=PHANTOM_CLASSES,
    train={"rounds": 9, "local_epochs": 1, "batch_size": 8},
    holdout={"validation": 0.05, "test": 0.05},  # each hospital's secret draws who trains: somebody
    aggregate={"quorum": 1},
)


def until(there: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


class World:
    """A coordinator whose link can be up or down, and one hospital."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.project = Project.create(folder / "project", ("localhost",), find_free_port())
        self.sites = Sites(self.project)
        self.key = keys.new()
        keys.write_private(folder / "site.key", self.key)
        self.sites.admit(self.key.public_key(), "north")
        ca = str(certificates.find_authority_file(self.project.folder))
        server_ = f"localhost:{self.project.settings.port}"
        self.site = write_site(
            folder,
            name="north",
            data={"format": "manifest", "root": str(data)},
            connect={"server": server_, "ca": ca, "key": "site.key"},
        )
        self.link = folder / "state" / "link" / server_.replace(":", "-")

    def up(self) -> AbstractContextManager[int]:
        """The link, served by a thread."""
        return link_up(self.project)

    @property
    def connected(self) -> bool:
        return self.sites.list_sites()[0].connected

    @contextmanager
    def node(self) -> Iterator[threading.Event]:
        """The node as a thread of this process; the event stops it."""
        stop = threading.Event()
        node = Node(self.site, stop)
        thread = threading.Thread(target=node.serve, daemon=True)
        thread.start()
        try:
            yield stop
        finally:
            stop.set()
            thread.join(60)
            assert not thread.is_alive()

    def start(self, monkeypatch: pytest.MonkeyPatch) -> "Process":
        """`consilium-client start` as a process of its own."""
        monkeypatch.setattr(sys, "argv", ["consilium-client", "start", str(self.site)])
        process = PROCESSES.Process(target=cli.main, daemon=True)
        process.start()
        return process

    def log(self) -> str:
        return (self.folder / "state/logs/client.log").read_text("utf-8")

    def left(self) -> list[Sent]:
        """Every message that left the hospital."""
        return [one for one in read_ledger(self.folder / "state") if isinstance(one, Sent)]


@pytest.fixture
def world(
    tmp_path: Path,
    phantoms: Path,
    new_process: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    new_process()
    monkeypatch.setattr(node_module, "_IDLE", 0.1)
    return World(tmp_path, phantoms / "west")


def request(wanted: Study, number: int) -> RecordDict:
    """Of a round, as a strategy makes it."""
    tensors = assemble(wanted, "none").tensors
    config = ConfigRecord({**make_round_config(wanted.id), "server-round": number})
    return RecordDict({ARRAYS: to_arrays(tensors), CONFIG: config})


def ask(grid: LinkGrid, kind: str, content: RecordDict) -> str:
    until(grid.get_node_ids)
    (node,) = grid.get_node_ids()
    (identity,) = grid.push_messages([grid.create_message(content, kind, node, "")])
    return identity


def hear(grid: LinkGrid, identity: str) -> Message:
    found: list[Message] = []
    until(lambda: found or found.extend(grid.pull_messages([identity])))
    return found[0]


def exchange(grid: LinkGrid, kind: str, content: RecordDict) -> Message:
    return hear(grid, ask(grid, kind, content))


def join(wanted: Study) -> RecordDict:
    return JoinRequest(proposal=wanted.proposal()).record()


def test_it_answers_with_its_own_app_and_says_so(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "client")
    wanted = study()
    with world.up(), world.node(), open_grid(world.project.database) as grid:
        joined = JoinReply.read(exchange(grid, "query", join(wanted)).content)
        assert joined.name == "north"
        for number in (1, 2):
            reply = exchange(grid, "train", request(wanted, number))
            assert set(reply.content.array_records[ARRAYS]) == set(assemble(wanted, "none").shapes)
        assert world.connected
        assert not list(world.link.glob("letter"))
    assert not world.connected
    assert [one.release.kind for one in world.left()] == ["join", "round", "round"]
    assert (
        world.left()[-1].contents.sha256
        == hashlib.sha256(record_to_bytes(reply.content)).hexdigest()
    )
    for said in (
        f"connected to localhost:{world.project.settings.port}",
        f"study together ({wanted.id}) asks this site to join",
        "study together: round 2 answered in",
    ):
        assert said in caplog.text


MALICE = """
from pathlib import Path
Path({proof!r}).write_text(Path({secret!r}).read_text())
from flwr.clientapp import ClientApp
app = ClientApp()
"""


def test_code_that_comes_with_a_run_is_neither_fetched_nor_run(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle whose client/app.py reads a file of the hospital, from an admitted coordinator."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    secret, proof = tmp_path / "patients.csv", tmp_path / "stolen"
    secret.write_text("DOE, JOHN")
    code = MALICE.format(proof=str(proof), secret=str(secret)).encode()
    state = open_state(world.project.database)
    bundle = Fab(hashlib.sha256(code).hexdigest(), code, {})
    stored = state.store_fab(bundle)
    asked: list[str] = []
    monkeypatch.setattr(state.__class__, "get_fab", lambda _, name: asked.append(name))
    with world.up(), world.node():
        for name, release, fab in (
            (APP, VERSION, stored),
            ("flwrlabs/other", VERSION, ""),
            (APP, "0.9.1", ""),
            (APP, "", ""),
        ):
            with _run(world, name, release, fab) as grid:
                reply = exchange(grid, "query", join(study()))
                assert reply.has_error()
                assert reply.error.reason == "contract"
    assert not proof.exists()
    assert not asked
    assert not (tmp_path / "flwr" / "apps").exists()
    assert not world.left()
    assert "with code" in caplog.text
    assert "expected release 0.1.0, as here, got 0.9.1" in caplog.text


@contextmanager
def _run(world: World, name: str, release: str, fab: str) -> Iterator[LinkGrid]:
    """A run as a coordinator with other software would create it."""
    with open_grid(world.project.database) as grid:
        ours, create = grid.run, grid._state.create_run
        assert (ours.fab_id, ours.fab_version, ours.fab_hash) == (APP, VERSION, "")
        rest = ({}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        number = create(name, release, fab, *rest)
        (task,) = grid._state.get_tasks(run_ids=[number])
        grid._state.claim_task(task.task_id)
        grid._state.activate_task(task.task_id)
        identify_task(task.task_id, number)
        yield LinkGrid(grid._state, number)
        grid._state.stop_run(number)


def test_it_outlives_its_coordinator_and_its_own_admission(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "client")
    monkeypatch.setattr(node_module, "_AGAIN", 0.5)
    with world.node():
        until(lambda: "expected an answer, got none" in caplog.text)
        with world.up():
            until(lambda: world.connected)
            with open_grid(world.project.database) as grid:
                exchange(grid, "query", join(study()))
            world.sites.remove("north")
            until(lambda: "expected a key that the coordinator admitted" in caplog.text)
        assert caplog.text.count("got none. Is the coordinator up") == 1
        world.sites.admit(world.key.public_key(), "north")
        with world.up():
            until(lambda: world.connected)
            with open_grid(world.project.database) as grid:
                exchange(grid, "query", join(study()))
    assert caplog.text.count("connected to") == 2


def ended(process: Process) -> int | None:
    process.join(30)
    return process.exitcode


def kill(process: Process) -> None:
    process.kill()
    assert ended(process) == -signal.SIGKILL


def wait_for_file(world: World, what: str) -> None:
    until(lambda: (world.link / what).exists())


def test_two_nodes_of_one_site_are_one_too_many(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world.up(), world.node():
        until(lambda: world.connected)
        assert ended(world.start(monkeypatch)) == 1
        assert world.connected
        assert not world.log()


def test_killed_at_any_moment_it_answers_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training; between its reply and the coordinator; and while nobody waits any more."""
    wanted = study(train={"rounds": 9, "local_epochs": 1000, "batch_size": 2})
    with open_grid(world.project.database) as grid:
        with world.up():
            process = world.start(monkeypatch)
            exchange(grid, "query", join(wanted))
            first = ask(grid, "train", request(wanted, 1))
            wait_for_file(world, "letter")
            time.sleep(0.1)  # at work
            kill(process)
            assert len(world.left()) == 1
            assert not (world.link / "reply").exists()
            process = world.start(monkeypatch)
            assert hear(grid, first).has_content()
            second = ask(grid, "train", request(wanted, 2))
            wait_for_file(world, "letter")
            time.sleep(0.4)  # fetched whole, also on a busy machine
            assert not (world.link / "reply").exists()
        wait_for_file(world, "reply")  # the link is down: the reply cannot go
        kill(process)
        assert len(world.left()) == 3
        with world.up():
            process = world.start(monkeypatch)
            reply = hear(grid, second)
            sent = hashlib.sha256(record_to_bytes(reply.content)).hexdigest()
            assert [one.contents.sha256 for one in world.left()][2:] == [sent]  # not made again
            ask(grid, "train", request(wanted, 3))
            wait_for_file(world, "letter")
            kill(process)
            grid._withdraw(grid._state.get_message_ids_from_run_id(grid.run.run_id))
            process = world.start(monkeypatch)
            until(lambda: "the answer is dropped" in world.log())
            assert len(world.left()) == 3
            kill(process)
    assert all(line[:2] == "20" for line in world.log().splitlines())
    assert (world.folder / "state/logs").stat().st_mode & 0o077 == 0


def test_it_answers_before_it_stops_unless_told_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = study(train={"rounds": 9, "local_epochs": 300, "batch_size": 2})
    with open_grid(world.project.database) as grid, world.up():
        process = world.start(monkeypatch)
        exchange(grid, "query", join(wanted))
        first = ask(grid, "train", request(wanted, 1))
        wait_for_file(world, "letter")
        os.kill(process.pid or 0, signal.SIGTERM)
        assert hear(grid, first).has_content()
        assert ended(process) == 0
        assert not world.connected
        process = world.start(monkeypatch)
        ask(grid, "train", request(wanted, 2))
        wait_for_file(world, "letter")
        time.sleep(0.5)
        os.kill(process.pid or 0, signal.SIGINT)
        time.sleep(0.2)
        assert process.is_alive()
        os.kill(process.pid or 0, signal.SIGINT)
        assert ended(process) == 130
        assert (world.link / "letter").exists()
    assert world.log().count("stopping, as soon as what is being worked on is answered") == 2
    assert world.log().count("INFO stopped") == 1


def test_told_twice_it_ends_though_a_message_never_comes_whole(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_grid(world.project.database) as grid, world.up():
        process = world.start(monkeypatch)
        until(grid.get_node_ids)
        (node,) = grid.get_node_ids()
        lay_out_slowly(grid, node)
        time.sleep(2)  # it is asking for the first part now, again and again
        os.kill(process.pid or 0, signal.SIGTERM)
        time.sleep(0.5)
        assert process.is_alive()
        os.kill(process.pid or 0, signal.SIGINT)
        assert ended(process) == 130


def test_a_site_admitted_anew_forgets_what_it_was_asked_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it then answered would be another site's reply, refused again and again."""
    monkeypatch.setattr(node_module, "_AGAIN", 0.2)
    with world.up(), open_grid(world.project.database) as grid, world.node():
        until(lambda: world.connected)
        wanted = study()
        assert not exchange(grid, "query", join(wanted)).has_error()
        asked = ask(grid, "train", request(wanted, 1))
        until(lambda: (world.link / "letter").exists())
        world.sites.remove("north")
        world.sites.admit(world.key.public_key(), "north")
        until(lambda: world.connected)
        until(lambda: not (world.link / "letter").exists())
        grid._withdraw([asked])
        assert not exchange(grid, "train", request(wanted, 1)).has_error()


def test_a_run_that_was_paused_too_long_says_how_to_go_on(world: World) -> None:
    with world.up(), open_grid(world.project.database) as grid, world.node():
        until(lambda: world.connected)
        grid._state.stop_run(grid._run_id)
        with pytest.raises(RunError, match=r"counts as ended.*run --resume"):
            ask(grid, "query", join(study()))


def _answer_all(monkeypatch: pytest.MonkeyPatch, content: RecordDict) -> None:
    """Have nodes that start from now on answer every message with this."""

    def answer(message: Message, _: Context) -> Message:
        return Message(content, reply_to=message)

    monkeypatch.setattr(node_module, "make_app", lambda _: answer)


@pytest.mark.parametrize(
    "reply",
    [
        {"config": ConfigRecord({"json": "x" * 2_000_000})},
        {f"c{i}": ConfigRecord({"x": i}) for i in range(99)},
    ],
)
def test_a_reply_beyond_any_answer_is_refused_and_dropped(
    world: World, monkeypatch: pytest.MonkeyPatch, reply: dict[str, ConfigRecord]
) -> None:
    _answer_all(monkeypatch, RecordDict(dict(reply)))
    with world.up(), open_grid(world.project.database) as grid, world.node():
        until(lambda: world.connected)
        asked = ask(grid, "query", join(study()))
        until(lambda: (world.link / "reply").exists())
        until(lambda: not (world.link / "letter").exists())
        assert grid.pull_messages([asked]) == []


def test_two_coordinators_share_one_ledger_and_one_budget(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, each needed a state folder of its own, and so got a whole budget of its own."""
    other = Project.create(world.folder / "other", ("localhost",), find_free_port())
    Sites(other).admit(world.key.public_key(), "north")
    second = {
        "server": f"localhost:{other.settings.port}",
        "ca": str(certificates.find_authority_file(other.folder)),
        "key": "site.key",
    }
    content = yaml.safe_load(world.site.read_text("utf-8"))
    content["connect"] = [content["connect"], second]
    content["data"]["enrolled_patients"] = 20
    content["policy"] = OPEN | {"max_epsilon": 4.0, "delta": 1e-5}
    world.site.write_text(yaml.safe_dump(content), "utf-8")
    privacy = {"mechanism": "dp_sgd", "epsilon": 4.0, "delta": 1e-5, "clip_norm": 1.0}
    private = partial(study, privacy=privacy, select="balanced_accuracy")
    one, two = private(name="one"), private(name="two")
    with (
        world.up(),
        link_up(other),
        world.node(),
        open_grid(world.project.database) as grid,
        open_grid(other.database) as theirs,
    ):

        def put(at: LinkGrid, kind: str, content: RecordDict) -> str:
            """A process is one coordinator for Flower."""
            (task,) = at._state.get_tasks(run_ids=[at.run.run_id])
            identify_task(task.task_id, at.run.run_id)
            return ask(at, kind, content)

        assert not hear(grid, put(grid, "query", join(one))).has_error()
        # Each alone could be paid for; the second is asked for by who knows nothing of the first.
        assert not hear(grid, put(grid, "train", request(one, 1))).has_error()
        mine, his = put(grid, "train", request(one, 2)), put(theirs, "query", join(two))
        assert hear(theirs, his).error.reason == "budget"
        assert not hear(grid, mine).has_error()
        # Nor can he go on with the first, or join it.
        for kind, content in (("train", request(one, 2)), ("query", join(one))):
            assert hear(theirs, put(theirs, kind, content)).error.reason == "refused"
    assert "expected a study of this coordinator, got another's" in caplog.text
    kinds = [entry.release.kind for entry in world.left() if entry.release.name == "one"]
    assert kinds == ["join", "round", "round"]
