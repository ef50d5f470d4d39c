"""A hospital's connection against the real link over TLS, on networks that fail in every way."""

import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from client.link import fleet_client as fleets
from client.link.fleet_client import Envelope, Fleet, NotAdmittedError, OverError
from client.link.pending import PendingMessage
from client.site import Site
from common.config.yaml import dump
from common.errors import ContractError, LinkError, SiteError
from common.flower.compat import VERSION
from common.flower.messages import limit_message, message_from_proto, pack_message
from common.support import keys
from server.link.grid import LinkGrid, open_grid
from server.link.sites import Sites, SiteVersions
from server.project import certificates
from server.project.project import Project
from simulations.demo.loopback import find_free_port
from tests.processes import link_up

LIMIT = limit_message([12_000_256])


class Coordinator:
    """A project that is served, and one hospital's connection to it."""

    def __init__(self, project: Project) -> None:
        self.project, self.sites = project, Sites(project)
        self.ca = certificates.find_authority_file(project.folder)
        self.address = f"localhost:{project.settings.port}"

    def admitted(self) -> tuple[keys.PrivateKey, str]:
        key, name = keys.new(), f"site-{time.monotonic_ns()}"
        self.sites.admit(key.public_key(), name)
        return key, name

    @contextmanager
    def fleet(self, key: keys.PrivateKey | None = None, address: str = "") -> Iterator[Fleet]:
        """Of a site that has arrived; by default a new one."""
        fleet = Fleet(address or self.address, self.ca, key or self.admitted()[0])
        fleet.activate(None)
        try:
            yield fleet
        finally:
            with suppress(LinkError):
                fleet.deactivate()
            fleet.close()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    folder = tmp_path_factory.mktemp("coordinator") / "project"
    project = Project.create(folder, ("localhost",), find_free_port())
    with link_up(project):
        yield Coordinator(project)


class Wire:
    """A network between a site and the link that can lose answers."""

    def __init__(self, port: int) -> None:
        self._to, self.lose = port, 0
        """The answer that is lost, counted from now; 0 for none."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"localhost:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            here, _ = self._listening.accept()
            there = socket.create_connection(("127.0.0.1", self._to))
            for source, sink, answers in ((here, there, False), (there, here, True)):
                threading.Thread(target=self._pass, args=(source, sink, answers)).start()

    def _pass(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 20):
                if answers and data[0] == 23:  # TLS: application data, after the handshake
                    self.lose -= 1
                    if self.lose == 0:
                        break
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def content(numbers: int = 4) -> RecordDict:
    array = np.arange(numbers, dtype=np.float32)
    return RecordDict({"arrays": ArrayRecord({"weight": Array(array)})})


def ask(grid: LinkGrid, node: int, what: RecordDict) -> str:
    """Lay a message out; its id."""
    (identity,) = grid.push_messages([grid.create_message(what, "query", node, "")])
    return identity


def hear(grid: LinkGrid, identity: str) -> Message:
    for _ in range(200):
        if replies := grid.pull_messages([identity]):
            return replies[0]
        time.sleep(0.02)
    raise AssertionError("no reply")


def numbers(message: Message) -> list[float]:
    array = message.content.array_records["arrays"]["weight"].numpy()
    return [float(x) for x in array]


def pulled(fleet: Fleet) -> Envelope:
    envelope = fleet.pull_envelope()
    assert envelope is not None
    return envelope


def test_a_message_comes_whole_and_its_reply_arrives(coordinator: Coordinator) -> None:
    with coordinator.fleet() as fleet, open_grid(coordinator.project.database) as grid:
        assert fleet.pull_envelope() is None
        (node,) = grid.get_node_ids()
        identity = ask(grid, node, content(3_000_000))  # in parts of 5 MiB
        envelope = pulled(fleet)
        assert fleet.pull_envelope() == envelope
        assert fleet.read_version(envelope) == VERSION
        message = fleet.pull_message(envelope, LIMIT)
        assert message is not None
        assert len(numbers(message)) == 3_000_000
        fleet.push_reply(envelope, Message(content(5), reply_to=message))
        reply = hear(grid, identity)
        assert numbers(reply) == [0, 1, 2, 3, 4]
        assert reply.metadata.created_at == message.metadata.created_at  # tells no time of work
        assert fleet.pull_message(envelope, LIMIT) is None
    with coordinator.fleet() as fleet, pytest.raises(OverError):
        fleet.read_version(envelope)
    told = SiteVersions.read(coordinator.project.versions)
    assert set(told.values()) == {VERSION}


def test_a_reply_whose_answers_are_lost_is_sent_again_and_counts_once(
    coordinator: Coordinator,
) -> None:
    wire = Wire(coordinator.project.settings.port)
    with (
        coordinator.fleet(address=wire.address) as fleet,
        open_grid(coordinator.project.database) as grid,
    ):
        (node,) = grid.get_node_ids()
        losses = 0
        for answer in (1, 2, 3, 5):  # of the envelope, and of its parts
            identity = ask(grid, node, content())
            envelope = pulled(fleet)
            reply = Message(content(answer + 2), reply_to=fleet.pull_message(envelope, LIMIT))
            wire.lose = answer
            try:
                fleet.push_reply(envelope, reply)
            except LinkError:
                losses += 1
                fleet.push_reply(envelope, reply)
            wire.lose = 0
            assert numbers(hear(grid, identity)) == [*range(answer + 2)]
            assert grid.pull_messages([identity])[0].has_error()  # it is gone, and came once
            fleet.push_reply(envelope, reply)  # nobody waits: nothing happens
            assert fleet.pull_message(envelope, LIMIT) is None
        assert losses >= 3


def test_a_message_that_was_lost_on_its_way_comes_again(coordinator: Coordinator) -> None:
    wire = Wire(coordinator.project.settings.port)
    with (
        coordinator.fleet(address=wire.address) as fleet,
        open_grid(coordinator.project.database) as grid,
    ):
        (node,) = grid.get_node_ids()
        identity = ask(grid, node, content())
        wire.lose = 1
        with pytest.raises(LinkError, match="expected an answer, got none"):
            fleet.pull_envelope()
        assert pulled(fleet).identity == identity


def lay_out_slowly(grid: LinkGrid, node: int) -> Callable[[], None]:
    """Announce a message; its parts arrive when what this gives is called."""
    packed = pack_message(grid.create_message(content(), "query", node, ""))
    state, run = grid._state, grid.run.run_id
    session = state.start_session(run)
    asked = message_from_proto(packed.envelope)
    _, missing = state.store_message_and_object_tree(asked, packed.tree, session)

    def go_on() -> None:
        for name in missing:
            time.sleep(0.1)
            state.store_object(run, session, name, packed.objects[name])

    return go_on


def test_a_message_that_is_still_being_laid_out_is_waited_for(coordinator: Coordinator) -> None:
    with coordinator.fleet() as fleet, open_grid(coordinator.project.database) as grid:
        (node,) = grid.get_node_ids()
        slowly = lay_out_slowly(grid, node)
        envelope = pulled(fleet)
        thread = threading.Thread(target=slowly)
        thread.start()
        message = fleet.pull_message(envelope, LIMIT)
        thread.join()
        assert message is not None
        assert numbers(message) == [0, 1, 2, 3]


def test_nobody_reads_on_once_a_site_hung_up(coordinator: Coordinator) -> None:
    """Who did would read from a later connection, which gets the same number, and break it."""
    fleet = Fleet(coordinator.address, coordinator.ca, coordinator.admitted()[0])
    with open_grid(coordinator.project.database) as grid:
        node = fleet.activate(None)
        lay_out_slowly(grid, node)
        envelope = pulled(fleet)
        before = set(threading.enumerate())
        reading = threading.Thread(target=fleet.pull_message, args=(envelope, LIMIT))
        reading.start()
        time.sleep(0.5)
        fleet.deactivate()
        readers = [one for one in set(threading.enumerate()) - before if "Pool" in one.name]
        fleet.close()
        assert readers
        assert not [one for one in readers if one.is_alive()]
        reading.join()


def test_what_is_no_message_is_said_to_be_none(coordinator: Coordinator) -> None:
    with coordinator.fleet() as fleet, open_grid(coordinator.project.database) as grid:
        (node,) = grid.get_node_ids()
        packed = pack_message(grid.create_message(content(), "query", node, ""))
        part = packed.tree.children[0]
        packed.envelope.metadata.message_id = part.object_id  # its content stands for the whole
        state, run = grid._state, grid.run.run_id
        session = state.start_session(run)
        envelope = message_from_proto(packed.envelope)
        _, missing = state.store_message_and_object_tree(envelope, part, session)
        for name in missing:
            state.store_object(run, session, name, packed.objects[name])
        with pytest.raises(ContractError, match="cannot be read"):
            fleet.pull_message(pulled(fleet), LIMIT)


def test_an_errand_survives_its_process(coordinator: Coordinator, tmp_path: Path) -> None:
    with coordinator.fleet() as fleet, open_grid(coordinator.project.database) as grid:
        (node,) = grid.get_node_ids()
        asked = [ask(grid, node, content(n)) for n in (1, 2)]
        envelope = pulled(fleet)
        assert PendingMessage(tmp_path).envelope is None
        PendingMessage(tmp_path).store_message(envelope)
        again = PendingMessage(tmp_path)
        assert (again.envelope, again.reply) == (envelope, None)
        reply = Message(content(7), reply_to=fleet.pull_message(envelope, LIMIT))
        again.store_reply(reply)
        kept = PendingMessage(tmp_path)
        assert kept.reply is not None
        assert (
            pack_message(kept.reply).envelope == pack_message(reply).envelope
        )  # the very same, by its SHA-256
        assert not any(path.stat().st_mode & 0o077 for path in tmp_path.iterdir())
        fleet.push_reply(envelope, kept.reply)
        assert numbers(hear(grid, asked[0])) == [*range(7)]
        PendingMessage(tmp_path).store_message(pulled(fleet))
        assert PendingMessage(tmp_path).reply is None
        (tmp_path / "letter").write_bytes(b"\xff" * 9)
        assert PendingMessage(tmp_path).envelope is None
        PendingMessage(tmp_path).drop()
        assert not list(tmp_path.iterdir())


def test_only_its_number_lets_a_killed_site_in_at_once(coordinator: Coordinator) -> None:
    key, name = coordinator.admitted()
    fleet = Fleet(coordinator.address, coordinator.ca, key)
    number = fleet.activate(None)
    killed = Fleet(coordinator.address, coordinator.ca, key)
    with pytest.raises(LinkError, match="expected this site to be away"):
        killed.activate(None)
    assert killed.activate(number) == number
    coordinator.sites.remove(name)
    with pytest.raises(NotAdmittedError, match="expected a key that the coordinator admitted"):
        killed.activate(number)
    coordinator.sites.admit(key.public_key(), name)
    assert killed.activate(number) != number
    killed.deactivate()
    fleet.close()
    killed.close()


def test_checking_the_admission_tells_and_changes_nothing(coordinator: Coordinator) -> None:
    key, name = coordinator.admitted()
    fleet = Fleet(coordinator.address, coordinator.ca, key)
    assert fleet.heard is None
    fleet.check_admitted()
    assert not next(site for site in coordinator.sites.list_sites() if site.name == name).connected
    assert fleet.heard is not None
    assert fleet.heard.version == VERSION
    assert abs(fleet.heard.ahead or 0) < 2
    assert fleet.heard.until == certificates.read_expiry(coordinator.project.folder)
    stranger = Fleet(coordinator.address, coordinator.ca, keys.new())
    with pytest.raises(NotAdmittedError):
        stranger.check_admitted()
    assert stranger.heard is not None
    fleet.close()
    stranger.close()


def refusal(fleet: Fleet) -> str:
    with pytest.raises(LinkError) as caught:
        fleet.activate(None)
    fleet.close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_answer_and_no_name(coordinator: Coordinator) -> None:
    key = keys.new()
    nobody = Fleet(f"localhost:{find_free_port()}", coordinator.ca, key)
    assert "expected an answer, got none. Is the coordinator up" in refusal(nobody)
    nowhere = Fleet("no-such-host.invalid:443", coordinator.ca, key)
    assert "expected a name that this machine can look up" in refusal(nowhere)


def test_another_authority_and_another_name(coordinator: Coordinator, tmp_path: Path) -> None:
    other = Project.create(tmp_path / "other", ("link.example.org",), find_free_port())
    ca = certificates.find_authority_file(other.folder)
    told = refusal(Fleet(coordinator.address, ca, keys.new()))
    assert f"expected a certificate that {ca} vouches for, got" in told
    assert "compare fingerprints" in told
    with served(other.folder, 200, b"") as port:
        named = Fleet(f"127.0.0.2:{port}", ca, keys.new())
        assert "the name that the coordinator gave you?" in refusal(named)


def test_a_certificate_that_expired_or_is_not_valid_yet(tmp_path: Path) -> None:
    project = Project.create(tmp_path / "project", ("localhost",), find_free_port())
    ca = certificates.find_authority_file(project.folder)
    now = datetime.now(UTC)
    for begins, expected in (
        (now - timedelta(days=800), "consilium-server renew"),
        (now + timedelta(days=3), "is this machine's clock right?"),
    ):
        certificates.write_server(project.folder, ("localhost",), begins)
        with served(project.folder, 200, b"") as port:
            assert expected in refusal(Fleet(f"localhost:{port}", ca, keys.new()))


def test_what_is_no_coordinator(coordinator: Coordinator) -> None:
    folder, key = coordinator.project.folder, keys.new()
    with served(None, 200, b"") as port:
        told = refusal(Fleet(f"localhost:{port}", coordinator.ca, key))
        assert "expected a coordinator, which speaks TLS, got something else" in told
    for status, body, expected in (
        (200, b"<html>", "what answered is no coordinator"),
        (503, b"", "it answers with status 503"),
        (426, json.dumps({"code": 1001, "detail": "x"}).encode(), "install the same release"),
    ):
        with served(folder, status, body) as port:
            assert expected in refusal(Fleet(f"localhost:{port}", coordinator.ca, key))


def test_a_coordinator_cannot_send_a_site_elsewhere(coordinator: Coordinator) -> None:
    """Into the hospital's own network, for instance."""
    with (
        socket.create_server(("127.0.0.1", 0)) as inside,
        served(coordinator.project.folder, 307, b"", inside.getsockname()[1]) as port,
    ):
        fleet = Fleet(f"localhost:{port}", coordinator.ca, keys.new())
        assert "status 307" in refusal(fleet)
        inside.settimeout(0.2)
        with pytest.raises(TimeoutError):
            inside.accept()


@pytest.mark.parametrize("off", [20, -400])
def test_a_clock_that_is_off(
    off: int, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=off)

    monkeypatch.setattr(fleets, "datetime", Shifted)
    now = time.time_ns
    monkeypatch.setattr("common.support.signing.read_clock", lambda: now() + off * 10**9)
    told = refusal(Fleet(coordinator.address, coordinator.ca, coordinator.admitted()[0]))
    assert "expected clocks that agree to five seconds, got" in told
    seen = float(told.partition(", got ")[2].partition(" s here")[0])
    assert off <= seen <= off + 4  # HTTP dates are whole seconds, and made now and then


@contextmanager
def served(folder: Path | None, status: int, body: bytes, elsewhere: int = 0) -> Iterator[int]:
    """Something that answers everything alike, with the certificate of a project if it has one."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            if elsewhere:
                self.send_header("location", f"http://127.0.0.1:{elsewhere}/")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass

    serving = Server(("0.0.0.0", 0), Answers)  # noqa: S104
    if folder is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem")
        serving.socket = context.wrap_socket(serving.socket, server_side=True)
    thread = threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield serving.server_port
    serving.shutdown()
    serving.server_close()


def spoil_key(key: Path, ca: Path) -> None:
    key.write_text("no key")


def open_key(key: Path, ca: Path) -> None:
    key.chmod(0o640)


def lose_key(key: Path, ca: Path) -> None:
    key.unlink()


def spoil_ca(key: Path, ca: Path) -> None:
    ca.write_text("no certificate")


def lose_ca(key: Path, ca: Path) -> None:
    ca.unlink()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (spoil_key, "site.key: expected a private key, PEM, got something else"),
        (open_key, "expected a file closed to other users, got mode 640. chmod 600"),
        (lose_key, "site.key: expected a key that can be read, got No such file"),
        (spoil_ca, "ca.crt: expected the coordinator's certificate, PEM, got something else"),
        (lose_ca, "ca.crt: expected the coordinator's certificate, PEM, got No such file"),
    ],
)
def test_files_that_cannot_be_used(
    spoil: Callable[[Path, Path], None], expected: str, coordinator: Coordinator, tmp_path: Path
) -> None:
    key, ca = tmp_path / "site.key", tmp_path / "ca.crt"
    keys.write_private(key, keys.new())
    ca.write_bytes(coordinator.ca.read_bytes())
    site = site_in(tmp_path, {"server": coordinator.address, "ca": "ca.crt", "key": "site.key"})
    Fleet.open(site, site.connect[0]).close()
    spoil(key, ca)
    with pytest.raises(LinkError) as caught:
        Fleet.open(site, site.connect[0])
    assert expected in str(caught.value)


def site_in(folder: Path, connect: dict[str, str] | None) -> Site:
    about = {"name": "east", "data": {"format": "manifest", "root": "x"}, "state": "state"}
    path = folder / "site.yaml"
    path.write_text(dump(about | ({"connect": connect} if connect else {})))
    return Site.read(path)


def test_a_site_file_must_say_where(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="connect: expected server, ca and key, got nothing"):
        site_in(tmp_path, None).list_connections()
    for server_ in ("localhost", "localhost:0", "localhost:70000", "https://x:1", "a b:1", ":443"):
        with pytest.raises(SiteError, match="expected host:port"):
            site_in(tmp_path, {"server": server_, "ca": "ca.crt", "key": "site.key"})
