"""Four made-up hospitals with synthetic chest films, to try everything without a patient."""

import csv
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import RunError
from common.support.seeds import derive
from simulations.sites.anatomy import (
    BODY,
    LESION,
    POSE,
    Array,
    Chest,
    Finding,
    Scanner,
    Traits,
    edge,
    pick,
    sign,
    spot,
    traits,
)

EDITION = 1
"""Raised whenever the films change, so that older folders are not taken for these."""

RECIPE = "phantom.json"
"""The file beside each manifest that says from which numbers it was drawn."""

MOST_IMAGES = 9
"""Images of one patient: 1 to this many."""


def clear(chest: Chest, lesion: Traits) -> Array:
    """A chest without a finding."""
    return np.zeros_like(chest.u)


def nodule(chest: Chest, lesion: Traits) -> Array:
    """One small round dense spot inside a lung."""
    a, b, mask = chest.lung(sign(lesion["side"]))
    across = (a + 0.3 - 0.9 * lesion["x"]) * chest.body["width"]
    down = (b + 0.6 - 1.0 * lesion["y"]) * chest.body["height"]
    radius = 0.11 + 0.07 * lesion["size"]
    return (0.32 + 0.20 * lesion["weight"]) * edge(1 - np.hypot(across, down) / radius, 0.3) * mask


def consolidation(chest: Chest, lesion: Traits) -> Array:
    """A patchy, ill-defined cloud filling part of a lung."""
    a, b, mask = chest.lung(sign(lesion["side"]))
    across, down = a + 0.3 - 0.6 * lesion["x"], b + 0.5 - 0.9 * lesion["y"]
    cloud = spot(across, down * (0.8 + 0.8 * lesion["form"]), 0.55 + 0.35 * lesion["size"])
    patches: Array = np.maximum(0.9 + 0.4 * chest.texture, 0)
    return (0.24 + 0.20 * lesion["weight"]) * cloud * patches * mask


def effusion(chest: Chest, lesion: Traits) -> Array:
    """Fluid over the diaphragm that climbs the chest wall and hides the costophrenic angle."""
    a, b, mask = chest.lung(sign(lesion["side"]))
    level = chest.body["dome"] - 0.18 - 0.4 * lesion["size"]
    meniscus = level - 0.45 * np.clip(a + 0.2, 0, None) ** 2
    return (0.26 + 0.20 * lesion["weight"]) * edge(b - meniscus, 0.08) * mask


FINDINGS: Mapping[str, Finding] = {
    finding.__name__: finding for finding in (clear, nodule, consolidation, effusion)
}
CLASSES = tuple(FINDINGS)


@dataclass(frozen=True)
class PhantomHospital:
    """One made-up hospital: its size, its scanner, and what its patients tend to have."""

    name: str
    share: float
    """The share of all patients."""
    mix: tuple[float, ...]
    """Share of each class among its patients."""
    scanner: Scanner
    model: str


HOSPITALS = (
    PhantomHospital("north", 0.36, (0.40, 0.30, 0.26, 0.04), Scanner(0.5, 0.020), "Aurora 3"),
    PhantomHospital(
        "south", 0.28, (0.35, 0.04, 0.31, 0.30), Scanner(0.8, 0.025, 0.85, 0.05), "Meridian XR"
    ),
    PhantomHospital(
        "east", 0.20, (0.34, 0.31, 0.04, 0.31), Scanner(0.9, 0.020, 1.1, -0.03, 0.8), "Levant 64"
    ),
    PhantomHospital(
        "west", 0.16, (0.07, 0.31, 0.31, 0.31), Scanner(0.6, 0.030, 0.95, 0.0, 1.25), "Zephyr"
    ),
)


def write_phantoms(folder: Path, *, seed: int = 0, patients: int = 400) -> None:
    """Write each hospital's images and `manifest.csv` into a folder of its name under `folder`.

    The same seed and number give the same files. A hospital already there is left alone; one whose
    writing was interrupted is written anew.

    Args:
      folder: where the hospitals go; made if missing.
      seed: chooses the patients.
      patients: of all hospitals together, at least 40.

    Raises:
      RunError: `folder` holds phantoms of another seed, size or edition.
    """
    if patients < 40:
        raise RunError("phantoms", expected="at least 40 patients", got=patients)
    recipe = {"seed": seed, "patients": patients, "edition": EDITION}
    for hospital in HOSPITALS:
        done = folder / hospital.name
        if done.exists():
            _check(done, recipe)
            continue
        part = folder / f".{hospital.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        (part / "images").mkdir(parents=True)
        _fill(part, hospital, round(patients * hospital.share), seed)
        (part / RECIPE).write_text(json.dumps(recipe) + "\n", encoding="utf-8")
        part.rename(done)


def _check(done: Path, recipe: Mapping[str, int]) -> None:
    try:
        found = json.loads((done / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = "none"
    if found != recipe:
        remedy = "Remove the folder or name another one."
        raise RunError(done, expected=f"phantoms {recipe}", got=found, remedy=remedy)


def _fill(folder: Path, hospital: PhantomHospital, patients: int, seed: int) -> None:
    """Draw one hospital's patients into `folder`."""
    rng = np.random.default_rng(derive(seed, "phantom", hospital.name))
    labels = rng.permutation(_quota(hospital.mix, patients))
    ages = np.clip(rng.normal(58, 16, patients), 18, 95).astype(int)
    owner = np.repeat(np.arange(patients), _images_each(rng, patients))
    films = _films(rng, hospital.scanner, labels, owner)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("image", "label", "patient", "scanner", "age"))
        for i, (patient, film) in enumerate(zip(owner, films, strict=True)):
            name = f"images/{i:04d}.png"
            Image.fromarray(film).save(folder / name)
            label = CLASSES[labels[patient]]
            table.writerow((name, label, f"p{patient:03d}", hospital.model, ages[patient]))


def _quota(mix: tuple[float, ...], patients: int) -> NDArray[np.int64]:
    """Labels in the proportions of `mix`, as exactly as whole patients allow."""
    ends = np.round(np.cumsum(mix) / sum(mix) * patients).astype(int)
    return np.repeat(np.arange(len(mix)), np.diff(ends, prepend=0))


def _images_each(rng: np.random.Generator, patients: int) -> NDArray[np.int64]:
    """Most patients have a few images, some have many: about three on average."""
    return np.minimum(rng.geometric(0.33, patients), MOST_IMAGES)


def _films(
    rng: np.random.Generator,
    scanner: Scanner,
    labels: NDArray[np.int64],
    owner: NDArray[np.int64],
) -> NDArray[np.uint8]:
    """The image of each owner, an index into the patients whose `labels` are given."""
    n = len(owner)
    body, lesion = (traits(rng, len(labels), ranges) for ranges in (BODY, LESION))
    chest = Chest.posed(pick(body, owner), traits(rng, n, POSE))
    shift = traits(rng, n, dict.fromkeys(("x", "y"), (-0.08, 0.08)))
    seen = dict(pick(lesion, owner))
    seen |= {name: np.clip(seen[name] + shift[name], 0, 1) for name in shift}
    film = chest.attenuation()
    for label, finding in enumerate(FINDINGS.values()):
        rows = np.flatnonzero(labels[owner] == label)
        film[rows] += finding(chest.only(rows), pick(seen, rows))
    return scanner.film(film, rng)
