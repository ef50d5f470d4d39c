"""Hospitals that attack do so, and the table tells which strategies hold."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from common.errors import RunError, StudyError
from common.model.network import assemble
from common.support.terminal import console
from server.runs.run_folder import RunFolder
from simulations.engines.attacks import Attacked, Attacks
from simulations.engines.base import InProcess
from simulations.sites import virtual_sites
from simulations.studies import robustness, runner
from simulations.studies.runner import Source
from tests.builders import RUNTIME, create_run, read_study

pytestmark = pytest.mark.numbers


@pytest.fixture(autouse=True)
def _own_process(new_process):
    new_process()


poisoned = partial(read_study, "poisoned", "train.rounds=4", "train.local_epochs=1")


def run(engine, phantoms, folder, *changes, sites=1):
    study = poisoned("train.rounds=1", f"aggregate.quorum={sites}", *changes)
    found = virtual_sites.cut_pool(phantoms / "north", study, spec="iid", sites=sites)
    files = create_run(found, study, folder, phantoms / "cache")
    engine.prepare(files, study)
    engine.run(files, folder)
    engine.forget()
    return RunFolder(folder)


def test_a_scaled_update_is_what_training_changed_times_the_factor(phantoms, tmp_path):
    honest = run(InProcess(), phantoms, tmp_path / "honest").read_last().tensors
    scaled = run(Attacked(Attacks(scales=frozenset({"site-1"}))), phantoms, tmp_path / "lies")
    none = run(Attacked(Attacks()), phantoms, tmp_path / "none").read_last().tensors
    start = start_of(poisoned("aggregate.quorum=1"))
    for name, tensor in scaled.read_last().tensors.items():
        assert torch.equal(none[name], honest[name])
        expected = start[name] - 10 * (honest[name] - start[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)


def start_of(study):
    return dict(assemble(study, study.model.weights).initial)


def test_a_mislabelling_hospital_teaches_the_next_class_for_each(phantoms, tmp_path):
    engine = Attacked(Attacks(mislabels=frozenset({"site-1"})))
    attacks = run(engine, phantoms, tmp_path / "lies", "train.local_epochs=20")
    # Its validation is honest, so the last model is not the one that is released.
    session = RUNTIME.open_session(attacks.path / "sites/site-1/site.yaml", attacks.study.id)
    table = session.evaluate(attacks.read_last().tensors, "train").confusion
    right, next_ = (np.roll(table, -by, axis=1).trace() for by in (0, 1))
    assert next_ > 3 * right


def show(
    phantoms,
    folder,
    *changes,
    strategies=("fedavg", "fedmedian"),
    scales=("site-2",),
    factor=-10.0,
    pool="north",
):
    robustness.compare_strategies(
        poisoned("aggregate.quorum=5", *changes),
        Source(pool=phantoms / pool, sites=5),
        folder,
        attacks=Attacks(scales=frozenset(scales), factor=factor),
        strategies=strategies,
        seeds=(0,),
        cache=phantoms / "cache",
    )


def test_the_median_holds_where_the_mean_does_not(phantoms, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 200)
    show(phantoms, tmp_path / "p")
    # The last models, as a checkpoint that was chosen may be one from before the attacks.
    assert moved(tmp_path / "p/fedavg") > 1.5 > moved(tmp_path / "p/fedmedian")
    found = json.loads((tmp_path / "p/poison.json").read_text())["found"]
    assert {way: len(values) for way, values in found["fedmedian"].items()} == {
        "no lies": 1,
        "scaled update": 1,
    }
    assert (tmp_path / "p/poison.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "fedmedian, scaled update, seed 0" in out
    models = list((tmp_path / "p").rglob("last.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in models}
    show(phantoms, tmp_path / "p")
    assert {path: path.stat().st_mtime_ns for path in models} == before
    assert len(models) == 4
    for other in ({"factor": 2.0}, {"scales": ("site-3",)}, {"pool": "south"}):
        with pytest.raises(RunError, match=r"expected .*, got .*Choose another folder"):
            show(phantoms, tmp_path / "p", **other)
    attacked = tmp_path / "p/fedavg/scaled-update/seed-0"
    with pytest.raises(RunError, match="expected a run whose hospitals are honest"):
        runner.resume_run(attacked, None, InProcess(), compare=False)


def moved(folder):
    """How far the last model went from the start with attacks, by how far it went without."""

    def distance(run):
        start, last = start_of(poisoned()), RunFolder(run).read_last().tensors
        return sum(((last[n] - start[n]) ** 2).sum().item() for n in last) ** 0.5

    return distance(folder / "scaled-update/seed-0") / distance(folder / "no-lies/seed-0")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"strategies": ("fedavg", "crum")}, "--strategies: .*Did you mean 'krum'"),
        ({"scales": ("site-9",)}, "--mislabels, --scales: expected hospitals that train, .*site-5"),
        ({"scales": tuple(f"site-{i}" for i in range(1, 6))}, "quorum: expected at least 11"),
        ({"strategies": ("fedavg", "multikrum"), "changes": ("aggregate.quorum=4",)}, "at least 5"),
        ({"changes": ("aggregate.quorum=2",)}, "quorum: expected at least 3: more honest replies"),
    ],
)
def test_a_mistake_is_told_before_the_first_run(phantoms, tmp_path, wrong, text):
    changes = wrong.pop("changes", ())
    with pytest.raises(StudyError, match=text):
        show(phantoms, tmp_path / "p", *changes, **wrong)
    assert not (tmp_path / "p").exists()
