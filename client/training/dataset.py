"""Prepared images with their labels, as the suffix reads them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from client.features.extract import Prepared


@dataclass(frozen=True)
class Examples:
    """Prepared images with their labels, int64 [n]."""

    prepared: Prepared
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self, other: "Examples") -> "Examples":
        """These examples and those, prepared in the same way."""
        rows = self.prepared.rows + other.prepared.rows
        prepared = Prepared(rows, self.prepared.views, self.prepared.front)
        return Examples(prepared, torch.cat([self.labels, other.labels]))

    def batch(self, indices: Tensor, views: Tensor | int, device: torch.device) -> Tensor:
        """Inputs of the suffix for these examples, each in the view given for it."""
        rows = self.prepared.rows[indices * self.prepared.views + views].to(device)
        with torch.no_grad():
            output: Tensor = self.prepared.front(rows)
        return output.float()
