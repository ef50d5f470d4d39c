"""Nothing leaves a hospital unrecorded, to nobody twice, and never beyond what it agreed to."""

import gc
import hashlib
import json
import logging
import os
import resource
from dataclasses import replace
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
from client.ledger.spending import Spending
from client.link.limits import MessageLimits
from client.link.node import SiteApp
from client.privacy.held_out import plan_end
from client.privacy.parameters import PrivateRelease
from client.session import Session
from client.site import Site
from common.errors import ContractError, RefusedError
from common.flower.messages import recorddict_to_proto
from common.model import backbones
from common.model.contract import digest
from common.model.network import Network
from common.protocol.backbone import BACKBONE, BackboneHeld
from common.protocol.final import FinalReply, FinalRequest
from common.protocol.join import JoinReply, JoinRequest
from common.protocol.ledger import LEDGER, LedgerReply, LedgerRequest
from common.protocol.round import make_round_config
from common.protocol.tensors import to_arrays
from common.support.terminal import log_to
from server.rounds.weights import BackboneFile
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

    def name(self, model):
        return self.session.prepared.network.digest(model)

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
    assert received[:3] == [None, *(server.name(server.model(seed)) for seed in (0, 1))]
    assert len(set(received)) == 4


def test_a_line_names_all_that_left(tmp_path):
    server = Server(hospital(tmp_path / "ward"), study())
    join, first, final = server.join(), server.round(), server.final()
    told = [line.contents.metrics for line in left(server)]
    assert {"name", "role", "patients.train", "images.test", "ledger.hash"} <= set(told[0])
    for reply, names in ((first, told[1]), (final, told[2])):
        records = reply.content.metric_records
        assert sorted(names) == sorted(
            f"{part}.{key}" for part in records for key in records[part] if records[part][key]
        )
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
    server.round()
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
def test_many_sites_of_one_process_hold_few_files_and_forget_nothing(
    tmp_path, monkeypatch, new_process
):
    new_process()  # other tests of this one hold theirs
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


def test_a_site_that_trains_answers_no_end_before_a_round_of_its_own(server, caplog):
    assert server.final().error.reason == "contract"
    assert "expected a round of this site before the end, got none" in caplog.text
    server.round()
    assert not server.final().has_error()


def test_a_round_that_failed_is_no_round_of_its_own(server, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(Session, "work", lambda *_: 1 / 0)
        assert server.round().error.reason == "internal"
    assert left(server)[-1].release.received == server.name(server.model())
    assert server.final().error.reason == "contract"
    RUNTIME.close_sites()
    assert server.final().error.reason == "contract"
    assert not server.round().has_error()
    assert not server.final().has_error()


def test_the_models_of_its_own_rounds_are_no_news_where_figures_are_told_every_round(server):
    for seed in range(3):
        server.round(seed + 1, seed=seed)
    for seed in (0, 1, 2, 7, 2, 0, 7):  # its own, and one more: the last average
        assert not server.final(seed).has_error()
    assert server.final(8).error.reason == "contract"


def test_a_site_that_only_evaluates_answers_of_one_model(tmp_path):
    server = Server(hospital(tmp_path / "ward", role="evaluate"), study())
    server.join()
    assert not server.final(0).has_error()
    assert server.final(1).error.reason == "contract"


# --- held-out patients with an ε of their own ---

NOISED = {"delta": 1e-5, "disclose": {"counts": "exact", "epsilon": 1.0}}


def test_an_end_with_an_epsilon_is_reserved_sealed_and_sent_and_the_same_again(tmp_path):
    server = Server(hospital(tmp_path / "ward", policy=NOISED), study())
    joined = JoinReply.read(server.join().content)
    assert (joined.images.validation, joined.images.test) == (None, None)
    assert joined.images.train == (2, 2)  # of a study without privacy
    assert not server.round().content.metric_records
    first = server.final()
    lines = [e for e in read_ledger(state(server)) if e.n > 1 and e.release.kind == "final"]
    assert [line.state for line in lines] == ["reserved", "sealed", "sent"]
    spent = Spending.of(read_ledger(state(server)), 1e-5)
    assert spent.ends == 1
    assert 0.97 < spent.held_out() <= 1.0
    assert spent.total() == 0.0  # of training patients
    RUNTIME.close_sites()
    RUNTIME.close_sessions()
    assert sha256(server.final()) == sha256(first)  # nothing is drawn anew
    assert server.final(seed=5).error.reason == "contract"
    spent = Spending.of(read_ledger(state(server)), 1e-5)
    assert spent.ends == 1


def test_no_second_noise_is_drawn_for_an_end(tmp_path):
    """Another study in between deleted the sealed reply: what was asked again was drawn anew."""
    file = hospital(tmp_path / "ward", role="evaluate", policy=NOISED)
    one, other = (Server(file, study(seed=seed)) for seed in (1, 2))
    one.join()
    first = sha256(one.final())
    for _ in range(3):
        other.join()
        assert sha256(one.final()) == first
    for sealed in (state(one) / "outbox").iterdir():
        sealed.unlink()  # as `forget` does
    assert one.final().error.reason == "budget"
    assert left(one)[-1].contents.metrics == ("budget",)
    assert Spending.of(read_ledger(state(one)), 1e-5).ends == 1


def test_an_end_that_was_reserved_and_never_sealed_is_drawn_again(tmp_path, monkeypatch):
    server = Server(hospital(tmp_path / "ward", role="evaluate", policy=NOISED), study())
    server.join()
    with monkeypatch.context() as killed:
        killed.setattr(Session, "finish", lambda *_: 1 / 0)
        assert server.final().error.reason == "internal"
    first = sha256(server.final())
    assert sha256(server.final()) == first
    assert Spending.of(read_ledger(state(server)), 1e-5).ends == 2


def test_an_end_with_an_epsilon_tells_noise(tmp_path):
    """Of two test patients, cells are told that no confusion matrix of theirs could have."""
    server = Server(hospital(tmp_path / "ward", policy=NOISED), study())
    server.join(), server.round()
    told = server.final().content
    reply = FinalReply.read(told, 2, "auroc", JoinReply.read(server.join().content))
    assert reply.counts.test.noise == pytest.approx(plan_end(1.0, 1e-5).noise_multiplier)
    cells = [*reply.counts.test.confusion.ravel(), *reply.counts.validation.confusion.ravel()]
    assert max(abs(n) for n in cells) < 40
    assert min(cells) < 0 or max(cells) > 2


def test_two_ends_add_up_and_training_stays_apart(tmp_path):
    file = hospital(tmp_path / "ward", policy=NOISED)
    for seed in (1, 2):
        server = Server(file, study(seed=seed))
        server.join(), server.round(), server.final()
    spent = Spending.of(read_ledger(state(server)), 1e-5)
    assert spent.ends == 2
    assert 1.3 < spent.held_out() < 1.6  # √2 and a little: Gaussian noise composes
    assert spent.total() == 0.0


def deliver(server, path):
    """Send the study's backbone, whatever was sent before."""
    model = server.study.model.model_copy(update={"weights": str(path)})
    source = BackboneFile(server.study.model_copy(update={"model": model}))
    held = BackboneHeld(0)
    while held.bytes < source.size:
        part = replace(source.cut_part(held), study=server.study.id)
        held = BackboneHeld.read(server.send(part.record(), BACKBONE).content)


@pytest.mark.usefixtures("quick")
def test_the_same_tensors_behind_another_backbone_are_another_model(tmp_path):
    """A backbone sent after the end gave one more answer each, all rounded by the same coins."""
    name = "shufflenet_v2_x0_5"
    for seed in (1, 2):
        model = backbones.get(name).build(classes=2, dropout=0.0, weights="none", seed=seed)
        found = {key: t for key, t in model.state_dict().items() if not key.startswith("fc.")}
        torch.save(found, tmp_path / f"{seed}.pth")
    file = hospital(tmp_path / "ward", role="evaluate", policy=COARSE)
    asked = study(model={"backbone": name, "weights": str(tmp_path / "1.pth")})
    server, other = Server(file, asked), Server(file, study(seed=2))
    server.send(JoinRequest(proposal=asked.proposal()).record(), "query")
    deliver(server, tmp_path / "1.pth")
    server.join()
    first = sha256(server.final())
    told = server.name(server.model())
    other.join()
    assert sha256(server.final()) == first
    other.join()  # what is open is closed, and made anew
    deliver(server, tmp_path / "2.pth")
    assert server.final().error.reason == "contract"
    server.join()
    assert server.final().error.reason == "contract"
    assert server.name(server.model()) != told


@pytest.mark.usefixtures("quick")
def test_a_threshold_at_one_patients_score_tells_nothing_certain(tmp_path):
    """Two models that differ on one test patient alone, told to a site that rounds.

    The attacker knows all other patients and how they are scored. Rounding to the nearest multiple
    made both answers a function of the cells, so that in one of ten directions they differed by a
    whole ten exactly if the patient was there. Now their coins are others: over sites alike but for
    their secret, the answers say the same with the patient and without, but for one in ten.
    """
    file = hospital(tmp_path / "ward", patients=8, policy=COARSE)
    server = Server(file, study())
    server.join()
    session = server.session

    def shifted(by):
        model = server.model(1)
        (bias,) = (name for name, t in model.items() if t.shape == (len(CLASSES),))
        return {**model, bias: model[bias] + torch.tensor([float(by), 0.0])}

    def cells(model):
        return session.evaluate(model, "test").confusion

    # A threshold that splits a class, sought by halving; and a model that decides alike.
    low, high = -50.0, 50.0
    while (cells(shifted((low + high) / 2)) > 0).sum() <= 2:
        dark = cells(shifted((low + high) / 2))[:, 0].sum()
        low, high = ((low + high) / 2, high) if dark <= 2 else (low, (low + high) / 2)
        assert high - low > 1e-9
    below = shifted((low + high) / 2)
    above = {name: 2 * tensor for name, tensor in below.items()}
    assert (cells(below) == cells(above)).all()
    assert digest(below) != digest(above)
    differ = 0
    for k in range(60):
        (state(server) / "secret").write_bytes(bytes([k]) * 32)
        a, b = (session.tell(model, "test")[0].confusion for model in (below, above))
        differ += bool((a != b).any())
    # Though nothing moved, the answers differ: that they do is no evidence of a patient.
    assert 0 < differ < 60


@pytest.mark.usefixtures("quick")
def test_a_message_by_another_name_goes_past_no_check(tmp_path):
    """To Flower `query.default` is `query`; the check whose study it is took it for another."""
    server = Server(hospital(tmp_path / "ward"), study())
    app, limits = SiteApp(server.file), MessageLimits(tmp_path / "sizes")
    (node,) = server.grid.get_node_ids()

    def ask(kind, coordinator, wanted=server.study):
        content = JoinRequest(proposal=wanted.proposal()).record()
        message = server.grid.create_message(content, kind, node, "0")
        return app.answer(message, 1, node, coordinator, limits)

    assert not ask("query", "north").has_error()
    with pytest.raises(RefusedError, match="another's"):
        ask("query", "south")
    waiting = study(seed=2)
    edit_site(server.file, policy={"approve": "ask"})
    assert ask("query", "north", waiting).error.reason == "waiting"
    with pytest.raises(RefusedError, match="another's"):
        ask("query", "south", waiting)
    for kind in ("query.default", "train.default", "evaluate.default", "query.other", "system"):
        with pytest.raises(ContractError, match="a message of type"):
            ask(kind, "south")
    app._runtime.close()


# --- every answer that was computed on patients has a line ---


def test_every_error_about_patients_has_a_line_before_it_leaves(server):
    """A withdrawn patient shows in a word; the word is on record, and tells no more than no."""
    server.round()
    exclusions.exclude_patient(Site.read(server.file), PATIENT.format(3))
    RUNTIME.close_sessions()
    before = len(left(server))
    for reply in (server.round(2), server.final(0)):
        assert reply.error.reason == "refused"
    lines = left(server)[before:]
    assert [(line.release.kind, line.contents.metrics) for line in lines] == [
        ("round", ("refused",)),
        ("final", ("refused",)),
    ]


def test_a_refused_study_bad_data_and_a_withdrawn_patient_look_alike(tmp_path):
    strict = hospital(tmp_path / "strict", policy={"min_patients": 1000})
    torn = hospital(tmp_path / "torn")
    (torn.parent / PICTURE.format(0)).write_bytes(b"no image")
    labelled = hospital(tmp_path / "labelled")
    words = []
    for file, wanted in (
        (strict, study()),
        (torn, study()),
        (labelled, study(classes=("dark", "grey"))),
    ):
        server = Server(file, wanted)
        words.append(server.join().error.reason)
        assert [line.contents.metrics for line in left(server)] == [("refused",)]
    assert words == ["refused"] * 3


def test_that_images_cannot_be_kept_has_a_line_and_counts(tmp_path):
    """The policy had looked at the patients: that the disk came next told yes, without a limit."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)  # whatever the umask is
    cache, policy = {"folder": str(tmp_path / "open")}, {"max_studies": 2}
    file = hospital(tmp_path / "ward", cache=cache, policy=policy)
    asked = [Server(file, study(seed=seed)) for seed in range(3)]
    assert [server.join().error.reason for server in asked] == ["site", "site", "refused"]
    assert [line.contents.metrics for line in left(asked[0])] == [("site",), ("site",)]


def test_an_unforeseen_error_has_a_line_too(server, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(server.session, "work", broken)
    assert server.round().error.reason == "internal"
    assert left(server)[-1].contents.metrics == ("internal",)
    assert left(server)[-1].release.received == server.name(server.model())


@pytest.mark.usefixtures("quick")
def test_no_model_makes_the_figures_fail(tmp_path):
    """Logits beyond any number count as wrong: one answer, on record, and no oracle of its own.

    A server used to send models that overflow on some images and not on others, and read the
    word of the error, for which there was no line and no limit.
    """
    server = Server(hospital(tmp_path / "ward", policy=COARSE), study())
    server.join()
    server.round()
    overflow = {name: torch.full_like(t, 1e4) for name, t in server.model().items()}
    request = FinalRequest(study=server.study.id, arrays=to_arrays(overflow))
    reply = server.send(request.record(), MessageType.EVALUATE)
    assert not reply.has_error()
    assert left(server)[-1].release.received == server.name(overflow)
    assert server.final(3).error.reason == "contract"  # it was the end


@pytest.mark.usefixtures("quick")
def test_rejoining_does_not_make_it_tell_more(tmp_path):
    server = Server(hospital(tmp_path / "ward", policy=COARSE), study())
    first = JoinReply.read(server.join().content).model_dump(exclude={"ledger"})
    for _ in range(20):
        again = JoinReply.read(server.join().content).model_dump(exclude={"ledger"})
        assert again == first


@pytest.mark.usefixtures("quick")
def test_a_policy_that_tells_more_is_for_new_studies(tmp_path):
    """What had left with noise could be asked for once more, exactly, by joining again."""
    server = Server(hospital(tmp_path / "ward", role="evaluate", policy=NOISED), study())
    server.join()
    first = sha256(server.final())
    edit_site(server.file, policy={})
    told = JoinReply.read(server.join().content)
    assert told.disclosure.epsilon == 1.0
    assert told.images.test is None
    assert sha256(server.final()) == first
    other = Server(server.file, study(seed=2))
    assert JoinReply.read(other.join().content).disclosure.epsilon is None


# --- what stays behind ---


def test_sealed_replies_of_a_study_that_ended_go_at_the_next_join(server):
    site = Site.read(server.file)
    outbox = state(server) / "outbox"

    def seal(of):
        privacy = PrivateRelease(
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
    server.round()
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


def test_no_image_is_prepared_into_a_folder_that_others_can_read(tmp_path, quick):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    ward = hospital(tmp_path / "ward", cache={"folder": str(tmp_path / "cache")})
    reply = Server(ward, study()).join()
    assert reply.has_error()
    assert reply.error.reason == "site"
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "cache").chmod(0o700)
    assert not Server(ward, study()).join().has_error()
