"""What a coordinator, or who stole its server's key, tries on a hospital that connects."""

import gzip
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from client.link.fleet_client import Envelope, Fleet
from client.link.limits import MessageLimits
from common.errors import ContractError, LinkError
from common.flower.messages import limit_message
from common.protocol.backbone import BACKBONE, PIECE
from common.support import keys
from server.link import serve
from server.link.grid import open_grid
from server.link.sites import Sites
from server.project import certificates
from server.project.project import Project
from simulations.demo.loopback import find_free_port
from tests.processes import link_up

MIB = 2**20


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.create(tmp_path / "project", ("localhost",), find_free_port())


def connect(project: Project, port: int, memory: Path | None = None) -> Fleet:
    """A hospital that is admitted."""
    key = keys.new()
    Sites(project).admit(key.public_key(), f"site-{port}-{memory and memory.parent.name}")
    return Fleet(f"localhost:{port}", project.folder / "ca.crt", key, memory)


@contextmanager
def answering(folder: Path, answer: Callable[[ssl.SSLSocket, bytes], None]) -> Iterator[int]:
    """A server with the certificate in a folder that answers whatever comes with these bytes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve_all() -> None:
            while True:
                with suppress(OSError):
                    plain, _ = listening.accept()
                    with context.wrap_socket(plain, server_side=True) as peer:
                        answer(peer, peer.recv(65536))
                if listening.fileno() < 0:
                    return

        threading.Thread(target=serve_all, daemon=True).start()
        yield int(listening.getsockname()[1])


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\n"


def test_a_compressed_answer_is_refused_before_it_is_read(project: Project) -> None:
    """One and a half megabytes of it were two gigabytes in memory."""
    asked: list[bytes] = []

    def bomb(peer: ssl.SSLSocket, request: bytes) -> None:
        asked.append(request.lower())
        data = gzip.compress(bytes(64 * MIB))
        lines = b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(data)
        peer.sendall(HEAD + lines + data)

    with (
        answering(project.folder, bomb) as port,
        closing(connect(project, port)) as fleet,
        pytest.raises(LinkError, match="expected a plain answer"),
    ):
        fleet.pull_envelope()
    assert b"accept-encoding: identity\r\n" in asked[0]


def test_an_endless_answer_is_cut_off(project: Project) -> None:
    sent = 0

    def flood(peer: ssl.SSLSocket, _: bytes) -> None:
        nonlocal sent
        peer.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(100):
            peer.sendall(b"100000\r\n" + bytes(MIB) + b"\r\n")
            sent += MIB

    with (
        answering(project.folder, flood) as port,
        closing(connect(project, port)) as fleet,
        pytest.raises(LinkError, match=r"at most 1048576 bytes, got a larger one"),
    ):
        fleet.pull_envelope()
    assert sent < 20 * MIB, "what fits into the buffers of the two sides"


def refuse(fleet: Fleet, number: int, project: Project, kind: str, content: RecordDict) -> None:
    """A message of this kind is not fetched by a site that joined no study."""
    with open_grid(project.database) as grid:
        grid.push_messages([grid.create_message(content, kind, number, "")])
        envelope = fleet.pull_envelope()
        assert envelope is not None
        known = MessageLimits(Path("absent"))
        fetched = 0
        fetch = Fleet._fetch

        def count(self: Fleet, envelope: Envelope, name: str) -> bytes | None:
            nonlocal fetched
            part = fetch(self, envelope, name)
            fetched += len(part or b"")
            return part

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Fleet, "_fetch", count)
            with pytest.raises(ContractError, match="a message "):
                fleet.pull_message(envelope, known.get(envelope.kind))
        assert fetched < limit_message([]).size + 5 * 6 * MIB, "as many at once as travel at once"


@pytest.mark.parametrize(("count", "size"), [(200, 4), (30, 2 * MIB)])
def test_a_message_of_many_or_large_parts_is_not_fetched(
    project: Project, count: int, size: int
) -> None:
    def one(i: int) -> Array:
        return Array("float32", (1,), "numpy.ndarray", i.to_bytes(4, "big") * (size // 4))

    large = RecordDict({"x": ArrayRecord({f"a{i}": one(i) for i in range(count)})})
    with link_up(project) as port, closing(connect(project, port)) as fleet:
        number = fleet.activate(None)
        for kind in ("query", "train", "evaluate", "query.ledger", BACKBONE):
            refuse(fleet, number, project, kind, large)


def test_what_is_expected_follows_the_studies_joined(tmp_path: Path) -> None:
    path = tmp_path / "sizes"
    limits = MessageLimits(path)
    small = limits.get("train")
    assert small == limits.get("query") == limits.get("whatever") == limit_message([])
    assert limits.get(BACKBONE).size > PIECE
    limits.expect({"study": {"weight": (1000, 1000), "bias": (1000,)}})
    for known in (limits, MessageLimits(path)):
        assert 4_004_000 < known.get("train").size < 4_200_000 + small.size
        assert known.get("train") == known.get("evaluate")
        assert known.get("query") == small
    limits.expect({f"other-{i}": {"weight": (i,)} for i in range(99)})
    assert limits.get("train").size < 2 * small.size, "studies of long ago are forgotten"
    path.write_text("{]")
    assert MessageLimits(path).get("train") == small


def test_a_stolen_key_is_of_no_use_once_a_newer_was_shown(project: Project, tmp_path: Path) -> None:
    stolen, memory = tmp_path / "stolen", tmp_path / "certificate"
    long_ago = datetime.now(UTC) - timedelta(days=3)
    certificates.write_server(project.folder, ("localhost",), long_ago)
    shutil.copytree(project.folder, stolen)
    heard: list[bytes] = []

    def overhear(peer: ssl.SSLSocket, request: bytes) -> None:
        heard.append(request)
        peer.sendall(HEAD + b"content-length: 0\r\n\r\n")

    with answering(stolen, overhear) as thief, link_up(project) as port:
        fleet = connect(project, port, memory)
        fleet.check_admitted()
        fleet.close()
        again = connect(project, thief, memory)
        with suppress(LinkError):
            again.check_admitted()
        again.close()
        assert heard, "until then nothing tells the two apart"
    heard.clear()
    project.renew(())
    with answering(stolen, overhear) as thief, link_up(project) as port:
        fleet = Fleet(f"localhost:{port}", project.folder / "ca.crt", keys.new(), memory)
        with suppress(LinkError):
            fleet.check_admitted()
        fleet.close()
        late = Fleet(f"localhost:{thief}", project.folder / "ca.crt", keys.new(), memory)
        with pytest.raises(LinkError, match=r"no older than the last.*tell the coordinator"):
            late.check_admitted()
        late.close()
    assert heard == [b""], "not a byte of a request was sent"
    assert memory.stat().st_mode & 0o077 == 0


def test_a_running_link_renews_and_drops_no_connection(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_LOOK", 0.1)
    begun = datetime.now(UTC) - timedelta(days=2)
    certificates.write_server(project.folder, ("localhost",), begun)
    with link_up(project) as port:
        fleet = connect(project, port)
        fleet.activate(None)
        assert fleet.heard is not None
        before = fleet.heard.until
        issued = begun - timedelta(days=10)
        certificates.write_server(project.folder, ("localhost",), issued)  # which is due
        for _ in range(100):
            assert fleet.send_heartbeat()
            if fleet.heard.until > before:
                break
            threading.Event().wait(0.05)
        assert fleet.heard.until == certificates.read_expiry(project.folder) > before
        fleet.close()
        (project.folder / "server.pem").write_text("damaged")
        threading.Event().wait(0.3)
        with httpx.Client(verify=ssl.create_default_context(cafile=project.folder / "ca.crt")) as c:
            assert c.get(f"https://localhost:{port}/").status_code == 404, "the old one holds"
