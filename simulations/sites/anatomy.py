"""Chests drawn with numpy, and the scanners that film them, for the demo and its pretraining.

Everything is vectorised over a batch of n images and measured in attenuation: 0 is air (black on
the film), 1 is bone (white). Traits are drawn per patient, poses per image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

SIDE = 64
"""Pixels along each side of an image."""

Array = NDArray[np.floating[Any]]
Traits = Mapping[str, Array]
"""Named quantities, each of shape [n, 1, 1] so that it broadcasts over n images."""

WAVES = 6
BODY = {
    "spread": (0.40, 0.46),  # from the spine to a lung's centre
    "rise": (-0.12, -0.02),
    "width": (0.33, 0.41),
    "height": (0.66, 0.80),
    "dome": (0.50, 0.75),  # how far down the lungs reach over the diaphragm
    "heart": (0.24, 0.36),
    "lean": (0.06, 0.16),
    "tissue": (0.58, 0.72),
    "ribs": (3.0, 4.2),
    "rib_phase": (0.0, 1.0),
    "rib_slope": (0.25, 0.55),
    "rib_weight": (0.05, 0.13),
    "vessels": (0.03, 0.07),
    **{f"wave{i}_{part}": (0.0, 1.0) for i in range(WAVES) for part in ("turn", "phase", "pitch")},
}
POSE = {"x": (-0.07, 0.07), "y": (-0.07, 0.07), "turn": (-0.08, 0.08), "zoom": (0.93, 1.07)}
LESION = dict.fromkeys(("side", "x", "y", "size", "weight", "turn", "form"), (0.0, 1.0))


def traits(rng: np.random.Generator, n: int, ranges: Mapping[str, tuple[float, float]]) -> Traits:
    """One uniform draw of every trait for each of n patients or images."""
    return {
        name: rng.uniform(low, high, (n, 1, 1)).astype(np.float32)
        for name, (low, high) in ranges.items()
    }


def pick(of: Traits, rows: NDArray[np.integer]) -> Traits:
    """The traits of the chosen rows, in their order."""
    return {name: values[rows] for name, values in of.items()}


def sign(draw: Array, share: float = 0.5) -> Array:
    """-1 for that share of the draws from 0…1, +1 for the others."""
    return np.where(draw < share, np.float32(-1), np.float32(1))


def edge(distance: Array, width: float | Array) -> Array:
    """1 well inside (distance > 0), 0 well outside, soft over about `width`."""
    return np.asarray(0.5 + 0.5 * np.tanh(distance / width), np.float32)


def spot(x: Array, y: Array, radius: float | Array) -> Array:
    """A Gaussian bump of height 1 around the origin of the given coordinates."""
    return np.asarray(np.exp(-(x * x + y * y) / (radius * radius)), np.float32)


@dataclass(frozen=True)
class Chest:
    """n chests in their poses; `u` runs across and `v` down the body, each [n, SIDE, SIDE]."""

    body: Traits
    u: Array
    v: Array

    @classmethod
    def posed(cls, body: Traits, pose: Traits) -> Self:
        """Chests with these bodies, each seen in its pose."""
        line = np.linspace(-1, 1, SIDE, dtype=np.float32)
        x, y = line[None, None, :] - pose["x"], line[None, :, None] - pose["y"]
        cos, sin = np.cos(pose["turn"]) / pose["zoom"], np.sin(pose["turn"]) / pose["zoom"]
        return cls(body, cos * x + sin * y, cos * y - sin * x)

    def only(self, rows: NDArray[np.integer]) -> Self:
        """The chosen chests, in the order of `rows`."""
        return type(self)(pick(self.body, rows), self.u[rows], self.v[rows])

    def lung(self, side: float | Array) -> tuple[Array, Array, Array]:
        """One lung: -1 the left one in the image, +1 the right one.

        Returns:
          Its own coordinates, each about -1…1: `a` from the spine outward, `b` from apex to base;
          and its mask, 0…1.
        """
        body = self.body
        a = (side * self.u - body["spread"]) / body["width"]
        b = (self.v - body["rise"]) / body["height"]
        outline = 1 - np.abs(a / (0.86 + 0.16 * b)) ** 2.4 - np.abs(b) ** 3
        diaphragm = 2 * (body["dome"] + 0.3 * a * np.abs(a) - b)
        return a, b, edge(np.minimum(outline, diaphragm), 0.12)

    @cached_property
    def texture(self) -> Array:
        """Vessel-like mottle fixed to the patient, roughly -1…1."""
        total = np.zeros_like(self.u)
        for i in range(WAVES):
            turn, phase = (2 * np.pi * self.body[f"wave{i}_{part}"] for part in ("turn", "phase"))
            pitch = 9 + 14 * self.body[f"wave{i}_pitch"]
            bend = total * 1.5  # each wave bends the next, so that no grating shows
            total += np.cos(pitch * (np.cos(turn) * self.u + np.sin(turn) * self.v) + phase + bend)
        return total / np.float32(WAVES / 2)

    def attenuation(self) -> Array:
        """The healthy chest, [n, SIDE, SIDE], 0…1."""
        u, v, body = self.u, self.v, self.body
        left, right = self.lung(-1.0), self.lung(1.0)
        lungs = np.maximum(left[2], right[2])
        trunk = edge(0.94 - np.abs(u) - 0.9 * np.clip(-0.62 - v, 0, None), 0.07)
        film = body["tissue"] * trunk * (1 - 0.78 * lungs)
        film += 0.18 * np.exp(-((u / 0.11) ** 2)) * (1 + 0.15 * np.cos(22 * v))
        heart = 1 - np.hypot(u - body["lean"], (v - 0.3) * 0.85) / body["heart"]
        film += 0.30 * edge(heart, 0.18) * lungs
        hila = spot(left[0] + 0.75, left[1] - 0.05, 0.6) + spot(right[0] + 0.75, right[1], 0.6)
        film += body["vessels"] * lungs * (1 + 2.2 * hila) * self.texture
        arch = body["ribs"] * (v + body["rib_slope"] * u * u) + body["rib_phase"]
        film += body["rib_weight"] * trunk * np.cos(2 * np.pi * arch) ** 3 * edge(0.6 - v, 0.3)
        collar = np.abs(v + 0.78 - 0.25 * np.abs(u))
        film += 0.16 * edge(0.045 - collar, 0.03) * edge(np.abs(u) - 0.1, 0.05) * trunk
        return np.asarray(film, np.float32)


Finding = Callable[[Chest, Traits], Array]
"""A finding adds to the attenuation of the chests it is in, given its LESION traits."""


@dataclass(frozen=True)
class Scanner:
    """A scanner makes films of attenuation. Each number may also be an array [n, 1, 1]."""

    blur: float | Array = 0.6
    """Standard deviation of the point spread, in pixels."""
    noise: float | Array = 0.03
    contrast: float | Array = 1.0
    brightness: float | Array = 0.0
    gamma: float | Array = 1.0
    """Pixel response: below 1 lifts the dark parts."""

    def film(self, attenuation: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
        """The films, uint8 of shape [n, SIDE, SIDE]."""
        fy, fx = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :]
        spread = np.exp(-2 * np.pi**2 * np.square(self.blur) * (fx * fx + fy * fy))
        sharp = np.fft.irfft2(np.fft.rfft2(attenuation) * spread, s=(SIDE, SIDE))
        grain = rng.standard_normal(attenuation.shape, np.float32) * (0.6 + 0.8 * sharp)
        level = 0.5 + (sharp + self.noise * grain - 0.5) * self.contrast + self.brightness
        return np.asarray(255 * np.clip(level, 0, 1) ** self.gamma + 0.5).astype(np.uint8)
