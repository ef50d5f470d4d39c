"""The main job on four real hospitals: minutes, so behind the slow marker."""

import json
import sys
from pathlib import Path

import pytest

from simulations.cli.main import main
from tests.builders import CONFIGS

pytestmark = pytest.mark.numbers

SITES = ("rosendahl", "vidir_modern", "vidir_molemax", "vienna_dias")


def run(shared: Path, out: Path, seeds: str, *options: str) -> dict[str, dict[str, list[float]]]:
    """Overall test figures of configs/skin.yaml: way of training → metric → one value per seed."""
    arguments = ["consilium-simulate", "run", str(CONFIGS / "skin.yaml")]
    arguments += [x for name in SITES for x in ("--site", str(shared / "data/skin_sites" / name))]
    arguments += ["--set", f"model.weights={shared / 'weights/squeezenet1_0.pth'}"]
    arguments += ["--out", str(out), "--cache", str(out.parent / "cache"), "--seeds", seeds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*arguments, *options])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    overall: dict[str, dict[str, list[float]]] = json.loads((out / "summary.json").read_text())[
        "overall"
    ]
    return overall


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_federating_real_sites_comes_near_pooling_and_far_above_chance_features(
    shared: Path, tmp_path: Path
) -> None:
    # Ten holdouts: a site's rare findings are so few that three of them swing by .05.
    figures = run(shared, tmp_path / "run", "0,1,2,3,4,5,6,7,8,9", "--compare")
    mean = {way: sum(x["balanced_accuracy"]) / 10 for way, x in figures.items()}
    assert mean["federated"] >= 0.85 * mean["pooled"]
    # The same network with random weights, at the learning rate that suits it best.
    adam = ("--set", "train.optimizer=adamw", "--set", "train.lr=1.0")
    control = run(shared, tmp_path / "control", "0", "--set", "model.weights=none", *adam)
    assert mean["federated"] >= control["federated"]["balanced_accuracy"][0] + 0.1
