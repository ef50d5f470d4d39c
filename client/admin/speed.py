"""What bfloat16 would gain on this machine, measured. For people: nothing else depends on it.

Half precision is many times as fast where the hardware has units for it, and slower where it does
not, or where layers are limited by memory.
"""

import copy
import time
from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import nn

from client.features.precision import autocast
from client.features.prefix import BATCH, Prefix
from common.config.study import Dtype
from common.model.network import Network
from common.model.split import train_mode

# What differs between two measurements is no reason to change.
_CLEARLY = 1.3


class Gain(NamedTuple):
    """How many times as fast bfloat16 is as float32, for each part of a study's network."""

    frozen: float | None
    """A batch through the frozen layers; None where there are none."""
    trained: float | None
    """A batch forward and backward through the trained ones; None under privacy: float32 always."""

    @property
    def recommended(self) -> bool:
        """Whether one part is clearly faster, and none clearly slower."""
        told = [gain for gain in self if gain is not None]
        return max(told, default=1.0) > _CLEARLY and min(told, default=1.0) > 1 / _CLEARLY

    def __str__(self) -> str:
        parts = {"frozen layers": self.frozen, "trained layers": self.trained}
        told = [f"{part} × {gain:.2f}" for part, gain in parts.items() if gain is not None]
        advice = "ask for bfloat16" if self.recommended else "stay with float32"
        return f"bfloat16 beside float32: {', '.join(told) or 'the same'}: {advice}"


def measure_gain(network: Network, *, private: bool) -> Gain:
    """Measured on batches of a usual size; a few seconds, in which nothing else should run.

    Args:
      network: Of the study, on the device in question; left as it is.
      private: Whether the study is.
    """
    frozen = not isinstance(network.split.prefix, nn.Identity)
    return Gain(
        _ratio(network, _forward) if frozen else None,
        None if private else _ratio(network, _step),
    )


def _ratio(network: Network, make: Callable[[Network, Dtype], Callable[[], object]]) -> float:
    device = next(network.model.parameters()).device
    full, half = (measure_seconds(make(network, dtype), device) for dtype in get_args(Dtype))
    return full / half


def _forward(network: Network, dtype: Dtype) -> Callable[[], object]:
    """A batch through the frozen prefix."""
    prefix = Prefix(network.split.prefix, network.preprocess, dtype)
    pixels = _pixels(network)
    return lambda: prefix(pixels)


def _step(network: Network, dtype: Dtype) -> Callable[[], object]:
    """A batch forward and backward through a copy of the trained suffix."""
    suffix = copy.deepcopy(network.split.suffix)
    inputs = Prefix(network.split.prefix, network.preprocess, "float32")(_pixels(network))
    train_mode(suffix)

    def step() -> None:
        with autocast(dtype, inputs.device):
            logits = suffix(inputs)
        logits.float().square().mean().backward()

    return step


def _pixels(network: Network) -> torch.Tensor:
    side, device = network.preprocess.crop, next(network.model.parameters()).device
    return torch.zeros(BATCH, 3, side, side, dtype=torch.uint8, device=device)


def measure_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of three runs of `work` on `device`, after one to warm up."""
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[1]
