"""A study gives the same bytes, whatever the clock, the cores, the workers and the cache are at."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.builders import PHANTOMS, ROOT

pytestmark = pytest.mark.numbers

Usual = Callable[[str], dict[str, str]]

SAME = ("last.safetensors", "model.safetensors", "metrics.jsonl", "report.json")
STUDIES = {
    # A large head, and a prefix whose small batches are computed in another way.
    "head": ("efficientnet_b0", "head"),
    # Trained convolutions, whose gradients are sums over images and pixels.
    "deep": ("squeezenet1_1", "last:1"),
}

# Runs in a process of its own: how many threads a library has is settled when it starts.
CHILD = '''
import hashlib, json, sys, threading, time
from pathlib import Path

import numpy as np
import torch

from client.features import extract
from client.features.extract import FeatureSpec
from client.site import Site
from client.features.store import Stores
from common.model.network import assemble
from common.config.study import Augment, Study
from server.runs.run_folder import RunFolder
from simulations.sites import virtual_sites
from simulations.studies import baselines
from simulations.engines.base import InProcess
from simulations.engines.workers import Workers


class Leaping:
    """A clock by which every look is a minute after the last."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 60.0
        return self.now


def busy():
    while True:
        np.sort(np.random.default_rng(0).random(300_000))


def main(folder, places, backbone, unfreeze, how, same):
    if how["leaping"]:
        extract.time = Leaping()
        threading.Thread(target=busy, daemon=True).start()
    torch.set_num_threads(how["threads"])
    model = {"backbone": backbone, "weights": "none", "unfreeze": unfreeze}
    study = Study(
        name="same",
        classes=("clear", "nodule", "consolidation", "effusion"),
        model=model,
        images={"size": 64, "augment": {"views": 2, "ops": ["flip", "rotate"]}},
        train={"rounds": 2, "batch_size": 12},
        aggregate={"quorum": 3},
    )
    run = RunFolder.create(folder)
    run.write_study(study)
    found = [virtual_sites.find_site(place) for place in places]
    planned = virtual_sites.plan_sites(found, study)
    site_files = virtual_sites.write_sites(planned, study, folder, folder / "cache")
    if how["half"]:
        half_fill(study, site_files)
    engine = Workers(how["workers"]) if how["workers"] else InProcess()
    engine.prepare(site_files, study)
    engine.run(site_files, folder)
    if how["workers"]:
        engine.close()
    told = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in same}
    comparison = baselines.train_baselines(study, site_files, engine.runtime)
    told["compared"] = json.dumps(comparison.facts([("pooled", "local")]))
    for way, sites in comparison.results.items():
        told |= {f"{way} {site}": str(counts.sparse()) for site, counts in sites.items()}
    print(json.dumps(told))


def half_fill(study, site_files):
    """Every third image of each hospital, the last first, and no more views than itself."""
    spec, whole = FeatureSpec.of(assemble(study, "none"), "float32"), Augment()
    for site in map(Site.read, site_files):
        images = [record.image for record in site.data.records(study.classes)][::-3]
        options = {"spec": spec, "augment": whole, "stores": Stores()}
        extract.prepare_images(images, **options, cache=site.cache_folder, skip_unreadable=False)


if __name__ == "__main__":
    folder, *places = map(Path, sys.argv[1:6])
    main(folder, places, *sys.argv[6:8], json.loads(sys.argv[8]), json.loads(sys.argv[9]))
'''
USUAL = {"threads": 1, "workers": 0, "leaping": False, "half": False}


def told(folder: Path, phantoms: Path, study: str, **how: int) -> dict[str, str]:
    """Digests of what a run leaves, and figures of local and pooled training."""
    (folder / "child.py").write_text(CHILD)
    places = [phantoms / name for name in PHANTOMS]
    options = [*STUDIES[study], json.dumps(USUAL | how), json.dumps(SAME)]
    arguments = [sys.executable, folder / "child.py", folder / "run", *places, *options]
    ended = subprocess.run(
        list(map(str, arguments)),
        env={"PYTHONPATH": str(ROOT)} | os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not ended.returncode, ended.stderr
    found: dict[str, str] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def usual(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Usual:
    """Of a study, in one process, on one thread, from an empty cache."""
    return cache(lambda name: told(tmp_path_factory.mktemp(name), phantoms, name))


@pytest.mark.parametrize(
    ("study", "how"),
    [
        ("deep", {"threads": 2, "leaping": True}),
        ("deep", {"workers": 1}),
        ("deep", {"workers": 2, "half": True}),
        pytest.param("head", {"threads": 2, "half": True}, marks=pytest.mark.slow),
        pytest.param("head", {"threads": 3, "leaping": True}, marks=pytest.mark.slow),
        pytest.param("deep", {"threads": 3, "half": True}, marks=pytest.mark.slow),
        pytest.param("deep", {"workers": 3, "leaping": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_does_not_matter(
    study: str,
    how: dict[str, int],
    usual: Usual,
    phantoms: Path,
    tmp_path: Path,
) -> None:
    assert told(tmp_path, phantoms, study, **how) == usual(study)
