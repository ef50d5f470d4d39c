"""Probabilities are read as validation says over all sites; decisions as the head makes them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.heads.read_out import AS_IT_IS, ReadOut
from common.metrics.counts import Counts
from common.model.inference import load_model
from common.protocol.validate import ValidateReply, ValidateRequest
from server.rounds.judging import unite_judgements
from server.runs.results import read_results
from tests.builders import RUNTIME, client_app
from tests.server.rounds.test_solving import run, solved_study

pytestmark = pytest.mark.numbers


def read_out_of(folder: Path) -> ReadOut:
    told = json.loads((folder / "read_out.json").read_text())
    return ReadOut(told["temperature"], tuple(told["log_prior"]))


def test_the_read_out_has_the_least_loss_over_all_sites(tmp_path, phantoms):
    folder, site_files = run(tmp_path / "run", phantoms, solved_study())
    found, last = read_out_of(folder.path), folder.read_last()
    others = [AS_IT_IS, ReadOut(found.temperature * 2), ReadOut(found.temperature / 2), found]
    losses = torch.zeros(len(others))
    for path in site_files:
        session = RUNTIME.open_session(path, folder.study.id)
        losses += torch.tensor(session.judge(last.tensors, others).losses)
    assert losses.argmin() == 3
    assert found != AS_IT_IS


def test_the_released_model_reads_its_probabilities_by_it(tmp_path, phantoms):
    folder, _ = run(tmp_path / "run", phantoms, solved_study())
    model, images = load_model(folder.path), sorted((phantoms / "north/images").iterdir())[:6]
    logits, found = model.logits(images), read_out_of(folder.path)
    expected = (logits.double() / found.temperature + torch.tensor(found.log_prior)).softmax(1)
    assert torch.allclose(model.probabilities(images), expected.float())
    assert torch.equal(model.decisions(images), logits.argmax(1))
    assert load_file(folder.path / "model.safetensors")
    assert model.probabilities([]).shape == (0, len(model.classes))
    assert model.decisions([]).shape == (0,)
    (folder.path / "read_out.json").unlink()
    assert torch.allclose(load_model(folder.path).probabilities(images), logits.softmax(1))


def test_test_figures_are_of_decisions_and_of_probabilities_so_read(tmp_path, phantoms):
    folder, site_files = run(tmp_path / "run", phantoms, solved_study())
    (last, found), (results, _) = (
        (folder.read_last(), read_out_of(folder.path)),
        read_results(folder.path, 4),
    )
    for path in site_files:
        session = RUNTIME.open_session(path, folder.study.id)
        told = results["federated"][session.prepared.site.name]
        assert told.sparse() == session.evaluate(last.tensors, "test", read_out=found).sparse()


def test_where_no_site_tells_its_rounds_nothing_is_asked_or_changed(tmp_path, phantoms):
    asked = []

    def app(message, context):
        asked.append(message.metadata.message_type)
        return client_app(message, context)

    quiet = {"disclose": {"counts": "exact", "metrics": "final", "sums": 1}}
    names = ("east", "north", "south", "west")
    policy = dict.fromkeys(names, quiet)
    folder, _ = run(tmp_path / "run", phantoms, solved_study(), app, policy)
    assert read_out_of(folder.path) == AS_IT_IS
    assert "query.validate" not in asked


def test_a_site_that_agreed_to_tell_no_rounds_refuses_to_validate(tmp_path, phantoms):
    refused = []

    def app(message, context):
        reply = client_app(message, context)
        if message.metadata.message_type == "evaluate":
            content = message.content
            arrays = content.array_records["arrays"]
            study = content.config_records["config"]["study"]
            asked = ValidateRequest(study=study, arrays=arrays, read_outs=[AS_IT_IS]).record()
            question = type(message)(asked, message.metadata.dst_node_id, "query.validate")
            refused.append(client_app(question, context).error.reason)
        return reply

    quiet = {"disclose": {"counts": "exact", "metrics": "final", "sums": 1}}
    policy = dict.fromkeys(("east", "north", "south", "west"), quiet)
    run(tmp_path / "run", phantoms, solved_study(), app, policy)
    assert set(refused) == {"contract"}


def test_no_site_chooses_the_read_out_by_the_size_of_its_losses() -> None:
    read_outs = [AS_IT_IS, ReadOut(2.0)]
    counts = Counts.of(torch.tensor([[2.0, 0.0]]).repeat(50, 1), torch.zeros(50).long())
    honest = ValidateReply(counts=counts, losses=[10.0, 40.0])
    few = Counts.of(torch.tensor([[2.0, 0.0]]), torch.zeros(1).long())
    for loss in (1e300, 1e6):
        liar = ValidateReply(counts=few, losses=[loss, 0.0])
        assert unite_judgements(read_outs, [honest, liar], 2).read_out == AS_IT_IS
