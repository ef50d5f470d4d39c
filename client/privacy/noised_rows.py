"""Sums over training patients with noise, for a head that is solved from two of them.

A patient counts with one row, the mean over all of that patient's images and their views; each
image's row is of bounded length, so their mean is, whatever the model. Each image passes the model
by itself, as in `client.privacy.dp_sgd`: beside other images its features would be rounded
otherwise.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from client.privacy.dp_sgd import compute_exactly
from client.privacy.noise import Entropy
from client.privacy.noised_sum import NoisedSum
from client.privacy.parameters import PrivateRelease, TrainingRelease
from client.privacy.sampling import Patients
from client.training.dataset import Examples
from client.training.head_features import compute_linear_input
from common.heads.whitening import (
    Noised,
    count_moments,
    count_prototypes,
    make_moments,
    make_prototype,
)

MakeRow = Callable[[Tensor, int], Tensor]
"""From what the linear layer reads of an image [r], and its label, to a row [m]."""


def choose_rows(kind: TrainingRelease, classes: int, directions: int) -> tuple[MakeRow, int]:
    """How the rows of a query of this kind are made, and how many numbers one has."""
    if kind == "moments":
        return lambda z, _: make_moments(z), count_moments(directions)
    return lambda x, label: make_prototype(x, label, classes), count_prototypes(classes, directions)


def make_rows(
    suffix: nn.Module, examples: Examples, patients: Patients, make_row: MakeRow
) -> Iterator[Tensor]:
    """The row of each patient [m], float32.

    Args:
      suffix: With the whitening that was asked for; left in eval mode.
      examples: The training images.
      patients: Whose they are.
      make_row: Makes the row of an image.
    """
    device = next(suffix.parameters()).device
    suffix.eval()
    with compute_exactly(device), torch.inference_mode():
        for images in patients.images.split(patients.counts.tolist()):
            rows = [
                make_row(compute_linear_input(suffix, examples, i, view), int(examples.labels[i]))
                for i in images.tolist()
                for view in range(examples.prepared.views)
            ]
            yield torch.stack(rows).double().mean(dim=0).float()


def noise_rows(
    rows: Iterable[Tensor], release: PrivateRelease, size: int, entropy: Entropy | None = None
) -> Noised:
    """The noised sum of a row of each patient.

    Args:
      rows: As `make_rows` makes them.
      release: Clipping and noise.
      size: Of a row.
      entropy: Of tests only.
    """
    clip, sigma = release.clip_norm, release.noise_multiplier
    total = NoisedSum([torch.Size([size])], clip_norm=clip, noise_multiplier=sigma)
    for row in rows:
        total.add([row])
    (noised,) = total.release(entropy or Entropy())
    return Noised(noised.numpy(), sigma * clip)
