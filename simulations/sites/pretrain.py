"""Pretrain the demo's small backbone on phantoms whose findings the demo never asks about.

`python -m simulations.sites.pretrain` draws chests that carry rings, dots, tubes and other shapes,
each film from a scanner of its own, and teaches torchvision's `shufflenet_v2_x0_5` which of them it
sees. The demo's findings are none of these: what helps there is transfer, as in real pretraining.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.logging import RichHandler
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import shufflenet_v2_x0_5

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
    sign,
    traits,
)

ARCHITECTURE = "shufflenet_v2_x0_5"
WEIGHTS = Path(__file__).with_name("phantom_backbone.safetensors")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCANNERS = {
    "blur": (0.3, 1.1),
    "noise": (0.01, 0.07),
    "contrast": (0.7, 1.3),
    "brightness": (-0.1, 0.1),
    "gamma": (0.65, 1.5),
}
PREVALENCE = 0.2
"""Chance of each finding in each image, independently."""

log = logging.getLogger(__name__)


def _local(chest: Chest, lesion: Traits) -> tuple[Array, Array, Array]:
    """Coordinates around a spot anywhere on the chest, turned at random, and the strength there."""
    turn = 2 * np.pi * lesion["turn"]
    x, y = chest.u - 1.2 * (lesion["x"] - 0.5), chest.v - 1.3 * (lesion["y"] - 0.55)
    cos, sin = np.cos(turn), np.sin(turn)
    strength = -sign(lesion["side"], 0.85) * (0.25 + 0.3 * lesion["weight"])  # a few are dark
    return cos * x + sin * y, cos * y - sin * x, strength


def ring(chest: Chest, lesion: Traits) -> Array:
    """A thin circle."""
    x, y, strength = _local(chest, lesion)
    radius = 0.13 + 0.22 * lesion["size"]
    return strength * edge(0.035 - np.abs(np.hypot(x, y) - radius), 0.03)


def dots(chest: Chest, lesion: Traits) -> Array:
    """A cluster of point-like calcifications."""
    x, y, strength = _local(chest, lesion)
    reach, pitch = 0.18 + 0.2 * lesion["size"], 14 + 6 * lesion["form"]
    grid: Array = np.maximum(np.cos(pitch * x + 2 * y), 0) * np.maximum(
        np.cos(pitch * y - 3 * x), 0
    )
    return 1.6 * strength * grid**3 * edge(reach - np.hypot(x, y), 0.05)


def tube(chest: Chest, lesion: Traits) -> Array:
    """A long curved line, such as a catheter."""
    x, y, strength = _local(chest, lesion)
    path = y - (lesion["form"] - 0.5) * 1.6 * x * x
    return (
        strength
        * edge(0.03 - np.abs(path), 0.025)
        * edge(0.3 + 0.6 * lesion["size"] - np.abs(x), 0.05)
    )


def stripes(chest: Chest, lesion: Traits) -> Array:
    """A patch of parallel lines."""
    x, y, strength = _local(chest, lesion)
    lines = np.cos((16 + 12 * lesion["form"]) * y)
    return 0.6 * strength * lines * edge(0.2 + 0.25 * lesion["size"] - np.hypot(x, y), 0.08)


def wedge(chest: Chest, lesion: Traits) -> Array:
    """A sharp triangle."""
    x, y, strength = _local(chest, lesion)
    inside = np.minimum(
        0.35 + 0.3 * lesion["size"] - x, x * (0.35 + 0.4 * lesion["form"]) - np.abs(y)
    )
    return strength * edge(inside, 0.04)


def crescent(chest: Chest, lesion: Traits) -> Array:
    """A disc with a bite taken out of it."""
    x, y, strength = _local(chest, lesion)
    radius = 0.18 + 0.2 * lesion["size"]
    disc, bite = radius - np.hypot(x, y), np.hypot(x - 0.5 * radius, y) - radius
    return strength * edge(np.minimum(disc, bite), 0.04)


def block(chest: Chest, lesion: Traits) -> Array:
    """A rectangle, such as a pacemaker."""
    x, y, strength = _local(chest, lesion)
    half = 0.10 + 0.15 * lesion["size"]
    inside = np.minimum(half - np.abs(x), half * (0.5 + 0.5 * lesion["form"]) - np.abs(y))
    return strength * edge(inside, 0.03)


def cross(chest: Chest, lesion: Traits) -> Array:
    """Two short bars that cross."""
    x, y, strength = _local(chest, lesion)
    bars = np.minimum(np.abs(x), np.abs(y))
    return (
        strength
        * edge(0.035 - bars, 0.03)
        * edge(0.14 + 0.2 * lesion["size"] - np.hypot(x, y), 0.05)
    )


def mesh(chest: Chest, lesion: Traits) -> Array:
    """Fine netting over most of one lung."""
    x, y, strength = _local(chest, lesion)
    net = np.abs(np.cos(22 * x)) * np.abs(np.cos(22 * y))
    return 1.1 * strength * (0.6 - net) * chest.lung(sign(lesion["form"]))[2]


def cap(chest: Chest, lesion: Traits) -> Array:
    """A sharp-edged density over the apex of a lung."""
    a, b, mask = chest.lung(sign(lesion["side"]))
    inside = 0.6 * lesion["size"] - 0.7 - b + (lesion["form"] - 0.5) * a
    return (0.15 + 0.25 * lesion["weight"]) * edge(inside, 0.08) * mask


def plate(chest: Chest, lesion: Traits) -> Array:
    """A level band across one lung."""
    a, b, mask = chest.lung(sign(lesion["side"]))
    middle = b + 0.5 - 0.9 * lesion["y"] + (lesion["turn"] - 0.5) * 0.6 * a
    return (0.15 + 0.25 * lesion["weight"]) * edge(0.09 - np.abs(middle), 0.06) * mask


def bulla(chest: Chest, lesion: Traits) -> Array:
    """A round hole, darker than what it lies in."""
    x, y, strength = _local(chest, lesion)
    return -np.abs(strength) * edge(0.10 + 0.15 * lesion["size"] - np.hypot(x, y), 0.04)


FINDINGS: Mapping[str, Finding] = {
    finding.__name__: finding
    for finding in (
        ring,
        dots,
        tube,
        stripes,
        wedge,
        crescent,
        block,
        cross,
        mesh,
        cap,
        plate,
        bulla,
    )
}


def films(n: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Films of n patients on n scanners, and which FINDINGS each shows, bool [n, findings]."""
    rng = np.random.default_rng(seed)
    chest = Chest.posed(traits(rng, n, BODY), traits(rng, n, POSE))
    shows = rng.random((n, len(FINDINGS))) < PREVALENCE
    film = chest.attenuation()
    for column, finding in zip(shows.T, FINDINGS.values(), strict=True):
        rows = np.flatnonzero(column)
        film[rows] += finding(chest.only(rows), traits(rng, len(rows), LESION))
    return Scanner(**traits(rng, n, SCANNERS)).film(film, rng), shows


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """Grey films [n, h, w] as the backbone's normalised input, float32 [n, 3, h, w]."""
    grey = torch.from_numpy(images).float().div(255)[:, None]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (grey - mean) / std


def _draw(n: int, *purpose: str | int) -> tuple[Tensor, Tensor]:
    """Draw n films in chunks, as uint8 [n, h, w] and float32 [n, findings] tensors."""
    chunks = [films(250, derive(*purpose, i)) for i in track(range(n // 250), "drawing")]
    images, shows = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return torch.from_numpy(images), torch.from_numpy(shows).float()


def train(images: Tensor, shows: Tensor, *, seed: int, epochs: int, batch: int = 64) -> nn.Module:
    """A backbone trained from random weights with AdamW under a one-cycle rate."""
    torch.manual_seed(derive(seed, "weights") % 2**32)
    model: nn.Module = shufflenet_v2_x0_5(num_classes=len(FINDINGS)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.15
    )
    order = torch.Generator().manual_seed(derive(seed, "order"))
    for epoch in range(epochs):
        shuffled = torch.randperm(len(images), generator=order)[: len(images) // batch * batch]
        total = 0.0
        for rows in track(torch.split(shuffled, batch), f"epoch {epoch + 1}/{epochs}"):
            inputs = pixels(images[rows].numpy())
            if torch.rand((), generator=order) < 0.5:
                inputs = inputs.flip(-1)
            loss = nn.functional.binary_cross_entropy_with_logits(model(inputs), shows[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        log.info("epoch %d: loss %.3f", epoch + 1, total * batch / len(shuffled))
    return model.eval()


@torch.inference_mode()
def balanced(model: nn.Module, images: Tensor, shows: Tensor) -> float:
    """Mean over findings of (sensitivity + specificity) / 2."""
    # Findings are rarer than one in two: a finding is called where it is likelier than by chance.
    chance = math.log(PREVALENCE / (1 - PREVALENCE))
    said = torch.cat([model(pixels(part.numpy())) for part in torch.split(images, 250)]) > chance
    sensitivity = (said * shows).sum(0) / shows.sum(0)
    specificity = (~said * (1 - shows)).sum(0) / (1 - shows).sum(0)
    return float((sensitivity + specificity).mean() / 2)


def main(
    out: Annotated[Path, typer.Option(help="Where the weights go.")] = WEIGHTS,
    seed: Annotated[int, typer.Option(help="Chooses phantoms and weights.")] = 0,
    images: Annotated[int, typer.Option(help="Training films.")] = 16_000,
    epochs: Annotated[int, typer.Option(help="Passes over them.")] = 9,
) -> None:
    """Draw, train, measure and save."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    model = train(*_draw(images, seed, "pretrain"), seed=seed, epochs=epochs)
    score = balanced(model, *_draw(2_000, seed, "pretrain check"))
    log.info("balanced accuracy on new phantoms: %.3f", score)
    recipe = {
        "seed": seed,
        "images": images,
        "epochs": epochs,
        "balanced_accuracy": round(score, 4),
    }
    save_file(model.state_dict(), out, {"architecture": ARCHITECTURE, "recipe": json.dumps(recipe)})
    log.info("wrote %s: %d bytes", out, out.stat().st_size)


if __name__ == "__main__":
    typer.run(main)
