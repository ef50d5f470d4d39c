"""The coordinator's command line, and what its link shows to whoever connects: real TLS."""

import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
import yaml
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supernode.fleet_http_client import FleetHttpClient

from client.link.fleet_client import Fleet, NotAdmittedError
from common.errors import LinkError
from common.flower.supernode import open_client
from common.support import keys, signing
from server.cli.main import main
from server.link import serve
from server.link.sites import Sites
from server.project import certificates
from server.project.project import Project
from simulations.demo.loopback import find_free_port
from tests.builders import ROOT
from tests.processes import link_up

COMMAND = "from server.cli.main import main; main()"
Command = Callable[..., tuple[int, str]]
PROTOBUF = {"content-type": "application/x-protobuf"}
FLEET = sorted(path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/"))
OTHERS = sorted(path for _, path in PROTOBUF_REQUEST_TYPES if path not in FLEET)


def command(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """`consilium-server` as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CONSILIUM_PROJECT": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


@pytest.fixture
def said(
    run_main: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """Runs `consilium-server` here, with what is typed: exit code, and all it printed."""
    umask = os.umask(0o022)

    def run(folder: Path, *arguments: object, typed: str = "") -> tuple[int, str]:
        monkeypatch.setenv("CONSILIUM_PROJECT", str(folder))
        return run_main(main, *arguments, typed=typed)

    yield run
    os.umask(umask)


def public(folder: Path, key: keys.PrivateKey) -> Path:
    """The file that a hospital sends."""
    path = folder / f"{time.monotonic_ns()}.pub"
    path.write_bytes(keys.pem(key.public_key()))
    return path


def wait_for(project: Project, port: int, process: subprocess.Popen[str] | None = None) -> None:
    for _ in range(600):
        assert process is None or process.poll() is None, process.communicate()[0]
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(project.log.read_text())


class Up:
    """A project whose link is up, as another process."""

    def __init__(self, folder: Path, days_ago: int = 0) -> None:
        self.port = find_free_port()
        self.project = Project.create(folder, ("localhost",), self.port)
        issued = datetime.now(UTC) - timedelta(days=days_ago)
        certificates.write_server(self.project.folder, ("localhost",), issued)
        if days_ago:  # otherwise it is renewed at once
            (self.project.folder / "ca.key").rename(folder.parent / "ca.key")
        self.ca = self.project.folder / "ca.crt"
        arguments = ("start", "--host", "127.0.0.1")
        self.process = command(self.project.folder, *arguments)
        wait_for(self.project, self.port, self.process)

    def fleet(self, key: keys.PrivateKey) -> Fleet:
        return Fleet(f"localhost:{self.port}", self.ca, key)

    def peer(self) -> httpx.Client:
        """Somebody who has ca.crt, and nothing else."""
        context = ssl.create_default_context(cafile=self.ca)
        return httpx.Client(base_url=f"https://localhost:{self.port}", verify=context)

    def admitted(self, name: str) -> tuple[keys.PrivateKey, int]:
        """The key of a new site, and its number."""
        key = keys.new()
        sites = Sites(self.project)
        sites.admit(key.public_key(), name)
        return key, next(site.number for site in sites.list_sites() if site.name == name)

    def signed(self, key: keys.PrivateKey) -> FleetHttpClient:
        """A site's client that sends whatever it is told, well signed."""

        def sign(request: httpx.Request) -> None:
            asked = request.method, request.url.path, request.headers["host"], request.read()
            request.headers[signing.HEADER] = signing.sign_request(key, *asked)

        trust = ssl.create_default_context(cafile=self.ca)
        return open_client(f"localhost:{self.port}", trust, sign, lambda _: None)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    made = Up(tmp_path_factory.mktemp("coordinator") / "project")
    yield made
    made.process.terminate()
    out, _ = made.process.communicate(timeout=30)
    assert made.process.returncode == 0, out
    assert "Traceback" not in out + made.project.log.read_text()


def test_a_project_from_init_to_the_first_admitted_site(tmp_path: Path, said: Command) -> None:
    folder = tmp_path / "a project"
    code, out = said(folder, "init", folder, "--host", "localhost:8443", "--host", "127.0.0.1:8443")
    assert code == 0, out
    authority = keys.read_certificate(folder / "ca.crt")
    assert keys.fingerprint(authority) in out
    assert str(folder / "ca.crt") in out
    assert yaml.safe_load((folder / "coordinator.yaml").read_text()) == {
        "hosts": ["localhost", "127.0.0.1"],
        "port": 8443,
        "quota_gb": 20.0,
        "mlflow": None,
    }
    code, out = said(folder, "init", folder, "--host", "localhost")
    assert (code, out.count("\n")) == (1, 1)
    assert "new or empty folder" in out
    key = keys.new()
    path = public(tmp_path, key)
    code, out = said(folder, "admit", path, "--name", "east", typed="n\n")
    assert code == 1, "the fingerprints differed"
    assert keys.fingerprint(key.public_key()) in out
    code, out = said(folder, "admit", path, "--name", "east", typed="y\n")
    assert code == 0, out
    code, out = said(folder, "sites")
    assert re.search(rf"east +{keys.fingerprint(key.public_key())[:19]} .* never", out), out
    code, out = said(folder, "remove", "east")
    assert code == 0, out
    code, out = said(folder, "status")
    assert code == 0, out
    assert "down" in out
    assert "0 of 0 connected" in out
    assert "Traceback" not in out
    rights = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {rights.pop("runs")} == {0o700}
    assert set(rights.values()) == {0o600}, rights
    assert "link.db" in rights


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("init", "{}", "--host", "a:443", "--host", "b:444"), "same port"),
        (("init", "{}", "--host", "a b"), "a name or an IPv4 address"),
        (("start",), "consilium-server init"),
        (("sites", "--project", "{}"), "consilium-server init"),
    ],
)
def test_a_mistake_ends_in_words(
    tmp_path: Path, said: Command, arguments: tuple[str, ...], why: str
) -> None:
    folder = tmp_path / "absent"
    code, out = said(folder, *(part.format(folder) for part in arguments))
    assert code != 0
    assert why in " ".join(out.replace("│", " ").split())
    assert "Traceback" not in out
    assert not folder.exists()


def test_what_hinders_start_is_told_in_one_line(tmp_path: Path, said: Command) -> None:
    project = Project.create(tmp_path / "project", ("localhost",), 443)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out = said(project.folder, "start", "--host", "127.0.0.1", "--port", port)
    assert (code, out.count("\n")) == (1, 1), out
    assert "Another program has it" in out
    long_ago = datetime.now(UTC) - timedelta(days=800)
    certificates.write_server(project.folder, ("localhost",), long_ago)
    (project.folder / "ca.key").rename(tmp_path / "ca.key")
    code, out = said(project.folder, "start", "--host", "127.0.0.1", "--port", find_free_port())
    assert (code, out.count("\n")) == (1, 1), out
    assert "consilium-server renew" in out


def test_a_port_that_needs_rights_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    low = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if os.geteuid() == 0 or not low.exists() or int(low.read_text()) <= 443:
        pytest.skip("every port is free for all here")
    with pytest.raises(LinkError, match="systemd unit"):
        serve.open_socket("127.0.0.1", 443)


def test_one_process_serves_a_project(up: Up, said: Command) -> None:
    code, out = said(up.project.folder, "start", "--host", "127.0.0.1", "--port", find_free_port())
    assert (code, out.count("\n")) == (1, 1), out
    assert "no other consilium-server start" in out
    assert up.project.is_up()


def test_whoever_holds_only_the_certificate_reaches_nothing(up: Up) -> None:
    assert OTHERS
    with up.peer() as peer:
        for path in (*OTHERS, "/", "/health", "/v1/fleet", "/v1/fleet/", "/v1/control/"):
            assert peer.post(path, headers=PROTOBUF).status_code == 404, path
        for path in ("/docs", "/redoc", "/openapi.json", *FLEET):
            assert peer.get(path).status_code == 404, path
        for path in FLEET:
            refused = peer.post(path, headers=PROTOBUF)
            assert refused.status_code in (401, 404), path
            assert refused.content == b""


def test_a_signature_is_asked_for_before_a_body_is_read(up: Up) -> None:
    context = ssl.create_default_context(cafile=up.ca)
    for length, status in (("1000000", b"401"), ("99999999", b"413"), ("9" * 18, b"413")):
        with (
            socket.create_connection(("localhost", up.port), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as peer,
        ):
            lines = ("POST /v1/fleet/push-object HTTP/1.1", "Host: localhost")
            head = "\r\n".join((*lines, f"Content-Length: {length}", "", ""))
            peer.sendall(head.encode())
            answer = b"".join(iter(lambda peer=peer: peer.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 " + status), "and the line is closed"
    with up.peer() as peer:
        untold = peer.post(FLEET[0], content=iter([b"chunks"]))
        assert untold.status_code == 411


@pytest.mark.parametrize(
    "damage",
    [
        (0, "AAAA"),
        (0, "\N{LATIN SMALL LETTER E WITH ACUTE}"),
        (1, "yesterday"),
        (1, "1577836800000000"),
        (1, "9" * 18),
        (2, "0" * 32),
        (2, "0"),
        (3, "0" * 64),
        (4, "AAAA"),
        (4, "AAAA AAAA"),
    ],
)
def test_a_signature_that_does_not_fit_is_refused(up: Up, damage: tuple[int, str]) -> None:
    key, _ = up.admitted(f"s{time.monotonic_ns()}")
    sent: list[httpx.Request] = []
    with up.signed(key) as client:
        client._client.event_hooks["request"].append(sent.append)
        client.ActivateNode(_activation(key))
    with up.peer() as peer:
        (good,) = sent
        fields = good.headers[signing.HEADER].split(" ")
        fields[damage[0]] = damage[1]
        encoded = [(signing.HEADER.encode(), " ".join(fields).encode())]
        refused = peer.post(good.url.path, content=good.content, headers=encoded)
    assert refused.status_code == 401


def test_an_admitted_key_connects_and_is_listed(up: Up, said: Command) -> None:
    key, number = up.admitted("north")
    fleet = up.fleet(key)
    assert fleet.activate(None) == number
    _, out = said(up.project.folder, "sites")
    assert re.search(r"north .* now", out), out
    _, out = said(up.project.folder, "status")
    assert re.search(r"link +up", out), out
    fleet.deactivate()
    _, out = said(up.project.folder, "sites")
    assert re.search(r"north .* last \d{4}-", out), out
    fleet.close()


def test_a_key_that_is_not_admitted_is_named_in_the_log(up: Up) -> None:
    key = keys.new()
    fleet = up.fleet(key)
    for _ in range(2):
        with pytest.raises(NotAdmittedError, match=r"\.pub"):
            fleet.activate(None)
    fleet.close()
    log = up.project.log.read_text()
    assert log.count(keys.fingerprint(key.public_key())) == 1


def test_a_removed_key_is_out_at_once_and_may_come_back(up: Up) -> None:
    key, number = up.admitted("south")
    fleet = up.fleet(key)
    fleet.activate(None)
    sites = Sites(up.project)
    sites.remove("south")
    for attempt in (fleet.send_heartbeat, fleet.pull_envelope, lambda: fleet.activate(number)):
        with pytest.raises(NotAdmittedError):
            attempt()
    sites.admit(key.public_key(), "south")
    assert fleet.activate(number) != number
    assert fleet.pull_envelope() is None
    fleet.close()


def test_no_key_registers_itself_and_none_speaks_for_another(up: Up) -> None:
    key, number = up.admitted("center")
    _, other = up.admitted("border")
    before = len(Sites(up.project).list_sites())
    with up.signed(key) as client:
        for method, request in (
            (client.PullMessages, PullMessagesRequest(node=Node(node_id=other))),
            (client.ActivateNode, _activation(keys.new())),
        ):
            with pytest.raises(httpx.HTTPStatusError) as caught:
                method(request)
            assert caught.value.response.status_code == 401
        forged = PushMessagesRequest(node=Node(node_id=number))
        forged.messages_list.add()
        for source, reply_to in ((other, "ab"), (1, ""), (number, "")):
            forged.messages_list[0].metadata.src_node_id = source
            forged.messages_list[0].metadata.reply_to_message_id = reply_to
            with pytest.raises(httpx.HTTPStatusError) as caught:
                client.PushMessages(forged)
            assert caught.value.response.status_code == 403
    assert len(Sites(up.project).list_sites()) == before


def test_a_release_that_a_site_says_is_listed(up: Up) -> None:
    key, _ = up.admitted("inland")
    with up.signed(key) as client:
        for said_to_be in ("0.1.0", "<script>"):
            client._client.headers["consilium-release"] = said_to_be
            client.ActivateNode(_activation(key)) if said_to_be == "0.1.0" else _beat(client, up)
    (site,) = [site for site in Sites(up.project).list_sites() if site.name == "inland"]
    assert site.version == "0.1.0"


def test_files_that_the_link_writes_are_private(up: Up) -> None:
    found = [path for path in up.project.folder.iterdir() if path.is_file()]
    assert {"link.db", "coordinator.log", ".start.lock"} <= {path.name for path in found}
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o600}


def test_plain_http_and_old_tls_are_refused(up: Up) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{up.port}/")
    context = ssl.create_default_context(cafile=up.ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("localhost", up.port)) as plain,
        pytest.raises(ssl.SSLError),
        context.wrap_socket(plain, server_hostname="localhost"),
    ):
        pass


def test_another_authority_and_an_expired_certificate_are_explained(up: Up, tmp_path: Path) -> None:
    other = Project.create(tmp_path / "other", ("localhost",), 443)
    key, _ = up.admitted("coast")
    fleet = Fleet(f"localhost:{up.port}", other.folder / "ca.crt", key)
    with pytest.raises(LinkError, match="by telephone"):
        fleet.activate(None)
    fleet.close()
    long_ago = datetime.now(UTC) - timedelta(days=800)
    certificates.write_server(other.folder, ("localhost",), long_ago)
    with link_up(other, 0) as port:
        fleet = Fleet(f"localhost:{port}", other.folder / "ca.crt", key)
        with pytest.raises(LinkError, match=r"expired.*consilium-server renew"):
            fleet.activate(None)
        fleet.close()


def test_who_connects_and_asks_nothing_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_PATIENCE", 0.3)
    project = Project.create(tmp_path / "project", ("localhost",), 443)
    context = ssl.create_default_context(cafile=project.folder / "ca.crt")
    with (
        link_up(project, 0) as port,
        socket.create_connection(("localhost", port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as peer,
    ):
        peer.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost:")
        with suppress(ConnectionError, ssl.SSLError):
            assert peer.recv(1) == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_start_ends_cleanly_and_sites_see_it_gone(tmp_path: Path, number: signal.Signals) -> None:
    up = Up(tmp_path / "project", days_ago=16)
    key, _ = up.admitted("east")
    fleet = up.fleet(key)
    fleet.activate(None)
    up.process.send_signal(number)
    out, _ = up.process.communicate(timeout=30)
    assert up.process.returncode == 0, out
    assert "Traceback" not in out
    assert "consilium-server renew" in out, "the certificate has two weeks left"
    assert not up.project.is_up()
    with pytest.raises(LinkError, match="expected an answer, got none"):
        fleet.send_heartbeat()
    fleet.close()


def _activation(key: keys.PrivateKey) -> ActivateNodeRequest:
    return ActivateNodeRequest(public_key=keys.pem(key.public_key()), heartbeat_interval=30)


def _beat(client: FleetHttpClient, up: Up) -> None:
    (site,) = [site for site in Sites(up.project).list_sites() if site.name == "inland"]
    client.PullMessages(PullMessagesRequest(node=Node(node_id=site.number)))
