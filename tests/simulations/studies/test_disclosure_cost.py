"""What rounding and noise cost a run's figures, told again from its exact counts."""

import pytest
import torch

from common.errors import RunError
from common.metrics.counts import Counts
from server.app import app as server_app
from simulations.engines.grid import simulate_run
from simulations.studies.disclosure_cost import measure_costs, read_exact_counts
from tests.builders import (
    PHANTOM_CLASSES,
    client_app,
    create_run,
    edit_site,
    find_phantoms,
    make_study,
)


def test_more_noise_costs_more_and_shows_in_wider_intervals():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 3
    logits = torch.nn.functional.one_hot(labels, 3) + torch.randn(200, 3, generator=generator)
    sites = {name: Counts.of(logits, labels) for name in ("a", "b")}
    exact, rounded, loose, tight = measure_costs(
        [sites], "balanced_accuracy", [8.0, 1.0], 1e-5, draws=30
    )
    assert exact.error == 0
    assert rounded.error > 0
    assert 0 < loose.error < tight.error
    assert exact.width < loose.width < tight.width
    assert abs(loose.figure - exact.figure) < 0.02


def finish(folder, phantoms, disclose):
    study = make_study(
        classes=PHANTOM_CLASSES, model={"backbone": "squeezenet1_0"}, train={"rounds": 1}
    )
    site_files = create_run(find_phantoms(phantoms), study, folder, phantoms / "cache")
    for path in site_files:
        edit_site(path, policy={"delta": 1e-5, "disclose": disclose})
    simulate_run(server_app, client_app, site_files, folder)
    return folder


def test_a_run_that_told_less_cannot_be_told_again(tmp_path, phantoms):
    run = finish(tmp_path / "noised", phantoms, {"epsilon": 4.0})
    with pytest.raises(RunError, match="exact counts of every site, got coarse ones of east"):
        read_exact_counts(run)
    run = finish(tmp_path / "exact", phantoms, {"counts": "exact"})
    assert set(read_exact_counts(run)) == {"east", "north", "south", "west"}
