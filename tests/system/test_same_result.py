"""However a site computes, cached or not: a study of real films ends with the same accuracy."""

import json
import sys
from pathlib import Path

import pytest

from common.config.yaml import dump
from simulations.cli.main import main
from tests.builders import CONFIGS

pytestmark = pytest.mark.numbers

PLAIN = ({"keep": "images"}, "float32")
FAST = ({"keep": "activations"}, "bfloat16")


def accuracy(shared: Path, folder: Path, way: dict[str, str], precision: str) -> list[float]:
    """Test accuracy of configs/chest.yaml as one hospital, cut short, for three seeds."""
    folder.mkdir()
    data = {"format": "npz", "root": str(shared / "data/pneumoniamnist/pneumoniamnist.npz")}
    site = {"name": "ward", "data": data, "state": "state", "device": "cpu", **way}
    (folder / "site.yaml").write_text(dump(site))
    arguments = ["consilium-simulate", "run", str(CONFIGS / "chest.yaml")]
    arguments += ["--site", str(folder), "--out", str(folder / "run"), "--seeds", "0,1,2"]
    arguments += ["--cache", str(folder / "cache"), "--set", "aggregate.quorum=1"]
    weights = shared / "weights/mobilenet_v2.pth"
    arguments += ["--set", "train.rounds=5", "--set", f"model.weights={weights}"]
    # Deep layers would take minutes more and make much of little: a rounding grows with every step.
    arguments += ["--set", "model.unfreeze=head", "--set", f"model.precision={precision}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    summary = json.loads((folder / "run/summary.json").read_text())
    figures: list[float] = summary["overall"]["federated"]["accuracy"]
    return figures


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fast_ways_reach_the_plain_ways_accuracy(shared: Path, tmp_path: Path) -> None:
    plain = accuracy(shared, tmp_path / "plain", *PLAIN)
    fast = accuracy(shared, tmp_path / "fast", *FAST)
    for seed in range(3):
        assert fast[seed] == pytest.approx(plain[seed], abs=0.02)
