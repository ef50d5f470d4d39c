"""Every registered backbone trains a round at every depth, through both apps."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from client.data.manifest import Manifest
from common.model import backbones
from common.model.network import assemble
from server.app import app as server_app
from server.runs.run_folder import RunFolder
from simulations.engines.grid import simulate_run
from simulations.sites import virtual_sites
from tests.builders import client_app, create_run, read_study

pytestmark = pytest.mark.numbers

SIZES = {"inception_v3": 80, "vit_b_16": 224}
QUICK = ("mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1")


@pytest.mark.parametrize("unfreeze", ["head", "last:1", "all"])
@pytest.mark.parametrize(
    "backbone",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in backbones.names()
    ],
)
def test_it_trains_a_round(
    backbone: str,
    unfreeze: str,
    tmp_path: Path,
    phantoms: Path,
    new_process: Callable[[], None],  # else the networks of all tests stay in memory
) -> None:
    changes = {
        "model.backbone": backbone,
        "model.weights": "none",
        "model.unfreeze": unfreeze,
        "images.size": SIZES.get(backbone, 64),
        "train.rounds": 1,
        "train.local_epochs": "",
        "train.local_steps": 1,
        "train.batch_size": 4,
        "aggregate.quorum": 2,
    }
    study = read_study("demo", *(f"{key}={value}" for key, value in changes.items()))
    few = tuple(f"p{i:03d}" for i in range(6))
    two = [
        virtual_sites.VirtualSite(name=name, data=Manifest(root=phantoms / name), patients=few)
        for name in ("north", "south")
    ]
    folder = tmp_path / "run"
    simulate_run(server_app, client_app, create_run(two, study, folder, tmp_path / "c"), folder)

    history = RunFolder(folder).read_history()
    assert {line["site"] for line in history if line["round"] == 1} == {"north", "south", None}
    network = assemble(study, "none")
    last = load_file(folder / "last.safetensors")
    moved = [name for name in network.initial if not last[name].equal(network.initial[name])]
    # The head starts at zero, so that nothing before it has a gradient in the very first step.
    head = [name for name in network.initial if name.startswith(backbones.get(backbone).head)]
    assert set(moved) >= set(head)
    assert (unfreeze == "head") == (len(network.initial) == len(head))
