"""What privacy costs, in figures and in time."""

import json

import pytest

from common.errors import StudyError
from common.support.terminal import console
from simulations.benchmarks import dp_cost
from simulations.engines.base import InProcess
from simulations.studies import privacy_utility, subgroups
from simulations.studies.runner import Source
from tests.builders import FULL_BATCH, PHANTOM_CLASSES, make_study

CONTENT = {
    "classes": PHANTOM_CLASSES,
    "model": {"unit_features": True},
    "train": {"rounds": 2, **FULL_BATCH},
    "privacy": {"mechanism": "dp_sgd", "epsilon": 8.0, "delta": 1e-5},
}


@pytest.fixture(autouse=True)
def _own_process(new_process):
    new_process()


def show(phantoms, folder, study=CONTENT, of="nodule", by=()):
    privacy_utility.compare_epsilons(
        make_study(**study),
        Source(folders=(phantoms / "north", phantoms / "south")),
        folder,
        epsilons=(None, 2.0),
        seeds=(0, 1),
        of=of,
        by=by,
        cache=folder.parent / "cache",
        engine=InProcess(),
    )


def test_a_study_at_several_epsilons_is_compared_on_the_same_holdouts(
    phantoms, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(console, "width", 200)
    show(phantoms, tmp_path / "u")
    out = capsys.readouterr().out
    assert "AUROC of nodule" in out
    assert "two read-outs" in out
    assert "ε = 2: spent by the ledger, the most of any seed: north 1." in out
    assert "Validation and test patients have an ε of their own" in out.replace("\n", " ")
    told = json.loads((tmp_path / "u" / "utility.json").read_text())
    assert set(told["figures"]) == {"no privacy", "ε = 2"}
    assert all(len(values) == 2 for values in told["figures"]["ε = 2"].values())
    assert all(1 < epsilon <= 2 for epsilon in told["spent"]["ε = 2"].values())
    assert (tmp_path / "u" / "utility.png").stat().st_size > 10_000
    ledgers = sorted((tmp_path / "u").rglob("ledger.jsonl"))
    before = [path.read_bytes() for path in ledgers]
    assert len(before) == 8
    monkeypatch.setattr(subgroups, "LEAST", 2)
    show(phantoms, tmp_path / "u", by=("age", "scanner"))  # what is there is only read
    assert [path.read_bytes() for path in ledgers] == before
    out = capsys.readouterr().out
    assert "AUROC of nodule by age" in out
    assert "age: left out, with fewer than 2 test patients: 1 (under 40)" in out
    told = json.loads((tmp_path / "u" / "utility.json").read_text())
    assert told["groups"]["age"]["patients"] == {"40 to 59": [3, 3], "60 and over": [3, 2]}
    by_scanner = told["groups"]["scanner"]["AUROC"]
    north = {epsilon: sites["north"] for epsilon, sites in told["sites"].items()}
    assert {epsilon: found["aurora 3"] for epsilon, found in by_scanner.items()} == north


def test_a_group_is_said_to_lose_more_only_beyond_the_interval_of_pairs_by_seed():
    figures_of = {
        None: {
            "old": [0.9, 0.7, 0.8, 0.8, 0.8],
            "young": [0.8, 0.6, 0.9, 0.9, 0.9],
            "few": [None, 0.5, 0.5, 0.5, 0.5],
        },
        8.0: {
            "old": [0.7, 0.49, 0.61, 0.6, 0.6],
            "young": [0.7, 0.51, 0.79, 0.8, 0.8],
            "few": [0.1, None, 0.5, 0.5, 0.5],
        },
    }
    (line,) = privacy_utility._compare_losses(figures_of)
    assert line == "ε = 8: old loses 0.100 (0.082 to 0.118) more than young"
    three = {e: {name: x[:3] for name, x in by.items()} for e, by in figures_of.items()}
    assert not list(privacy_utility._compare_losses(three))  # too few seeds to say
    assert not list(privacy_utility._compare_losses({8.0: figures_of[8.0]}))
    alike = {None: figures_of[None], 8.0: {**figures_of[8.0], "old": [0.7, 0.69, 0.71, 0.7, 0.7]}}
    assert not list(privacy_utility._compare_losses(alike))


def test_what_cannot_be_compared_is_refused_before_anything_runs(phantoms, tmp_path):
    with pytest.raises(StudyError, match="--class: expected one of clear, nodule"):
        show(phantoms, tmp_path / "u", of="melanoma")
    with pytest.raises(StudyError, match=r"--by: .* got 'sex'\. Known: age, scanner"):
        show(phantoms, tmp_path / "u", by=("age", "sex"))
    open_study = CONTENT | {"privacy": {"mechanism": "none"}}
    with pytest.raises(StudyError, match="privacy: expected a mechanism, got none"):
        show(phantoms, tmp_path / "u", open_study)
    assert not (tmp_path / "u").exists()


def test_the_time_of_privacy_is_a_ratio_of_one_run(capsys):
    dp_cost.show_cost("shufflenet_v2_x0_5", ("head",))
    out = capsys.readouterr().out
    assert "without privacy" in out
    assert "check, each round" in out
