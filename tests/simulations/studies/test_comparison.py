"""Ways of training on the same patients: paired at each site, and tried at the other sites."""

import json
import re

import numpy as np

from server.runs.results import FEDERATED, read_cross, read_evidence, read_results
from simulations.engines.base import InProcess
from simulations.studies import runner
from simulations.studies.gains import PAIRS
from tests.builders import RUNTIME
from tests.server.rounds.test_own_models import TELLS, policies, run, study


def test_a_comparison_tells_what_is_paired_where_counts_are_exact(tmp_path, phantoms, capsys):
    rounds = {"rounds": 1, "local_steps": 1, "batch_size": 8}
    asked = study(
        model={"head": "linear", "init": "solved"},
        train=rounds,
        holdout={"validation": 0.1, "test": 0.5},
    )
    rounding = {"disclose": TELLS | {"counts": "rounded", "metrics": "final"}}
    folder, _ = run(tmp_path / "run", phantoms, asked, policy=policies(TELLS) | {"south": rounding})
    RUNTIME.close()
    runner.resume_run(folder.path, None, InProcess(), compare=True)
    results, facts = read_results(folder.path, 4)
    evidence, cross = read_evidence(facts), read_cross(facts, 4)
    assert set(evidence) == {"east", "north"}  # west has two test patients
    ways = {"local", "fedavg", "solved", FEDERATED, "adapted", "pooled"}
    for site, found in evidence.items():
        assert set(found.figures) == ways == set(results)
        assert [(pair.first, pair.second) for pair in found.pairs] == list(PAIRS)
        for pair in found.pairs:
            first, second = results[pair.first][site], results[pair.second][site]
            assert pair.joint.both + pair.joint.only_first == np.trace(first.confusion)
            assert pair.joint.both + pair.joint.only_second == np.trace(second.confusion)
    assert re.search(
        r"north: .*the adapted model .*alone: balanced accuracy", capsys.readouterr().out
    )
    assert set(cross) == {"east", "north", "south", "west"}
    for site, tested in cross.items():
        assert (tested[site].confusion == results["local"][site].confusion).all()
        assert tested["south"].noise > 0
        assert tested["north"].noise == 0
    # Shown again, nothing is lost.
    before = json.loads((folder.path / "report.json").read_text())
    runner.resume_run(folder.path, None, InProcess(), compare=True)
    assert json.loads((folder.path / "report.json").read_text()) == before
