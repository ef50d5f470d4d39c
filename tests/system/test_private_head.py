"""A private head over the real messages: two ledger lines, an exact ε, and a model that travels."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Array, RecordDict
from safetensors.torch import load_file

from client.consent.cohort import cut_records
from client.ledger.entries import Reserved, Sealed, Sent, list_events
from client.site import Site
from common.heads.sums import Sums
from common.heads.whitening import PROTOTYPES_NORM, Whitening
from common.model.inference import load_model
from common.model.network import place_whitening
from common.protocol.final import FinalRequest, Solved
from common.protocol.noised import (
    MOMENTS,
    NOISED,
    PROTOTYPES,
    NoisedReply,
    NoisedRequest,
    count_numbers,
)
from common.protocol.sums import MEANS, SUMS, MeansRequest, SumsRequest
from common.protocol.tensors import to_arrays
from server.app import app as server_app
from server.runs.results import read_results
from server.runs.run_folder import RunFolder
from simulations.engines.grid import simulate_run
from tests.builders import PHANTOM_CLASSES, PHANTOMS, RUNTIME, client_app, edit_site, make_study
from tests.system.test_private_study import Coordinator, by_google, entries, settle

R = 8
study = partial(
    make_study,
    name="head",
    classes=PHANTOM_CLASSES,
    model={"init": None},
    train={"rounds": 0},
    privacy={"preset": "head", "epsilon": 4.0, "delta": 1e-5, "directions": R},
)


@pytest.fixture(autouse=True)
def _own_process(new_process):
    new_process()


class Asking(Coordinator):
    """Asks one site for noised sums."""

    def ask(self, kind, scale=1.0):
        width = 1024  # of shufflenet_v2_x0_5
        basis = scale * np.eye(R, width)
        arrays = to_arrays(place_whitening(self.study, Whitening.begin(basis)))
        return self.send(NoisedRequest(study=self.study.id, arrays=arrays).record(), kind)


def test_two_lines_spend_what_was_promised_and_the_model_decides(phantoms, tmp_path):
    wanted = study()
    files = settle(wanted, phantoms, tmp_path / "run")
    simulate_run(server_app, client_app, files, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    for path in files:
        lines = entries(path)
        states = [type(line) for line in lines if getattr(line, "release", None)]
        assert states == [Sent, *[Reserved, Sealed, Sent] * 2, Sent]
        kinds = [line.release.kind for line in lines if isinstance(line, Sent)]
        assert kinds == ["join", "moments", "prototypes", "final"]
        spent = list_events(lines)
        assert {(s.sample_rate, s.steps) for s in spent} == {(1.0, 1)}
        ratio = spent[0].noise_multiplier / spent[1].noise_multiplier
        assert ratio == pytest.approx(2.0)  # a fifth of the budget, and four fifths
        assert 3.9 < by_google(spent) <= 4.0
        joined = lines[1].contents.metrics
        assert {"patients.train", "images.train"}.isdisjoint(joined)
    results, facts = read_results(folder.path, len(PHANTOM_CLASSES))
    assert set(results["federated"]) == set(PHANTOMS)
    assert facts["released_round"] == 0
    # The very model that was counted, in two lines of Python; its prior is a noised one.
    north = next(path for path in files if path.parent.name == "north")
    tested = cut_records(Site.read(north), wanted).test
    model = load_model(folder.path)
    called = model.decisions([record.image.path for record in tested])
    truth = torch.tensor([record.label for record in tested])
    assert int((called == truth).sum()) == int(np.trace(results["federated"]["north"].confusion))
    told = json.loads((folder.path / "read_out.json").read_text())
    assert sum(np.exp(told["log_prior"])) == pytest.approx(1.0)
    state = load_file(folder.path / "model.safetensors")
    assert {name.rsplit("whiten.")[1] for name in state if "whiten" in name} == {
        "basis",
        "centre",
        "matrix",
    }


def test_a_question_asked_again_is_free_and_another_is_refused(phantoms, tmp_path, new_process):
    files = settle(study(), phantoms, tmp_path / "run")
    coordinator = Asking(files[0], study())
    coordinator.join()
    size = count_numbers(MOMENTS, len(PHANTOM_CLASSES), R)
    first = NoisedReply.read(coordinator.ask(MOMENTS).content, size).sums
    new_process()
    again = NoisedReply.read(coordinator.ask(MOMENTS).content, size).sums
    assert np.array_equal(first.numbers, again.numbers)
    assert len(list_events(entries(files[0]))) == 1
    assert coordinator.ask(MOMENTS, 2.0).error.reason == "budget"  # though ε would be left
    assert not coordinator.ask(PROTOTYPES).has_error()
    for kind in (MOMENTS, PROTOTYPES):
        assert coordinator.ask(kind, 2.0).error.reason == "budget"
    assert not coordinator.ask(PROTOTYPES).has_error()
    assert len(list_events(entries(files[0]))) == 2


def test_what_is_told_is_on_the_lattice_of_the_noise(phantoms, tmp_path):
    files = settle(study(), phantoms, tmp_path / "run")
    coordinator = Asking(files[0], study())
    coordinator.join()
    size = count_numbers(PROTOTYPES, len(PHANTOM_CLASSES), R)
    told = NoisedReply.read(coordinator.ask(PROTOTYPES).content, size).sums
    steps = told.numbers / (told.deviation * 2.0**-36)
    assert np.abs(steps - np.round(steps)).max() < 1e-3
    (spent,) = list_events(entries(files[0]))
    assert told.deviation == pytest.approx(spent.noise_multiplier * PROTOTYPES_NORM)


def test_messages_that_are_none_are_refused_and_cost_nothing(phantoms, tmp_path):
    files = settle(study(), phantoms, tmp_path / "run")
    coordinator = Asking(files[0], study())
    assert coordinator.ask(MOMENTS).error.reason == "contract"  # not joined
    coordinator.join()
    assert coordinator.ask(MOMENTS, float("nan")).error.reason == "contract"
    assert coordinator.ask(MOMENTS, 1e30).error.reason == "contract"
    assert coordinator.send(RecordDict(), PROTOTYPES).error.reason == "contract"
    assert coordinator.round().error.reason == "contract"
    exact = [MeansRequest(study().id).record()]
    centre, weights = np.zeros(1024), np.full(len(PHANTOM_CLASSES), 0.25)
    exact.append(SumsRequest(study=study().id, centre=centre, weights=weights).record())
    for asked, kind in zip(exact, (MEANS, SUMS), strict=True):
        assert coordinator.send(asked, kind).error.reason == "contract"
    other = Asking(files[0], make_study(classes=PHANTOM_CLASSES))
    other.join()
    assert other.ask(MOMENTS).error.reason == "contract"  # a study that asks for none
    assert list_events(entries(files[0])) == ()


def test_a_run_killed_between_the_two_goes_on_from_the_same_moments(
    phantoms, tmp_path, new_process, monkeypatch
):
    files, run = settle(study(), phantoms, tmp_path / "run"), tmp_path / "run"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("server.rounds.private_head.solve_prototypes", killed)
        with pytest.raises(KeyboardInterrupt):
            simulate_run(server_app, client_app, files, run)
    kept = (run / "whitening.safetensors").read_bytes()
    # A site that was there goes; the others have answered, and are not asked for more.
    new_process()
    simulate_run(server_app, client_app, files[1:], run)
    assert (run / "whitening.safetensors").read_bytes() == kept
    for path in files:
        assert len(list_events(entries(path))) == 2


def test_a_site_that_only_evaluates_gives_no_sums_and_a_poor_one_stays_out(phantoms, tmp_path):
    files = settle(study(aggregate={"quorum": 2}), phantoms, tmp_path / "run")
    by_name = {path.parent.name: path for path in files}
    edit_site(by_name["west"], role="evaluate")
    edit_site(by_name["north"], policy={"max_epsilon": 4.0, "delta": 1e-5})
    before = Asking(by_name["north"], study(seed=5))
    before.join()
    assert not before.ask(MOMENTS).has_error()
    simulate_run(server_app, client_app, files, tmp_path / "run")
    solved = json.loads((tmp_path / "run/solved.json").read_text())
    assert solved["sites"] == ["east", "south"]
    results, _ = read_results(tmp_path / "run", len(PHANTOM_CLASSES))
    assert set(results["federated"]) == {"east", "south", "west"}
    assert list_events(entries(by_name["west"])) == ()


@pytest.mark.parametrize(
    ("numbers", "deviation"), [(1e6, 1.0), (1.0, 1e-3), (1.0, 1e6)], ids=["sum", "less", "more"]
)
def test_a_site_that_lies_about_its_sum_or_its_noise_is_left_out(
    phantoms, tmp_path, caplog, numbers, deviation
):
    def app(message, context):
        reply = client_app(message, context)
        lies = message.metadata.message_type in NOISED and "south" in context.node_config["site"]
        if lies:
            arrays, config = reply.content["arrays"], reply.content["config"]
            arrays["numbers"] = Array(arrays["numbers"].numpy() * numbers)
            config["deviation"] *= deviation
        return reply

    files = settle(study(aggregate={"quorum": 2}), phantoms, tmp_path / "run")
    simulate_run(server_app, app, files, tmp_path / "run")
    solved = json.loads((tmp_path / "run/solved.json").read_text())
    assert solved["sites"] == ["east", "north", "west"]
    assert "south is left out" in caplog.text


def test_no_final_message_of_a_private_study_brings_sums_to_compare(phantoms, tmp_path):
    """By them a server could try how many training images of a class there are."""
    wanted = study(adapt=True)
    files = settle(wanted, phantoms, tmp_path / "run")
    coordinator = Asking(files[0], wanted)
    coordinator.join()
    assert not coordinator.ask(MOMENTS).has_error()
    assert not coordinator.ask(PROTOTYPES).has_error()
    network = RUNTIME.open_session(files[0], wanted.id).prepared.network
    released = to_arrays({name: torch.ones(shape) for name, shape in network.shapes.items()})
    for images in (1.0, 100.0):
        weights = np.full(len(PHANTOM_CLASSES), 0.01)
        sums = replace(Sums.zero(network.width, weights), counts=images * np.ones(len(weights)))
        asked = FinalRequest(study=wanted.id, arrays=released, solved=Solved.of(sums, 0.2))
        assert coordinator.send(asked.record(), "evaluate").error.reason == "contract"
    plain = FinalRequest(study=wanted.id, arrays=released)
    assert not coordinator.send(plain.record(), "evaluate").has_error()


def test_a_lie_about_moments_spoils_no_later_question(phantoms, tmp_path):
    def app(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == MOMENTS and "south" in context.node_config["site"]:
            arrays = reply.content["arrays"]
            numbers = arrays["numbers"].numpy().copy()
            numbers[-1 - R : -1], numbers[-1] = 90.0, -90.0  # no mean, and of no patients
            arrays["numbers"] = Array(numbers)
        return reply

    files = settle(study(aggregate={"quorum": 2}), phantoms, tmp_path / "run")
    simulate_run(server_app, app, files, tmp_path / "run")
    solved = json.loads((tmp_path / "run/solved.json").read_text())
    assert {"east", "north", "west"} <= set(solved["sites"])
