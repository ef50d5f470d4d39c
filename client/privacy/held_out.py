"""What the end of a study tells of validation and test patients, with an ε of its own.

Each of these patients counts with one image, always the same, drawn by the site's secret: one
patient more or less moves one cell of one confusion matrix by one. The cells leave as a noised sum
(`client.privacy.noised_sum`), the release that training uses, so ε holds for every bit. A patient
is in one part alone, and once a private study drew stays there in all of them, so this ε and that
of training do not add up for anybody; they do for whoever was tested before that and trains now.
"""

import hashlib
import hmac
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from client.privacy.accountant import find_noise_multiplier
from client.privacy.noise import Entropy
from client.privacy.noised_sum import NoisedSum
from client.privacy.parameters import PrivateRelease
from common.metrics.counts import Counts

_calibrated = lru_cache(maxsize=128)(find_noise_multiplier)


def plan_end(epsilon: float, delta: float) -> PrivateRelease:
    """The least noise that keeps the end of one study within ε at δ."""
    sigma = _calibrated(epsilon=epsilon, delta=delta, sample_rate=1.0, steps=1)
    return PrivateRelease(
        mechanism="gaussian",
        noise_multiplier=sigma,
        sample_rate=1.0,
        steps=1,
        delta=delta,
        clip_norm=1.0,
    )


def choose_images(patients: Sequence[str], secret: bytes) -> Tensor:
    """The position of one image of each patient, by the patient of each image; int64, rising.

    Which one depends on the patient's own images and the secret alone.
    """
    own: dict[str, list[int]] = {}
    for at, patient in enumerate(patients):
        own.setdefault(patient, []).append(at)
    chosen = [images[_draw(secret, patient) % len(images)] for patient, images in own.items()]
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def _draw(secret: bytes, patient: str) -> int:
    drawn = hmac.digest(secret, b"held out:" + patient.encode(), hashlib.sha256)
    return int.from_bytes(drawn[:8], "big")


def noise_counts(counts: Sequence[Counts], plan: PrivateRelease) -> list[Counts]:
    """The confusion matrices of several parts with noise in every cell, and without scores.

    Args:
      counts: One image of each patient, by part; no patient is in two of them.
      plan: How much noise.
    """
    cells = torch.stack([torch.from_numpy(part.confusion) for part in counts])
    total = NoisedSum(
        [cells.shape], clip_norm=plan.clip_norm, noise_multiplier=plan.noise_multiplier
    )
    for at in cells.nonzero():
        row = torch.zeros(cells.shape, dtype=torch.float32)
        row[tuple(at)] = 1.0
        for _ in range(int(cells[tuple(at)])):
            total.add([row])
    (noised,) = total.release(Entropy())
    told = noised.round().long().numpy()
    deviation = plan.noise_multiplier * plan.clip_norm
    return [part.coarse(told[k], deviation) for k, part in enumerate(counts)]
