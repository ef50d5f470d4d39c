"""How probabilities are read from logits that decide without knowing how common a class is."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST_PRIOR = 30.0
"""The largest logarithm of a class's share, by size: one image of ten million million."""
COLDEST, HOTTEST = 0.01, 100.0
"""The range of temperatures."""


@dataclass(frozen=True)
class ReadOut:
    """Probabilities are softmax(logits / temperature + log_prior); decisions, the highest logit.

    A head that is solved with balanced classes decides without a prior, which serves rare classes.
    Its probabilities are true only with the share that each class has, and it is too sure of them,
    as all discriminants of many features are: so they get both (Guo et al. 2017; Saerens et al.
    2002).

    Attributes:
      temperature: Above 1 for a head that is too sure.
      log_prior: Of each class; empty where no prior is added.
    """

    temperature: float = 1.0
    log_prior: tuple[float, ...] = ()

    def scores(self, logits: Tensor) -> Tensor:
        """Of whose softmax the probabilities are; float64 [n, K] of logits [n, K]."""
        scores = logits.double() / self.temperature
        return scores + torch.tensor(self.log_prior).double() if self.log_prior else scores

    def facts(self) -> dict[str, Any]:
        """For files, as `load_model` reads them."""
        return {"temperature": self.temperature, "log_prior": list(self.log_prior)}

    def good(self, classes: int) -> bool:
        """Whether its numbers are such as a server may send for so many classes."""
        prior = self.log_prior
        return (
            COLDEST <= self.temperature <= HOTTEST
            and len(prior) in (0, classes)
            and all(math.isfinite(p) and abs(p) <= LARGEST_PRIOR for p in prior)
        )


AS_IT_IS = ReadOut()
"""Probabilities are softmax(logits)."""


def list_read_outs(images: tuple[int, ...] | None) -> list[ReadOut]:
    """Those to choose from: temperatures from 0.35 to 11, without a prior and with one.

    Args:
      images: Training images of each class over all sites, for the prior; None where untold.
    """
    temperatures = [2 ** (step / 2) for step in range(-3, 8)]
    priors: list[tuple[float, ...]] = [()]
    if images is not None:
        whole = sum(images) + len(images)
        priors = [(0.0,) * len(images), tuple(math.log((n + 1) / whole) for n in images)]
    return [ReadOut(t, prior) for prior in priors for t in temperatures]


def choose_read_out(read_outs: list[ReadOut], losses: list[float]) -> ReadOut:
    """The one with the least loss, as it is where losses tell nothing.

    Args:
      read_outs: To choose from.
      losses: Of each, summed over validation images of all sites.
    """
    if not any(losses):
        return AS_IT_IS
    return min(zip(losses, read_outs, strict=True), key=lambda pair: pair[0])[1]
