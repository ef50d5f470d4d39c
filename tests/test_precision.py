"""The precision is measured once, remembered, fixed for a study, and a site may say its own."""

import json

import pytest
import torch

from client import precision as room
from client.precision import Precision, measure, settle
from common.cut import Split
from common.network import assemble
from common.study import Study

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net():
    return assemble(
        Study(
            name="t",
            classes=("a", "b", "c"),
            model={"backbone": "shufflenet_v2_x0_5", "weights": "none", "unfreeze": "last:1"},
            images={"size": 64},
            train={"rounds": 1},
        ),
        "none",
    )


def settled(net, memory, study="0123", asked="auto"):
    return settle(asked, study, net.split, net.preprocess, CPU, memory)


def test_measuring_leaves_the_network_alone(net):
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    chosen = measure(net.split, net.preprocess, CPU)
    assert isinstance(chosen, Precision)
    assert all(torch.equal(net.model.state_dict()[name], t) for name, t in before.items())
    assert all(p.grad is None for p in net.model.parameters())


def test_a_part_computes_in_half_precision_where_that_is_clearly_faster(net, monkeypatch):
    monkeypatch.setattr(room, "_has_units", lambda device: True)
    monkeypatch.setattr(room, "_CLEARLY", 0.0)
    assert measure(net.split, net.preprocess, CPU) == Precision(
        prefix="bfloat16", suffix="bfloat16"
    )
    monkeypatch.setattr(room, "_CLEARLY", 1e9)
    assert measure(net.split, net.preprocess, CPU) == Precision()


def test_it_is_measured_once_and_kept(net, tmp_path, monkeypatch):
    memory = tmp_path / "precision.json"
    first = settled(net, memory)
    assert memory.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(room, "measure", None)  # never called again
    assert settled(net, memory) == first
    assert settled(net, memory, study="4567") == first


def test_a_study_keeps_the_precision_it_began_with(net, tmp_path):
    memory = tmp_path / "precision.json"
    other = Precision(prefix="bfloat16")
    memory.write_text(json.dumps({"0123": other.model_dump()}))
    assert settled(net, memory) == other
    assert settled(net, memory, study="4567") == measure(net.split, net.preprocess, CPU)
    assert settled(net, memory) == other


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"0123": {"prefix": "float8"}}'])
def test_a_damaged_memory_is_measured_anew(net, tmp_path, damaged):
    memory = tmp_path / "precision.json"
    memory.write_text(damaged)
    chosen = settled(net, memory)
    assert json.loads(memory.read_text())["0123"] == chosen.model_dump()


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_a_site_may_say_its_own(net, tmp_path, asked):
    memory = tmp_path / "precision.json"
    assert settled(net, memory, asked=asked) == Precision(prefix=asked, suffix=asked)
    assert settled(net, memory) == Precision(prefix=asked, suffix=asked)


def test_a_study_that_changes_its_precision_says_so(net, tmp_path, caplog):
    memory = tmp_path / "precision.json"
    settled(net, memory, asked="float32")
    assert "another precision" not in caplog.text
    settled(net, memory, asked="bfloat16")
    assert "another precision" in caplog.text


def test_with_nothing_frozen_only_what_trains_computes_in_half(net, tmp_path):
    whole = Split(torch.nn.Identity(), net.model, "input")
    chosen = settle("bfloat16", "0123", whole, net.preprocess, CPU, tmp_path / "precision.json")
    assert chosen == Precision(prefix="float32", suffix="bfloat16")
