"""A study whose head is solved from sums, through the real apps, is the pooled head."""

import json

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Array, Message
from safetensors.torch import load_file

from client.ledger.entries import Sent
from client.ledger.ledger import read_ledger
from common.errors import RunError, StudyError
from common.heads.registry import HEADS
from server.app import app as server_app
from server.runs.results import read_results
from server.runs.run_folder import RunFolder
from simulations.engines.base import InProcess
from simulations.engines.grid import simulate_run
from simulations.studies import runner
from tests.builders import (
    PHANTOM_CLASSES,
    PHANTOMS,
    RUNTIME,
    client_app,
    create_run,
    edit_site,
    find_phantoms,
    make_study,
)

HEAD = {"backbone": "shufflenet_v2_x0_5", "weights": "none", "head": "discriminant", "init": None}


def solved_study(**model):
    rounds = {"rounds": 2, "local_steps": 1, "batch_size": 8}
    return make_study(
        classes=PHANTOM_CLASSES,
        model=HEAD | model,
        images={"size": 32},
        train=rounds if model.get("init") else {"rounds": 0},
        aggregate={"quorum": 3},
    )


def run(folder, phantoms, study, app=client_app, policy=None):
    site_files = create_run(find_phantoms(phantoms), study, folder, phantoms / "cache")
    for path in site_files:
        if policy and path.parent.name in policy:
            edit_site(path, policy=policy[path.parent.name])
    simulate_run(server_app, app, site_files, folder)
    return RunFolder(folder), site_files


@pytest.mark.parametrize("head", HEADS)
def test_the_released_model_is_pooled_trainings_to_the_last_decision(tmp_path, phantoms, head):
    run(tmp_path / "run", phantoms, solved_study(head=head))
    runner.resume_run(tmp_path / "run", None, InProcess(), compare=True)
    results, facts = read_results(tmp_path / "run", len(PHANTOM_CLASSES))
    assert set(results) == {"federated", "local", "pooled"}
    for name, counts in results["federated"].items():
        assert (counts.confusion == results["pooled"][name].confusion).all()
    assert facts["released_round"] == 0
    told = json.loads((tmp_path / "run" / "solved.json").read_text())
    assert told["head"] == head
    assert told["sites"] == ["east", "north", "south", "west"]
    best = max(score for score in told["validation"].values() if score is not None)
    assert told["validation"][f"{told['strength']:g}"] == best


def test_every_message_of_it_is_in_the_ledger(tmp_path, phantoms):
    _, site_files = run(tmp_path / "run", phantoms, solved_study())
    lines = [e for e in read_ledger(site_files[0].parent / "state") if isinstance(e, Sent)]
    assert [line.release.kind for line in lines] == [
        "join",
        "means",
        "sums",
        "candidates",
        "validate",
        "final",
    ]
    sums = lines[2].contents
    assert set(sums.tensors) == {"counts", "totals", "second"}
    assert sums.tensors["counts"] == (len(PHANTOM_CLASSES),)
    assert sums.bytes > 4 * sums.tensors["second"][0]


def test_a_site_refuses_sums_of_few_patients_and_the_others_go_on(tmp_path, phantoms):
    folder, site_files = run(
        tmp_path / "run",
        phantoms,
        solved_study(),
        policy={"south": {"disclose": {"counts": "exact", "sums": 1000}}},
    )
    assert folder.read_solved_sites() == {"east", "north", "west"}
    south = next(path for path in site_files if path.parent.name == "south")
    (line,) = [e for e in read_ledger(south.parent / "state") if isinstance(e, Sent)]
    assert (line.release.kind, line.contents.metrics) == ("join", ("refused",))


def test_a_site_that_gives_no_sums_takes_part_in_rounds_after_a_solved_head(tmp_path, phantoms):
    few = {"south": {"disclose": {"counts": "exact", "sums": 1000}}}
    folder, site_files = run(
        tmp_path / "run", phantoms, solved_study(head="linear", init="solved"), policy=few
    )
    assert folder.read_solved_sites() == {"east", "north", "west"}
    south = next(path for path in site_files if path.parent.name == "south")
    lines = [e for e in read_ledger(south.parent / "state") if isinstance(e, Sent)]
    assert [line.release.kind for line in lines] == [
        *("join", "candidates", "round", "round", "validate", "validate", "final")
    ]


def test_where_no_site_gives_sums_a_study_starts_from_zero(tmp_path, phantoms):
    few = {name: {"disclose": {"counts": "exact", "sums": 1000}} for name in PHANTOMS}
    study = solved_study(head="linear", init="solved")
    folder, _ = run(tmp_path / "run", phantoms, study, policy=few)
    assert folder.read_solved_sites() == set()
    assert folder.read_last().round == 2


def test_a_server_gets_no_sums_that_a_site_agreed_not_to_tell(tmp_path, phantoms):
    """It asks all the same, and has the right centre, weights and study."""
    asked = []

    def app(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == "query.sums" and not asked:
            asked.append(message.content)
        if message.metadata.message_type == "train" and "south" in context.node_config["site"]:
            again = Message(asked[0], message.metadata.dst_node_id, "query.sums")
            told = client_app(again, context)
            assert told.has_error()
            asked.append(told.error.reason)
        return reply

    few = {"south": {"disclose": {"counts": "exact", "sums": 1000}}}
    run(tmp_path / "run", phantoms, solved_study(head="linear", init="solved"), app, few)
    assert asked[1:] == ["contract"] * 2


def test_who_tells_no_figures_of_rounds_gives_sums_but_judges_none(tmp_path, phantoms):
    quiet = {"disclose": {"counts": "exact", "metrics": "final", "sums": 1}}
    names = ("east", "north", "south", "west")
    folder, _ = run(tmp_path / "run", phantoms, solved_study(), policy=dict.fromkeys(names, quiet))
    told = json.loads((folder.path / "solved.json").read_text())
    assert (told["strength"], told["validation"]) == (0.2, {})
    assert set(read_results(folder.path, 4)[0]["federated"]) == set(names)


def test_a_run_that_begins_with_a_solved_head_trains_it_on(tmp_path, phantoms):
    folder, site_files = run(tmp_path / "run", phantoms, solved_study(head="linear", init="solved"))
    last = folder.read_last()
    assert last.round == 2
    lines = [e for e in read_ledger(site_files[0].parent / "state") if isinstance(e, Sent)]
    assert [line.release.kind for line in lines] == [
        *("join", "means", "sums", "candidates", "round", "round", "validate", "validate", "final")
    ]
    assert any(tensor.abs().max() > 1 for tensor in last.tensors.values())  # not from zero


def test_a_run_stopped_after_it_was_solved_does_not_ask_for_sums_again(tmp_path, phantoms):
    study, asked = solved_study(), []

    def stops(message, context):
        asked.append(message.metadata.message_type)
        if message.metadata.message_type == "evaluate" and asked.count("evaluate") <= 12:
            raise RuntimeError
        return client_app(message, context)

    folder = tmp_path / "run"
    with pytest.raises(RunError, match="evaluation"):
        run(folder, phantoms, study, app=stops)
    RUNTIME.close()
    solved = RunFolder(folder).read_last()
    assert solved.round == 0
    runner.resume_run(folder, None, InProcess(), compare=False)
    again = RunFolder(folder).read_last()
    assert all(torch.equal(again.tensors[name], t) for name, t in solved.tensors.items())
    assert asked.count("query.sums") == 4


def test_rounds_that_make_a_solved_head_worse_are_given_up_and_not_released(tmp_path, phantoms):
    def app(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == "train":
            arrays = reply.content.array_records["arrays"]
            for name, array in list(arrays.items()):
                arrays[name] = Array(np.zeros_like(array.numpy()))
        return reply

    study = solved_study(head="linear", init="solved")
    assert study.train.patience == 5
    longer = study.train.model_copy(update={"rounds": 9, "patience": 2})
    folder, _ = run(tmp_path / "run", phantoms, study.model_copy(update={"train": longer}), app)
    last, facts = folder.read_last(), read_results(folder.path, 4)[1]
    assert (last.round, last.best.round, facts["released_round"]) == (3, 0, 0)
    released = load_file(folder.path / "model.safetensors")
    for name, tensor in last.best.tensors.items():
        assert torch.equal(released[name], tensor)
    assert released["fc.linear.weight"].abs().max() > 0
    assert folder.read_history()[-1]["model_round"] == 0


def test_a_study_goes_on_from_a_model_with_a_centre_of_its_own(tmp_path, phantoms):
    first, _ = run(tmp_path / "first", phantoms, solved_study(head="linear", init="solved"))
    started = solved_study(head="linear", init=str(first.path), unit_features=True)
    second, _ = run(tmp_path / "second", phantoms, started)
    released = first.read_history()[-1]
    overall = next(x for x in second.read_history() if x["round"] == 1 and x["site"] is None)
    assert overall["balanced_accuracy"] == pytest.approx(released["balanced_accuracy"])
    with pytest.raises(StudyError, match="another unit_features"):
        run(tmp_path / "third", phantoms, solved_study(head="linear", init=str(first.path)))


@pytest.mark.parametrize("other", ["centre", "weights"])
def test_a_second_question_for_sums_is_refused(tmp_path, phantoms, other):
    """From two sums with other centres or weights, every image of a class can be told."""
    refused = []

    def app(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == "query.sums":
            assert not client_app(message, context).has_error()  # the same again
            config, arrays = message.content["config"], message.content["arrays"]
            if other == "weights":
                config["class-weights"] = [1.0, 0.0, 0.0, 0.0]
            else:
                arrays["centre"] = Array(arrays["centre"].numpy() + np.float32(0.5))
            refused.append(client_app(message, context).error.reason)
        return reply

    folder, _ = run(tmp_path / "run", phantoms, solved_study(), app)
    assert refused == ["contract"] * 4
    assert len(folder.read_solved_sites()) == 4


def lying(kind, change, name="south"):
    """The app of sites one of which multiplies its sums."""

    def app(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == kind and name in context.node_config["site"]:
            arrays = reply.content["arrays"]
            for part in list(arrays):
                arrays[part] = Array(change(arrays[part].numpy()))
        return reply

    return app


@pytest.mark.parametrize("kind", ["query.means", "query.sums"])
def test_who_sums_more_images_than_it_told_at_join_is_left_out(tmp_path, phantoms, kind):
    app = lying(kind, lambda numbers: 1e6 * numbers)
    folder, _ = run(tmp_path / "run", phantoms, solved_study(), app)
    assert "south" not in folder.read_solved_sites() or kind == "query.means"
    shares = [load_file(folder.path / "centre.safetensors")["centre"].numpy()]
    assert np.abs(shares).max() < 1e3
    assert set(read_results(folder.path, 4)[0]["federated"]) >= {"east", "north", "west"}


def test_a_site_of_which_all_is_true_counts_for_no_more_than_its_weight(tmp_path, phantoms):
    """Sums of a site that is far larger than the median count as its capped weight does."""
    study = make_study(
        classes=PHANTOM_CLASSES,
        model=HEAD,
        images={"size": 32},
        train={"rounds": 0},
        aggregate={"quorum": 3, "max_weight": 1.0},
    )
    folder, _ = run(tmp_path / "run", phantoms, study)
    facts = yaml.safe_load((folder.path / "run.yaml").read_text())["sites"]
    told = {name: sum(site["images"]["train"]) for name, site in facts.items()}
    limit = sorted(told.values())[1]
    assert max(told.values()) > limit
    counted = folder.read_sums().counts.sum()
    assert counted == pytest.approx(sum(min(n, limit) for n in told.values()))
