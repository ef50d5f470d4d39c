"""What tests build: studies, sites, runs and sessions, small and fast.

A test names what it depends on; everything else is as small as it can be.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import one_hot

from client.app import make_app
from client.preparation import Workspace, prepare_site
from client.runtime import Runtime
from client.session import Session
from client.site import Site
from common.config.study import Study
from common.config.yaml import dump
from common.errors import StudyError
from common.metrics.counts import Counts
from common.model import backbones
from common.model.network import Network, assemble, build_model
from server.runs.run_folder import RunFolder
from simulations.sites import virtual_sites
from simulations.sites.virtual_sites import VirtualSite

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DEMO = CONFIGS / "demo.yaml"

PHANTOMS = ("east", "north", "south", "west")
"""The hospitals in the fixture `phantoms`."""

PHANTOM_CLASSES = ("clear", "nodule", "consolidation", "effusion")

RUNTIME = Runtime()
"""What the sites of this test process keep open, until `new_process`."""

client_app = make_app(RUNTIME)


# --- studies ---


def study_content(**changes: Any) -> dict[str, Any]:
    """A small study as its file holds it.

    Keys of `model`, `images` and `train` are laid over those here; the rest is as given.
    """
    content: dict[str, Any] = {
        "name": "study",
        "classes": ["a", "b", "c"],
        "model": {"backbone": "shufflenet_v2_x0_5", "weights": "none", "init": "zero"},
        "images": {"size": 32},
        "train": {"rounds": 1},
        "adapt": False,
    }
    for key, value in changes.items():
        laid_over = isinstance(value, Mapping) and key in content
        content[key] = content[key] | value if laid_over else value
    return content


def make_study(**changes: Any) -> Study:
    """A small study, with changes as in `study_content`."""
    return Study.parse(study_content(**changes), "study", StudyError)


def write_study(folder: Path, **changes: Any) -> Path:
    """The file of a small study, with changes as in `study_content`."""
    path = folder / "study.yaml"
    path.write_text(dump(study_content(**changes)))
    return path


FULL_BATCH = {
    "local_steps": 1,
    "batch_size": 65_536,
    "optimizer": "sgd",
    "momentum": 0.0,
    "lr": 64.0,
    "schedule": "cosine",
}
"""Private rounds of one step on all patients, of a head that reads features of length 1."""


def read_study(name: str, *changes: str) -> Study:
    """A study of `configs/` that starts from zero and ends with one model for all sites."""
    return Study.read(CONFIGS / f"{name}.yaml", ("model.init=zero", "adapt=false", *changes))


def write_model(folder: Path, **changes: Any) -> Path:
    """A folder as a finished run leaves it, with random weights, the head's among them."""
    study = make_study(**changes)
    model = build_model(study, "none")
    drawn = torch.Generator().manual_seed(study.seed)
    for name, tensor in model.state_dict().items():
        if name.startswith(backbones.get(study.model.backbone).head):
            tensor.copy_(torch.randn(tensor.shape, generator=drawn))
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(study.yaml())
    save_file(
        {n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors"
    )
    return folder


def make_network(**changes: Any) -> Network:
    """The network of a small study, with random weights."""
    return assemble(make_study(**changes), "none")


# --- sites ---

OPEN = {"approve": "policy", "min_images": 1, "max_holdout": 1, "max_studies": None}
"""A policy that lets few and small images take part, without a person."""


def paint_noise(number: int, label: str) -> NDArray[np.uint8]:
    """Pixels that no other image has, whatever its label is."""
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)


def write_images(
    folder: Path,
    rows: Sequence[Sequence[str]],
    paint: Callable[[int, str], NDArray[np.uint8]] = paint_noise,
) -> None:
    """Images and the manifest that lists them: each a row of file, label, patient, maybe split."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = ("image", "label", "patient", "split")
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns[: max((len(row) for row in rows), default=3)])
        for number, row in enumerate(rows):
            Image.fromarray(paint(number, row[1])).save(folder / row[0])
            table.writerow(row)


def write_site(folder: Path, **changes: object) -> Path:
    """The file of a site whose manifest and images lie beside it, unless `changes` say where.

    Its policy is open but for what `changes` say of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, object] = {
        "name": "ward",
        "data": {"format": "manifest", "root": "."},
        "state": "state",
        "device": "cpu",
        "policy": {},
    }
    path = folder / "site.yaml"
    path.write_text(dump(_opened(content | changes)))
    return path


def _opened(content: dict[str, Any]) -> dict[str, Any]:
    policy = content["policy"]
    return content | ({"policy": OPEN | policy} if isinstance(policy, dict) else {})


def make_site(folder: Path, **changes: object) -> Site:
    """A site whose file was just written, with changes as in `write_site`."""
    return Site.read(write_site(folder, **changes))


def edit_site(path: Path, **changes: object) -> Path:
    """Change a site's file, as its hospital would."""
    path.write_text(dump(_opened(yaml.safe_load(path.read_text()) | changes)))
    return path


def session_of(site: Site, study: Study) -> Session:
    """A session of its own, that shares nothing with any other."""
    return Session(prepare_site(site, study, Workspace()))


# --- runs of virtual sites ---


def find_phantoms(phantoms: Path, names: Sequence[str] = PHANTOMS) -> list[VirtualSite]:
    """Some of the hospitals in the fixture `phantoms`."""
    return [virtual_sites.find_site(phantoms / name) for name in names]


def write_sites(found: Sequence[VirtualSite], study: Study, run: Path, cache: Path) -> list[Path]:
    """The site files of virtual hospitals, written into a run folder."""
    return virtual_sites.write_sites(virtual_sites.plan_sites(found, study), study, run, cache)


def create_run(found: Sequence[VirtualSite], study: Study, run: Path, cache: Path) -> list[Path]:
    """The site files of a run that was just created."""
    RunFolder.create(run).write_study(study)
    return write_sites(found, study, run, cache)


# --- figures ---


def read_curves(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Step and figure of every curve of a run that is shown as it goes on, by its tag."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in run.read_history():
        of = f"/{line['site']}" if line["site"] else ""
        for tag, step, key in (
            ("training loss", "round", "train_loss"),
            ("validation balanced accuracy", "model_round", "balanced_accuracy"),
            ("validation AUROC", "model_round", "auroc"),
        ):
            if line[key] is not None:
                found.setdefault(tag + of, []).append((line[step], line[key]))
    return found


def draw_scores(n: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a model that is often right, and labels that take turns."""
    labels = torch.arange(n) % classes
    noise = torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))
    return 1.5 * noise + 1.5 * one_hot(labels, classes), labels


def count_scores(n: int, classes: int, seed: int) -> Counts:
    """Counts of `draw_scores`."""
    return Counts.of(*draw_scores(n, classes, seed))


# --- plots ---


def pixels_of(path: Path) -> NDArray[np.uint8]:
    """The pixels of the only file in its folder, which must be a PNG with something drawn on it."""
    assert list(path.parent.iterdir()) == [path]
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels < 128).any()
    return pixels
