"""A coordinator who asks for what tells of few, or of all, gets a no: once, and in one word."""

from functools import partial

import pytest
import torch
from flwr.app import ConfigRecord, MessageType, RecordDict

from client.consent.cohort import cut_records
from client.features.precision import fix_numerics
from client.site import Site
from common.protocol.join import JoinRequest
from common.protocol.round import make_round_config
from common.protocol.tensors import from_arrays, to_arrays
from simulations.engines.grid import InProcessGrid
from tests.builders import RUNTIME, client_app, edit_site, make_study, write_images, write_site

CLASSES = ("dark", "bright")
DATA = {"format": "manifest", "root": ".", "enrolled_patients": 60}
PRIVATE = {"mechanism": "dp_sgd", "epsilon": 0.5, "delta": 1e-6}

study = partial(make_study, classes=CLASSES, train={"rounds": 30, "local_steps": 1})


@pytest.fixture(autouse=True)
def _own_process():
    yield
    RUNTIME.close_sites()
    RUNTIME.close_sessions()


def hospital(folder, patients=60, name="ward", **policy):
    rows = [(f"{i}.png", CLASSES[i % 2], f"p{i}") for i in range(patients)]
    write_images(folder, rows)
    return write_site(folder, name=name, data=DATA, policy=policy)


class Coordinator:
    """Asks one site, over the wire, whatever it wants."""

    def __init__(self, site_file):
        self.file, self.grid = site_file, InProcessGrid(client_app, [site_file])
        self.shapes = {}

    def ask(self, content, kind):
        (node,) = self.grid.get_node_ids()
        (reply,) = self.grid.send_and_receive([self.grid.create_message(content, kind, node, "0")])
        return reply

    def join(self, wanted):
        """The word that a site says no with; None if it joins."""
        reply = self.ask(JoinRequest(proposal=wanted.proposal()).record(), "query")
        if reply.has_error():
            return reply.error.reason
        self.shapes = self.session(wanted).prepared.network.shapes
        return None

    def session(self, wanted):
        return RUNTIME.open_session(self.file, wanted.id)

    def round(self, wanted, number=1):
        """What a round of zeros sends back, or the word of the no."""
        arrays = to_arrays({name: torch.zeros(shape) for name, shape in self.shapes.items()})
        config = ConfigRecord({**make_round_config(wanted.id), "server-round": number})
        reply = self.ask(RecordDict({"arrays": arrays, "config": config}), MessageType.TRAIN)
        if reply.has_error():
            return reply.error.reason
        return from_arrays(reply.content.array_records["arrays"], self.shapes)


def private(name, **holdout):
    return study(name=name, privacy=PRIVATE, holdout=holdout or {"validation": 0.15, "test": 0.2})


# --- held-out patients ---


def test_no_study_holds_out_nearly_all(tmp_path, caplog):
    coordinator = Coordinator(hospital(tmp_path, max_holdout=0.4))
    assert coordinator.join(private("first", validation=0.0, test=0.6)) == "refused"
    assert "held out, got 0.6. Ask the coordinator for a smaller holdout" in caplog.text
    assert coordinator.join(private("honest")) is None


def test_an_agreement_alone_fixes_the_holdout_for_nobody(tmp_path, caplog):
    """Only what was drawn must be kept to: whoever merely proposes shares decides nothing."""
    coordinator = Coordinator(hospital(tmp_path))
    odd, honest = private("odd", validation=0.0, test=0.9), private("honest")
    assert coordinator.join(odd) is None
    assert coordinator.join(honest) is None
    assert not isinstance(coordinator.round(honest), str)
    assert coordinator.round(odd) == "refused"
    assert coordinator.join(private("later", validation=0.0, test=0.9)) == "refused"
    assert "Ask the coordinator for those shares." in caplog.text
    assert not isinstance(coordinator.round(honest, 2), str)


def test_who_trained_with_privacy_is_no_test_patient_when_the_role_changes(tmp_path):
    """What noise of ε hid in training would have been counted at the end of the next study."""
    file = hospital(tmp_path)
    coordinator = Coordinator(file)
    first = private("first")
    coordinator.join(first)
    everybody = {record.patient for record in Site.read(file).data.records(CLASSES)}
    trained = {record.patient for record in cut_records(Site.read(file), first).train}
    only = edit_site(file, role="evaluate")
    assert {r.patient for r in cut_records(Site.read(only), first).test} == everybody  # none drew
    coordinator.file = edit_site(file, role="train")
    assert not isinstance(coordinator.round(first), str)
    site = Site.read(edit_site(file, role="evaluate"))
    for later in (private("later"), study(name="open", holdout={"validation": 0, "test": 0.5})):
        tested = {record.patient for record in cut_records(site, later).test}
        assert tested == everybody - trained


# --- few images ---


def read_single_images(coordinator, wanted):
    """Images that a round of one step on one image gives away: activation and label, exactly."""
    session = coordinator.session(wanted)
    examples, suffix = session.prepared.examples["train"], session.prepared.network.split.suffix
    seen = []
    (linear,) = (part for part in suffix.modules() if isinstance(part, torch.nn.Linear))
    hook = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    suffix.eval()
    with torch.no_grad(), fix_numerics(1):
        suffix(examples.batch(torch.arange(len(examples)), 0, torch.device("cpu")))
    hook.remove()
    (features,) = seen
    found = set()
    for number in range(1, 6):
        told = coordinator.round(wanted, number)
        weight, bias = (next(v for k, v in told.items() if k.endswith(w)) for w in ("ht", "as"))
        label = int(bias.argmax())
        guess = weight[label] / bias[label]
        off = (features - guess).norm(dim=1) / features.norm(dim=1)
        if off.min() < 1e-3 and int(examples.labels[off.argmin()]) == label:
            found.add(int(off.argmin()))
    return found


def test_no_round_is_made_of_single_images(tmp_path, caplog):
    """One step on one image is that image's activation and label, sent as if they were a model."""
    plan = {"rounds": 5, "local_steps": 1, "optimizer": "sgd", "momentum": 0, "lr": 1.0}
    single = study(train=plan | {"batch_size": 1}, holdout={"validation": 0, "test": 0})
    for name in ("one", "other"):
        hospital(tmp_path / name)
    lax = Coordinator(tmp_path / "one/site.yaml")
    assert lax.join(single) is None
    assert read_single_images(lax, single)
    strict = write_site(tmp_path / "other", data=DATA, policy={"min_images": 50})
    assert Coordinator(strict).join(single) == "refused"
    assert "50 different images without privacy, got 1. Ask the" in caplog.text
    enough = study(train=plan | {"batch_size": 50}, holdout={"validation": 0, "test": 0})
    assert Coordinator(strict).join(enough) is None
