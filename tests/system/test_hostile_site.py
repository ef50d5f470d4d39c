"""What an admitted hospital, or who overheard one, tries on the coordinator's link."""

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from client.link.fleet_client import Envelope, Fleet, OverError
from common.errors import LinkError
from common.flower.messages import (
    ObjectTree,
    Packed,
    limit_message,
    pack_message,
    recorddict_to_proto,
)
from common.flower.supernode import (
    DeactivateNodeRequest,
    Node,
    PushMessagesRequest,
    PushObjectRequest,
    SendNodeHeartbeatRequest,
)
from common.support import keys, signing
from server.link import door, serve
from server.link.grid import LinkGrid, open_grid
from server.link.sites import Sites
from server.project.project import Project
from simulations.demo.loopback import find_free_port
from tests.processes import link_up

MIB = 2**20


class Hospital:
    """An admitted site that sends whatever it likes, well signed unless it says otherwise."""

    def __init__(self, project: Project) -> None:
        self.key, self.server = keys.new(), f"localhost:{project.settings.port}"
        Sites(project).admit(self.key.public_key(), f"site-{time.monotonic_ns()}")
        self.trust = ssl.create_default_context(cafile=project.folder / "ca.crt")
        self.fleet = Fleet(self.server, project.folder / "ca.crt", self.key)
        self.number = self.fleet.activate(None)
        self.raw = httpx.Client(base_url=f"https://{self.server}", verify=self.trust)

    @property
    def node(self) -> Node:
        return Node(node_id=self.number)

    @property
    def heartbeat(self) -> bytes:
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=15)
        data: bytes = request.SerializeToString()
        return data

    def headers(self, path: str, body: bytes, host: str = "") -> dict[str, str]:
        signed = signing.sign_request(self.key, "POST", path, host or self.server, body)
        return {signing.HEADER: signed, "content-type": PROTOBUF_MEDIA_TYPE}

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> int:
        return self.raw.post(path, content=body, headers=headers).status_code

    def announce(self, envelope: Envelope, reply: Packed) -> str:
        """Announce a reply; the session for its parts."""
        request = PushMessagesRequest(
            node=self.node, messages_list=[reply.envelope], message_object_trees=[reply.tree]
        )
        return str(self.fleet._ask(self.fleet._client.PushMessages, request).session_id)

    def push(self, envelope: Envelope, session: str, name: str, data: bytes) -> bool:
        request = PushObjectRequest(
            node=self.node,
            run_id=envelope.run,
            session_id=session,
            object_id=name,
            object_content=data,
        )
        return bool(self.fleet._ask(self.fleet._client.PushObject, request).stored)

    def close(self) -> None:
        with suppress(LinkError):
            self.fleet.deactivate()
        self.fleet.close()
        self.raw.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("coordinator") / "project"
    made = Project.create(folder, ("localhost", "127.0.0.1"), find_free_port())
    with link_up(made):
        yield made


@pytest.fixture
def hospital(project: Project) -> Iterator[Hospital]:
    made = Hospital(project)
    yield made
    made.close()


@contextmanager
def asked(hospital: Hospital, project: Project) -> Iterator[tuple[LinkGrid, Envelope, Message]]:
    """A small question that the hospital was asked."""
    with open_grid(project.database) as grid:
        content = RecordDict({"config": ConfigRecord({"x": 1})})
        grid.push_messages([grid.create_message(content, "query", hospital.number, "")])
        envelope = hospital.fleet.pull_envelope()
        assert envelope is not None
        message = hospital.fleet.pull_message(envelope, limit_message([]))
        assert message is not None
        yield grid, envelope, message


def arrays(count: int, size: int) -> ArrayRecord:
    def one() -> Array:
        return Array("float32", (1,), "numpy.ndarray", os.urandom(size))

    return ArrayRecord({f"a{i:04d}": one() for i in range(count)})


def on_disk(project: Project) -> int:
    return sum(path.stat().st_size for path in project.folder.glob("link.db*"))


# --- the disk ---


@pytest.mark.parametrize(("count", "size"), [(300, 1), (20, 4 * MIB)])
def test_a_reply_of_many_or_large_parts_does_not_fill_the_disk(
    hospital: Hospital, project: Project, count: int, size: int
) -> None:
    with asked(hospital, project) as (_, envelope, message):
        before = on_disk(project)
        reply = pack_message(Message(RecordDict({"x": arrays(count, size)}), reply_to=message))
        stored = 0

        def send() -> None:
            nonlocal stored
            session = hospital.announce(envelope, reply)
            for name, data in reply.objects.items():
                stored += hospital.push(envelope, session, name, data) * len(data)

        with pytest.raises(OverError, match="as large as this"):
            send()
        assert stored <= limit_message([]).size
        assert on_disk(project) < before + 4 * MIB


def test_announcing_again_gives_no_new_allowance(hospital: Hospital, project: Project) -> None:
    with asked(hospital, project) as (_, envelope, message):
        reply = pack_message(Message(RecordDict({"x": arrays(9, MIB // 4)}), reply_to=message))
        stored = 0
        for name, data in reply.objects.items():
            with suppress(OverError):
                session = hospital.announce(envelope, reply)
                stored += hospital.push(envelope, session, name, data) * len(data)
        assert MIB // 2 < stored <= limit_message([]).size


def test_an_object_that_was_not_announced_is_not_stored(
    hospital: Hospital, project: Project
) -> None:
    with asked(hospital, project) as (_, envelope, message):
        reply = pack_message(Message(RecordDict(), reply_to=message))
        other = pack_message(Message(RecordDict({"x": arrays(1, 99)}), reply_to=message))
        session = hospital.announce(envelope, reply)
        (name,) = [one for one, data in other.objects.items() if data.startswith(b"ArrayChunk")]
        assert not hospital.push(envelope, session, name, other.objects[name])
        for elsewhere in ("", "another"):
            with pytest.raises(LinkError, match="410"):
                hospital.push(envelope, elsewhere, name, other.objects[name])


def test_an_envelope_carries_no_content_and_names_its_own_tree(
    hospital: Hospital, project: Project
) -> None:
    with asked(hospital, project) as (_, envelope, message):
        reply = pack_message(Message(RecordDict(), reply_to=message))
        inside = PushMessagesRequest(
            node=hospital.node,
            messages_list=[reply.envelope],
            message_object_trees=[reply.tree],
        )
        smuggled = RecordDict({"x": ConfigRecord({"json": "x" * 10_000})})
        inside.messages_list[0].content.CopyFrom(recorddict_to_proto(smuggled))
        two = PushMessagesRequest(
            node=hospital.node,
            messages_list=[reply.envelope] * 2,
            message_object_trees=[reply.tree] * 2,
        )
        for request in (inside, two):
            with pytest.raises(LinkError, match="403"):
                hospital.fleet._ask(hospital.fleet._client.PushMessages, request)
        with pytest.raises(LinkError, match="403"):
            hospital.announce(envelope, reply._replace(tree=ObjectTree(object_id="0" * 64)))


@pytest.mark.parametrize(("count", "size"), [(5, 500_000), (550, 10)])
def test_a_reply_as_large_as_the_tensors_it_answers_is_taken(
    hospital: Hospital, project: Project, count: int, size: int
) -> None:
    """Equal tensors travel once in the question, and differ in the answer."""
    same = {f"a{i}": Array(np.zeros(size, np.float32)) for i in range(count)}
    with open_grid(project.database) as grid:
        content = RecordDict({"arrays": ArrayRecord(same)})
        (name,) = grid.push_messages([grid.create_message(content, "train", hospital.number, "")])
        envelope = hospital.fleet.pull_envelope()
        assert envelope is not None
        message = hospital.fleet.pull_message(envelope, limit_message([4 * size + 256] * count))
        trained = {f"a{i}": Array(np.full(size, i, np.float32)) for i in range(count)}
        reply = Message(RecordDict({"arrays": ArrayRecord(trained)}), reply_to=message)
        if count > 500:  # its parts would take a while, one by one
            assert hospital.announce(envelope, pack_message(reply))
            return
        hospital.fleet.push_reply(envelope, reply)
        (got,) = grid.pull_messages([name])
        assert not got.has_error()


def test_what_a_killed_run_left_is_deleted_and_the_file_shrinks(
    hospital: Hospital, project: Project
) -> None:
    with open_grid(project.database) as killed:
        large = RecordDict({"x": arrays(5, 4 * MIB)})
        killed.push_messages([killed.create_message(large, "train", hospital.number, "")])
        (task,) = killed._state.get_tasks(run_ids=[killed.run.run_id])
        killed._state.finish_task(task.task_id, "failed", "")
        assert on_disk(project) > 20 * MIB
        with open_grid(project.database):
            pass
        assert on_disk(project) < 5 * MIB


def test_beyond_its_quota_the_link_takes_no_reply_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = Project.create(tmp_path / "project", ("localhost",), find_free_port())
    project.settings = project.settings.model_copy(update={"quota_gb": 1e-6})
    with link_up(project):
        hospital = Hospital(project)
        with asked(hospital, project) as (_, envelope, message):
            reply = pack_message(Message(RecordDict(), reply_to=message))
            for _ in range(2):
                with pytest.raises(LinkError, match="507"):
                    hospital.announce(envelope, reply)
        hospital.close()
    said = [record.message for record in caplog.records if "quota" in record.message]
    assert len(said) == 1, "once"
    assert "quota_gb in coordinator.yaml" in said[0]


# --- signatures ---


def test_a_request_overheard_is_of_no_use(hospital: Hospital) -> None:
    path, body = "/v1/fleet/send-node-heartbeat", hospital.heartbeat
    headers = hospital.headers(path, body)
    leave: bytes = DeactivateNodeRequest(node_id=hospital.number).SerializeToString()
    assert hospital.post("/v1/fleet/deactivate-node", leave, headers) == 401, "another path"
    longer = SendNodeHeartbeatRequest(node=hospital.node, heartbeat_interval=20)
    assert hospital.post(path, longer.SerializeToString(), headers) == 401, "another body"
    assert hospital.post(path, body, headers) == 409, "its stamp was used by the wrong body"
    headers = hospital.headers(path, body)
    assert hospital.post(path, body, headers) == 200
    assert hospital.post(path, body, headers) == 409, "the same again"
    assert hospital.fleet.send_heartbeat(), "the site itself goes on"


def test_a_signature_is_for_this_coordinator(hospital: Hospital) -> None:
    path, body = "/v1/fleet/send-node-heartbeat", hospital.heartbeat
    other = "other.example.org"
    headers = hospital.headers(path, body, other)
    assert hospital.post(path, body, headers) == 401
    assert hospital.post(path, body, {**headers, "host": other}) == 401


def test_a_body_comes_plain_and_a_path_alone(hospital: Hospital) -> None:
    path, body = "/v1/fleet/send-node-heartbeat", hospital.heartbeat
    headers = hospital.headers(path, body)
    assert hospital.post(path, body, {**headers, "content-encoding": "gzip"}) == 415
    assert hospital.post(f"{path}?x=1", body, headers) == 404
    large = b"x" * 5000
    assert hospital.post(path, large, hospital.headers(path, large)) == 413, "4 KiB are plenty"


def test_a_body_that_does_not_come_is_not_waited_for(
    hospital: Hospital, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_PATIENCE", 0.3)
    path, body = "/v1/fleet/send-node-heartbeat", hospital.heartbeat
    signed = hospital.headers(path, body)[signing.HEADER]
    lines = (
        f"POST {path} HTTP/1.1",
        f"Host: {hospital.server}",
        f"{signing.HEADER}: {signed}",
        f"Content-Length: {len(body)}",
    )
    with (
        socket.create_connection(("localhost", project.settings.port), timeout=20) as plain,
        hospital.trust.wrap_socket(plain, server_hostname="localhost") as peer,
    ):
        peer.sendall(("\r\n".join((*lines, "", "")).encode()) + body[:1])
        answer = b"".join(iter(lambda: peer.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408")


# --- connections ---


def gone(peer: socket.socket) -> bool:
    """Whether the other side has hung up."""
    peer.settimeout(0.02)
    try:
        return peer.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_who_connects_and_stays_silent_makes_room(hospital: Hospital, project: Project) -> None:
    before = threading.active_count()
    silent = [
        socket.create_connection(("127.0.0.1", project.settings.port), timeout=5)
        for _ in range(3 * serve._WAITING_EACH)
    ]
    fresh = Hospital(project)
    assert fresh.fleet.send_heartbeat(), "an honest hospital at the same address"
    fresh.close()
    time.sleep(0.2)
    held = [peer for peer in silent if not gone(peer)]
    assert 0 < len(held) <= serve._WAITING_EACH
    assert held[-1] is silent[-1], "the oldest went"
    for peer in silent:
        peer.close()
    assert threading.active_count() <= before + 8


def test_who_stays_silent_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_HANDSHAKE", 0.3)
    project = Project.create(tmp_path / "project", ("localhost",), find_free_port())
    with (
        link_up(project),
        socket.create_connection(("127.0.0.1", project.settings.port), timeout=5) as peer,
    ):
        assert peer.recv(1) == b""


def test_one_address_has_so_many_connections(
    hospital: Hospital, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_CONNECTIONS_EACH", 5)
    peers = []
    for _ in range(8):
        plain = socket.create_connection(("127.0.0.1", project.settings.port), timeout=5)
        peers.append(hospital.trust.wrap_socket(plain, server_hostname="localhost"))
    time.sleep(0.2)
    assert sum(not gone(peer) for peer in peers) <= 5
    for peer in peers:
        peer.close()
