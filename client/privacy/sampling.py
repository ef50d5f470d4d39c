"""Poisson sampling of patients: who is in a step, by which image, in which view."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.privacy.noise import Entropy


@dataclass(frozen=True)
class Patients:
    """Who trains: which images are whose.

    Attributes:
      images: Positions of all images, those of one patient side by side; int64 [images].
      counts: How many each patient has; int64 [patients].
    """

    images: Tensor
    counts: Tensor

    @classmethod
    def of(cls, ids: Sequence[str]) -> "Patients":
        """From the patient of each image."""
        number = {patient: k for k, patient in enumerate(dict.fromkeys(ids))}
        owner = torch.tensor([number[patient] for patient in ids], dtype=torch.int64)
        return cls(owner.argsort(stable=True), owner.bincount())

    @property
    def owner(self) -> Tensor:
        """The number of the patient of each image, in the order of images; int64 [images]."""
        owner = torch.empty_like(self.images)
        owner[self.images] = torch.arange(len(self.counts)).repeat_interleave(self.counts)
        return owner

    def draw(self, rate: float, views: int, entropy: Entropy) -> tuple[Tensor, Tensor]:
        """The patients of a step, each with probability `rate`: an image of each, and its view."""
        drawn = entropy.poisson(len(self.counts), rate)
        first = self.counts.cumsum(0) - self.counts
        chosen = first[drawn] + entropy.below(self.counts[drawn])
        return self.images[chosen], entropy.below(torch.full_like(drawn, views))
