"""Nothing leaves a hospital unrecorded, to nobody twice, and never beyond what it agreed to."""

import gc
import hashlib
import json
import logging
import os
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, MessageType, RecordDict

from client import runtime
from client.consent import exclusions
from client.data.records import FileImage
from client.features.store import Store
from client.ledger.entries import Release, Sent
from client.ledger.ledger import Ledger, read_ledger
from client.ledger.release import Reply, release
from client.privacy.parameters import PrivateRound
from client.session import Session
from client.site import Site
from common.flower.messages import recorddict_to_proto
from common.model.contract import digest
from common.model.network import Network
from common.protocol.final import FinalRequest
from common.protocol.join import JoinReply, JoinRequest
from common.protocol.ledger import LEDGER, LedgerReply, LedgerRequest
from common.protocol.round import make_round_config
from common.protocol.tensors import to_arrays
from common.support.terminal import log_to
from simulations.engines.grid import InProcessGrid
from tests.builders import RUNTIME, client_app, edit_site, make_study, write_images, write_site
from tests.processes import another, limited

CLASSES = ("dark", "bright")
# Found nowhere by chance.
PATIENT, PICTURE = "DOE_JANE_1970_{}", "scan-of-jane-{}.png"
COARSE = {"disclose": {"counts": "rounded", "metrics": "final"}}


@pytest.fixture(autouse=True)
def _own_process():
    """Each test is a process of its own as far as open sites go."""
    yield
    RUNTIME.close()


@pytest.fixture
def quick(monkeypatch):
    """Nothing here depends on what outlives a power cut."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


study = partial(
    make_study,
    name="skin",
    classes=CLASSES,
    images={"size": 32, "augment": {"views": 2, "ops": ["flip"]}},
    train={"rounds": 3, "batch_size": 8},
)


def hospital(folder, *, patients=4, **keys):
    """A site file whose every part has two patients of each class."""
    splits = ("train", "validation", "test")
    write_images(
        folder,
        [
            (PICTURE.format(i), CLASSES[i % 2], PATIENT.format(i), splits[i % 3])
            for i in range(3 * patients)
        ],
    )
    return write_site(folder, **{"name": folder.name} | keys)


class Server:
    """Asks one site, over the wire, whatever it wants."""

    def __init__(self, site_file, wanted):
        self.file, self.study = site_file, wanted
        self.grid = InProcessGrid(client_app, [site_file])
        self.session = None

    def send(self, content, kind):
        (node,) = self.grid.get_node_ids()
        message = self.grid.create_message(content, kind, node, "0")
        (reply,) = self.grid.send_and_receive([message])
        return reply

    def join(self):
        reply = self.send(JoinRequest(proposal=self.study.proposal()).record(), "query")
        if not reply.has_error():
            self.session = RUNTIME.open_session(self.file, self.study.id)
        return reply

    def model(self, seed=0):
        torch.manual_seed(seed)
        shapes = self.session.prepared.network.shapes
        return {name: torch.randn(shape) * 0.01 for name, shape in shapes.items()}

    def round(self, number=1, seed=0, **changes):
        config = {**make_round_config(self.study.id), "server-round": number} | changes
        arrays = to_arrays(self.model(seed))
        record = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
        return self.send(record, MessageType.TRAIN)

    def final(self, seed=0):
        arrays = to_arrays(self.model(seed))
        request = FinalRequest(study=self.study.id, arrays=arrays)
        return self.send(request.record(), MessageType.EVALUATE)


@pytest.fixture
def server(tmp_path):
    """A site that has joined a study."""
    server = Server(hospital(tmp_path / "ward"), study())
    assert not server.join().has_error()
    return server


def state(server):
    return server.file.parent / "state"


def left(server):
    return [entry for entry in read_ledger(state(server)) if isinstance(entry, Sent)]


def sha256(message):
    data = recorddict_to_proto(message.content).SerializeToString(deterministic=True)
    return hashlib.sha256(data).hexdigest(), len(data)


def patients_part(message):
    """SHA-256 of all in a reply but how far the ledger went before it."""
    parts = {k: v for k, v in message.content.items() if k != "ledger"}
    data = recorddict_to_proto(RecordDict(parts)).SerializeToString(deterministic=True)
    return hashlib.sha256(data).hexdigest()


# --- nothing leaves unrecorded ---


def test_what_arrives_is_what_the_ledger_says_left_byte_for_byte(tmp_path):
    server = Server(hospital(tmp_path / "ward"), study())
    replies = [server.join(), server.round(1), server.round(2, seed=1), server.final(2)]
    lines = left(server)
    assert [sha256(reply) for reply in replies] == [
        (line.contents.sha256, line.contents.bytes) for line in lines
    ]
    assert [(line.release.kind, line.release.round) for line in lines] == [
        ("join", None),
        ("round", 1),
        ("round", 2),
        ("final", None),
    ]
    assert {line.release.study for line in lines} == {server.study.id}
    shapes = server.session.prepared.network.shapes
    assert [line.contents.tensors for line in lines] == [{}, shapes, shapes, {}]
    received = [line.release.received for line in lines]
    assert received[:3] == [None, digest(server.model(0)), digest(server.model(1))]
    assert len(set(received)) == 4


def test_a_line_names_all_that_left(tmp_path):
    server = Server(hospital(tmp_path / "ward"), study())
    join, first, final = server.join(), server.round(), server.final()
    told = [line.contents.metrics for line in left(server)]
    assert {"name", "role", "patients.train", "images.test", "ledger.hash"} <= set(told[0])
    for reply, names in ((first, told[1]), (final, told[2])):
        records = reply.content.metric_records
        assert sorted(names) == sorted(f"{part}.{key}" for part in records for key in records[part])
    assert "metrics.train-loss" in told[1]
    assert not join.has_error()
    silent = Server(hospital(tmp_path / "silent", policy={"disclose": {"counts": "none"}}), study())
    silent.join(), silent.round(), silent.final()
    told = [line.contents.metrics for line in left(silent)]
    assert not [name for name in told[0] if name.startswith(("patients", "images"))]
    assert told[1:] == [(), ()]


def test_the_join_tells_how_far_the_ledger_went_before_it(server):
    reply = JoinReply.read(server.join().content)
    lines = read_ledger(state(server))
    assert reply.ledger.count == len(lines) - 1
    asked = server.send(LedgerRequest(reply.ledger.count).record(), LEDGER)
    assert LedgerReply.read(asked.content).hash == reply.ledger.hash
    beyond = server.send(LedgerRequest(len(lines) + 1).record(), LEDGER)
    assert LedgerReply.read(beyond.content).hash is None
    assert server.send(LedgerRequest(0).record(), LEDGER).error.reason == "contract"
    assert len(read_ledger(state(server))) == len(lines)


def test_an_error_leaves_no_line_and_no_figure(server):
    lines = len(read_ledger(state(server)))
    for reply in (
        server.round(0),
        server.round(server.study.train.rounds + 1),
        server.round(1, study="0" * 16),
        server.send(RecordDict(), MessageType.TRAIN),
        server.send(RecordDict(), MessageType.EVALUATE),
    ):
        assert reply.error.reason == "contract"
    assert len(read_ledger(state(server))) == lines


@pytest.mark.parametrize("room", [0, 1, 200])
def test_nothing_leaves_if_the_disk_is_full(server, room):
    path = state(server) / "ledger.jsonl"
    before = path.read_bytes()
    with limited(resource.RLIMIT_FSIZE, len(before) + room):
        replies = [server.round(), server.final(), server.join()]
    assert [reply.error.reason for reply in replies] == ["site"] * 3
    assert not any(reply.has_content() for reply in replies)
    assert path.read_bytes() == before
    assert not server.round().has_error()


# --- one process at a time ---


@pytest.mark.system
def test_a_second_process_is_refused_and_told_no_more(tmp_path, caplog):
    server = Server(hospital(tmp_path / "ward"), study())
    Site.read(server.file).private()
    with another(partial(Ledger, state(server))):
        assert server.join().error.reason == "site"
        assert "one process at a time, got another that has it open" in caplog.text
        assert left(server) == []
    assert not server.join().has_error()


@pytest.mark.usefixtures("quick")
def test_many_sites_of_one_process_hold_few_files_and_forget_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "_AWAKE", 2)
    servers = [Server(hospital(tmp_path / f"s{i}"), study()) for i in range(5)]
    for server in servers:
        server.join()
    for number in (1, 2):
        for server in servers:
            assert not server.round(number).has_error()
            open_files = list(Path("/proc/self/fd").iterdir())
            targets = [str(fd.readlink()) for fd in open_files if fd.is_symlink()]
            assert len([path for path in targets if "/ledger." in path]) <= 6
    assert [len(left(server)) for server in servers] == [3] * 5


@pytest.mark.system
@pytest.mark.usefixtures("quick")
def test_who_writes_while_a_site_rests_is_noticed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(runtime, "_AWAKE", 1)
    one, other = (Server(hospital(tmp_path / f"s{i}"), study()) for i in range(2))
    one.join(), other.join()
    with another(partial(Ledger, state(one))):
        assert one.round().error.reason == "site"
    assert "one process at a time" in caplog.text
    assert not one.round().has_error()
    other.round()
    lines = len(left(one))
    with Ledger(state(one)) as ledger:  # as another process would, and ends
        ledger.send(Release(study="0" * 16, name="x", kind="join"), Reply(b"x", {}).contents)
    assert one.round().error.reason == "site"
    assert "as this process left it, got another" in caplog.text
    assert len(left(one)) == lines + 1


# --- a hostile server ---


@pytest.mark.usefixtures("quick")
def test_a_thousand_questions_get_no_more_than_was_agreed(tmp_path):
    server = Server(hospital(tmp_path / "ward", policy=COARSE), study())
    server.join()
    rounds = {patients_part(server.round(1)) for _ in range(100)}
    assert len(rounds) == 1  # nothing is drawn anew, so nothing averages out
    told = server.round(2, seed=3).content
    assert not told.metric_records
    ends = [server.final(seed) for seed in range(900)]
    good = [reply for reply in ends if not reply.has_error()]
    assert good == ends[:1]
    assert {reply.error.reason for reply in ends if reply.has_error()} == {"contract"}
    again = server.final(0)
    assert sha256(again) == sha256(good[0])
    for reply in good:
        for counts in reply.content.metric_records.values():
            assert not counts["positive"]
            assert all(n % 10 == 0 for n in counts["confusion"][1::2])
    # The next process knows which end there was.
    RUNTIME.close_sites()
    assert server.final(7).error.reason == "contract"


@pytest.mark.usefixtures("quick")
def test_rejoining_does_not_make_it_tell_more(tmp_path):
    server = Server(hospital(tmp_path / "ward", policy=COARSE), study())
    first = JoinReply.read(server.join().content).model_dump(exclude={"ledger"})
    for _ in range(20):
        again = JoinReply.read(server.join().content).model_dump(exclude={"ledger"})
        assert again == first


# --- what stays behind ---


def test_sealed_replies_of_a_study_that_ended_go_at_the_next_join(server):
    site = Site.read(server.file)
    outbox = state(server) / "outbox"

    def seal(of):
        privacy = PrivateRound(
            mechanism="dp_sgd",
            noise_multiplier=1.0,
            sample_rate=0.1,
            steps=1,
            delta=1e-5,
            clip_norm=1.0,
        )
        what = Release(study=of, name="x", kind="round", round=1, privacy=privacy)
        open_site = RUNTIME.open_site(site)
        release(open_site.ledger, open_site.outbox, what, lambda: Reply(os.urandom(9), {}))

    seal(server.study.id)
    seal("f" * 16)
    server.final()
    server.join()  # the same study: it may be resumed
    assert len(list(outbox.iterdir())) == 2
    assert not Server(server.file, study(seed=2)).join().has_error()
    (kept,) = outbox.iterdir()
    assert kept.name.startswith("f" * 16)


@pytest.mark.parametrize("cache", [None, "prepared"])
def test_no_file_names_a_patient_or_an_image(tmp_path, cache):
    keys = {"cache": {"folder": cache}} if cache else {}
    file = hospital(tmp_path / "ward", **keys)
    server = Server(file, study())
    server.join(), server.round(), server.final()
    exclusions.exclude_patient(Site.read(file), PATIENT.format(0))
    images = sorted(file.parent.glob("*.png"))
    secrets = [PATIENT.format(i) for i in range(12)] + [path.name for path in images]
    digests = [FileImage(path).digest() for path in images]
    secrets += digests + [digest[:12] for digest in digests]
    secrets += [hashlib.sha256(PATIENT.format(i).encode()).hexdigest() for i in range(12)]
    folders = [state(server), *([file.parent / cache] if cache else [])]
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {"ledger.jsonl", "forgotten", "secret"} <= {path.name for path in found}
    assert any(path.suffix == ".safetensors" for path in found)
    for path in found:
        content = path.read_bytes() + str(path.relative_to(file.parent)).encode()
        assert not [word for word in secrets if word.encode() in content], path
        assert path.stat().st_mode & 0o077 == 0, path


def alive(kind):
    """How many there are in this process."""
    gc.collect()
    return sum(type(found) is kind for found in gc.get_objects())


def test_a_process_lets_go_of_what_other_studies_loaded(server, quick):
    """Otherwise a coordinator fills a hospital's memory by proposing studies."""
    counts = []
    for seed in range(3):
        other = Server(server.file, study(seed=seed, model={"weights": "none"}))
        assert not other.join().has_error()
        assert not other.round().has_error()
        other.session = server.session = None
        counts.append([alive(kind) for kind in (Session, Network, Store)])
    assert counts[0] == counts[1] == counts[2]
    edit_site(server.file, threads=2)
    assert not other.join().has_error()
    other.session = None
    assert [alive(kind) for kind in (Session, Network, Store)] == counts[0]
    assert not Server(server.file, server.study).join().has_error()  # the first goes on


FORGED = "2026-01-01 00:00:00,000 INFO the study is approved"


@pytest.mark.parametrize("broken", ["\n", "\r", "\x85", "\u2028", "\x1b[1A\x1b[2K"])
def test_nothing_that_a_coordinator_sends_forges_a_line_of_the_log(tmp_path, quick, broken):
    server = Server(hospital(tmp_path / "ward"), study())
    text = f"x{broken}{FORGED}"
    honest = json.loads(server.study.proposal())
    odd = [
        honest | {text: 1},
        honest | {"name": text},
        honest | {"select": text},
        honest | {"aggregate": {"strategy": text, "options": {text: 1}}},
        honest | {"model": {"backbone": text}},
        honest | {"model": {"backbone": "resnet18", "weights": text}},
        honest | {"classes": [text, "b"]},
    ]
    handler = log_to(tmp_path / "client.log")
    try:
        for proposal in odd:
            content = JoinRequest(proposal=json.dumps(proposal)).record()
            assert server.send(content, "query").has_error()
        assert not server.join().has_error()
        assert server.round(study=text).has_error()
        record = RecordDict({text: ConfigRecord({text: text})})
        for kind in ("query", "query.backbone", "query.ledger", "train", "evaluate"):
            assert server.send(record, kind).has_error()
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    lines = (tmp_path / "client.log").read_text("utf-8").splitlines()
    assert sum(" ERROR " in line for line in lines) == len(odd) + 6
    assert not [line for line in lines if line.startswith(FORGED) or "\x1b" in line]
