"""At the end each site has a model fitted to itself; of it, counts may leave, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, Message
from safetensors.torch import load_file

from client.cli.main import main
from client.consent.cohort import cut_records
from client.ledger.entries import Sent
from client.ledger.ledger import read_ledger
from client.site import Site
from common.errors import RunError
from common.flower.messages import record_to_bytes
from common.metrics.metrics import value
from common.model.inference import load_model
from server.app import app as server_app
from server.runs.results import read_evidence, read_results
from simulations.engines.grid import simulate_run
from tests.builders import (
    PHANTOM_CLASSES,
    RUNTIME,
    client_app,
    create_run,
    edit_site,
    find_phantoms,
    make_study,
)
from tests.server.rounds.test_solving import run

pytestmark = pytest.mark.numbers

HEAD = {"backbone": "squeezenet1_0", "weights": "none", "head": "discriminant", "init": None}
TELLS = {"counts": "exact", "sums": 1, "adapted": True}
QUIET = TELLS | {"adapted": False}


def study(**changes):
    return make_study(
        **{
            "classes": PHANTOM_CLASSES,
            "model": HEAD,
            "images": {"size": 32},
            "train": {"rounds": 0},
            "aggregate": {"quorum": 1},
            "adapt": True,
        }
        | changes
    )


def policies(disclose):
    return {name: {"disclose": disclose} for name in ("east", "north", "south", "west")}


def kept(site_file):
    (folder,) = (site_file.parent / "state/adapted").iterdir()
    return folder


def test_a_model_of_each_site_stays_there_and_its_counts_come_back(tmp_path, phantoms):
    left, asked = [], study()

    def app(message, context):
        reply = client_app(message, context)
        left.append(record_to_bytes(reply.content))
        return reply

    folder, site_files = run(tmp_path / "run", phantoms, asked, app, policies(TELLS))
    results, _ = read_results(folder.path, 4)
    assert list(results) == ["local", "federated", "adapted"]
    north = next(path for path in site_files if path.parent.name == "north")
    about = json.loads((kept(north) / "about.json").read_text())
    assert about["private"] is False
    assert "must not leave" in about["note"]
    # The very model that was counted, in two lines of Python.
    tested = cut_records(Site.read(north), asked).test
    called = load_model(kept(north)).decisions([record.image.path for record in tested])
    truth = torch.tensor([record.label for record in tested])
    assert int((called == truth).sum()) == int(np.trace(results["adapted"]["north"].confusion))
    for path in site_files:
        weights, released = (
            next(t for name, t in load_file(where).items() if name.endswith("linear.weight"))
            for where in (kept(path) / "model.safetensors", folder.path / "model.safetensors")
        )
        if not torch.equal(weights, released):
            row = weights[0, :8].numpy().tobytes()
            assert not any(row in reply for reply in left)
        assert (kept(path) / "model.safetensors").stat().st_mode & 0o077 == 0


def test_a_policy_that_does_not_say_so_tells_no_counts_of_it(tmp_path, phantoms):
    folder, site_files = run(tmp_path / "run", phantoms, study(), policy=policies(QUIET))
    assert list(read_results(folder.path, 4)[0]) == ["federated"]
    for path in site_files:
        assert not [m for m in finals(path)[0] if m.startswith(("adapted", "local"))]
    assert kept(site_files[0]).is_dir()


def finals(site_file):
    lines = [e for e in read_ledger(site_file.parent / "state") if isinstance(e, Sent)]
    return [line.contents.metrics for line in lines if line.release.kind == "final"]


def test_the_ledger_names_what_is_told_of_it(tmp_path, phantoms):
    _, site_files = run(tmp_path / "run", phantoms, study(), policy=policies(TELLS))
    told = [finals(path)[0] for path in site_files]
    assert any({"adapted.confusion", "local.confusion"} <= set(names) for names in told)


def test_evidence_comes_from_sites_that_tell_exact_counts_alone(tmp_path, phantoms):
    """One that rounds tells none, nor one with two test patients; who lies is left out."""
    told, asked = {}, study(holdout={"validation": 0.1, "test": 0.5})

    def app(message, context):
        reply = client_app(message, context)
        name = Path(context.node_config["site"]).parent.name
        if message.metadata.message_type == "evaluate" and "evidence" in reply.content:
            told[name] = reply.content
            if name == "north":
                both, *rest = reply.content["evidence"]["adapted-local joint"]
                reply.content["evidence"]["adapted-local joint"] = [both + 1, *rest]
        return reply

    rounds = {"disclose": TELLS | {"counts": "rounded", "metrics": "final"}}
    policy = policies(TELLS) | {"south": rounds}
    folder, site_files = run(tmp_path / "run", phantoms, asked, app, policy)
    results, facts = read_results(folder.path, 4)
    assert set(told) == {"east", "north"}
    assert set(results["adapted"]) == {"east", "south", "west"}
    found = read_evidence(facts)
    assert set(found) == {"east"}
    tested = cut_records(Site.read(site_files[0]), asked).test
    assert found["east"].patients == len({record.patient for record in tested})
    for pair in found["east"].pairs:
        first, second = results[pair.first]["east"], results[pair.second]["east"]
        assert pair.joint.both + pair.joint.only_first == np.trace(first.confusion)
        assert sum(pair.joint) == first.n
        difference = pair.differences["balanced_accuracy"]
        gain = value(first, "balanced_accuracy") - value(second, "balanced_accuracy")
        assert difference.value == pytest.approx(gain)
        assert difference.low <= gain <= difference.high
    assert "evidence.adapted-local joint" in finals(site_files[0])[0]
    for silent in site_files[2:]:
        assert any(name.startswith("adapted") for name in finals(silent)[0])
        assert not any(name.startswith("evidence") for name in finals(silent)[0])


def test_a_study_that_adapts_nothing_keeps_nothing(tmp_path, phantoms):
    folder, site_files = run(tmp_path / "run", phantoms, study(adapt=False), policy=policies(TELLS))
    assert list(read_results(folder.path, 4)[0]) == ["federated"]
    assert not (site_files[0].parent / "state/adapted").exists()


def test_a_site_that_wants_no_model_of_its_own_keeps_none_and_the_others_do(tmp_path, phantoms):
    asked = study()
    site_files = create_run(find_phantoms(phantoms), asked, tmp_path / "run", phantoms / "cache")
    for path in site_files:
        edit_site(path, adapt=path.parent.name != "south", policy={"disclose": TELLS})
    simulate_run(server_app, client_app, site_files, tmp_path / "run")
    results, _ = read_results(tmp_path / "run", 4)
    assert set(results["adapted"]) == {"east", "north", "west"}
    assert len(results["federated"]) == 4
    has = {path.parent.name for path in site_files if (path.parent / "state/adapted").exists()}
    assert has == {"east", "north", "west"}


@pytest.mark.parametrize("few", [True, False])
def test_the_sums_of_all_go_to_sites_only_where_three_hide_each_other(tmp_path, phantoms, few):
    sent = []

    def app(message, context):
        if message.metadata.message_type == "evaluate":
            sent.append("sums" in message.content.array_records)
        return client_app(message, context)

    silent = {"disclose": TELLS | {"sums": "none"}}
    policy = policies(TELLS) | ({"north": silent, "south": silent} if few else {})
    run(tmp_path / "run", phantoms, study(), app, policy)
    assert set(sent) == {not few}


def test_the_sums_go_to_the_sites_that_are_in_them_alone(tmp_path, phantoms):
    """One that is not would take off images that are not there; one that only tests needs none."""
    sent, silent = {}, {"disclose": TELLS | {"sums": "none"}}

    def app(message, context):
        if message.metadata.message_type == "evaluate":
            name = Site.read(Path(context.node_config["site"])).name
            sent[name] = "sums" in message.content.array_records
        return client_app(message, context)

    rounds = {"rounds": 1, "local_steps": 1, "batch_size": 8, "lr": 1e-7}
    asked = study(model=HEAD | {"head": "linear", "init": "solved"}, train=rounds)
    tests = replace(find_phantoms(phantoms)[2], name="tests", evaluates_only=True)
    found = [*find_phantoms(phantoms), tests]
    site_files = create_run(found, asked, tmp_path / "run", phantoms / "cache")
    for path in site_files:
        role = "evaluate" if path.parent.name == "tests" else "train"
        edit_site(
            path, role=role, policy=silent if path.parent.name == "south" else {"disclose": TELLS}
        )
    simulate_run(server_app, app, site_files, tmp_path / "run")
    assert sent == {"east": True, "north": True, "west": True, "south": False, "tests": False}
    own = read_results(tmp_path / "run", 4)[0]["adapted"]
    assert set(own) == {"east", "north", "south", "west"}


SPOILT = {
    "not finite": lambda a: np.full_like(a, np.nan),
    "negative": lambda a: -np.abs(a) - 1,
    "huge": lambda a: np.full_like(a, 1e300),
    "another shape": lambda a: a[1:],
    "float32": lambda a: a.astype(np.float32),
}


@pytest.mark.parametrize("part", ["counts", "totals", "second"])
def test_sums_that_can_be_none_are_refused_and_nothing_is_kept(tmp_path, phantoms, part):
    refused = []

    def app(message, context):
        if message.metadata.message_type != "evaluate":
            return client_app(message, context)
        honest = message.content.array_records["sums"]
        for change in SPOILT.values():
            spoilt = Message(message.content, message.metadata.dst_node_id, "evaluate")
            arrays = dict(honest.items())
            arrays[part] = Array(change(honest[part].numpy()))
            spoilt.content["sums"] = type(honest)(arrays)
            refused.append(client_app(spoilt, context).error.reason)
        message.content["sums"] = honest
        return client_app(message, context)

    folder, _ = run(tmp_path / "run", phantoms, study(), app, policies(TELLS))
    assert set(refused) == {"contract"}
    assert len(read_results(folder.path, 4)[0]["adapted"]) == 4


def test_after_rounds_a_site_trains_the_model_on_if_that_pays(tmp_path, phantoms, caplog):
    caplog.set_level("INFO", "client")
    rounds = {"rounds": 1, "local_epochs": 1, "batch_size": 8, "lr": 0.01}
    changes = {"model": HEAD | {"head": "linear", "init": "zero"}, "train": rounds}
    folder, site_files = run(tmp_path / "run", phantoms, study(**changes), policy=policies(TELLS))
    assert list(read_results(folder.path, 4)[0]) == ["local", "federated", "adapted"]
    for path in site_files:
        about = json.loads((kept(path) / "about.json").read_text())
        assert about["fitted"] == "by training on"
        assert 0 <= about["rounds"] <= 3
        said = (
            "the model fitted to this site" if about["rounds"] else "no fit to this site improved,"
        )
        assert f"{said} is in {kept(path)}" in caplog.text


def test_in_a_private_study_no_model_is_fitted_while_a_server_waits(tmp_path, phantoms):
    """How long that takes grows with the patients, and with epochs that no ε bounds."""
    private = {"mechanism": "dp_sgd", "epsilon": 8.0, "delta": 1e-4}
    changes = {"model": HEAD | {"head": "linear", "init": "zero"}, "train": {"rounds": 1}}
    folder, site_files = run(
        tmp_path / "run", phantoms, study(privacy=private, **changes), policy=policies(TELLS)
    )
    assert list(read_results(folder.path, 4)[0]) == ["federated"]
    for path in site_files:
        assert not (path.parent / "state/adapted").exists()


def test_after_a_private_study_a_site_fits_the_model_when_nobody_waits(
    tmp_path, phantoms, run_main
):
    private = {"preset": "head", "epsilon": 8.0, "delta": 1e-4, "directions": 8}
    wanted = study(model=HEAD | {"head": "discriminant"}, privacy=private)
    _, site_files = run(tmp_path / "run", phantoms, wanted, policy=policies(TELLS))
    RUNTIME.close()
    before = read_ledger(site_files[0].parent / "state")
    code, said = run_main(main, "adapt", site_files[0], "another")
    assert code == 1
    assert f"{wanted.name} ({wanted.id})" in " ".join(said.split())
    code, said = run_main(main, "adapt", site_files[0], wanted.name)
    assert code == 0, said
    assert "must not leave" in " ".join(said.split())
    about = json.loads((kept(site_files[0]) / "about.json").read_text())
    assert about["private"] is False
    images = sorted((phantoms / "east/images").iterdir())[:2]
    assert load_model(kept(site_files[0])).decisions(images).shape == (2,)
    assert read_ledger(site_files[0].parent / "state") == before


@pytest.mark.parametrize("part", ["totals", "shrinkage"])
def test_sums_of_another_model_are_refused_with_a_line_and_were_the_end(tmp_path, phantoms, part):
    """So no server tries sums until it knows how many images of a class there are."""
    told = []

    def app(message, context):
        if message.metadata.message_type != "evaluate":
            return client_app(message, context)
        site_file = Path(context.node_config["site"])
        honest, shrinkage = message.content["sums"], message.content["config"]["shrinkage"]
        for share in (0.9, 0.8):
            if part == "shrinkage":
                message.content["config"]["shrinkage"] = share * shrinkage
            else:
                totals = Array(share * honest["totals"].numpy())
                message.content["sums"] = type(honest)({**honest, "totals": totals})
            told.append(client_app(message, context).error.reason)
        lines = [e for e in read_ledger(site_file.parent / "state") if isinstance(e, Sent)]
        told.append(lines[-1].contents.metrics)
        message.content["sums"], message.content["config"]["shrinkage"] = honest, shrinkage
        return client_app(message, context)

    with pytest.raises(RunError, match="evaluation"):
        run(tmp_path / "run", phantoms, study(), app, policies(TELLS | {"metrics": "final"}))
    assert told[1] == "contract"
    assert told[2] == (told[0],)


def test_the_same_model_with_other_sums_is_another_end(tmp_path, phantoms):
    """Fitted from sums that a server makes up, it would tell of a model of the server's choice."""
    answers = []

    def app(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == "evaluate":
            other = dict(message.content.array_records["sums"].items())
            other["totals"] = Array(other["totals"].numpy() / 2)
            again = Message(message.content, message.metadata.dst_node_id, "evaluate")
            answers.append(client_app(again, context).error if again.has_error() else None)
            honest = message.content.array_records["sums"]
            again.content["sums"] = type(honest)(other)
            answers.append(client_app(again, context).error.reason)
            again.content["sums"] = honest
        return reply

    coarse = policies(TELLS | {"counts": "rounded", "metrics": "final"})
    run(tmp_path / "run", phantoms, study(), app, coarse)
    assert answers == [None, "contract"] * 4


def test_after_the_end_no_other_read_out_tells_of_the_same_model(tmp_path, phantoms):
    """Each would tell another histogram of the scores of test patients."""
    answers = []

    def app(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == "evaluate":
            config = message.content["config"]
            answers.append(client_app(message, context).has_error())
            config["temperatures"] = [3.25]
            answers.append(client_app(message, context).error.reason)
        return reply

    final = policies(TELLS | {"metrics": "final"})
    run(tmp_path / "run", phantoms, study(), app, final)
    assert answers == [False, "contract"] * 4


def test_nor_does_it_of_a_model_that_a_site_trained_and_told_of(tmp_path, phantoms):
    answers, trained = [], {}

    def app(message, context):
        site = message.metadata.dst_node_id
        if message.metadata.message_type == "train":
            trained[site] = message.content["arrays"]
        if message.metadata.message_type != "evaluate":
            return client_app(message, context)
        message.content["arrays"], replies = trained[site], []
        for temperature in (3.25, 0.5):
            message.content["config"]["temperatures"] = [temperature]
            replies.append(client_app(message, context))
        answers.extend(reply.has_error() for reply in replies)
        return replies[0]

    model = HEAD | {"head": "linear", "init": "zero"}
    run(tmp_path / "run", phantoms, study(model=model, train={"rounds": 1}), app, policies(TELLS))
    assert answers == [False, True] * 4
