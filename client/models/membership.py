"""Whether a model gives away who trained it: it errs less on those who did (Yeom et al. 2018).

One image of each patient is looked at. What counts is how much smaller its loss is than usual for
its class: some classes are hard for everybody.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from torch import Tensor

from client.features.precision import fix_numerics
from client.models.released import open_released
from client.preparation import PreparedSite
from client.privacy.sampling import Patients
from client.site import Site
from client.training import trainer
from common.errors import DataError
from common.metrics.counts import Floats, Ints
from common.protocol.tensors import Tensors

_FALSE = 0.05
"""Of patients who did not train, so many may be taken for members."""
_ENOUGH = 20
"""Held-out patients of a class, without whom no threshold can be set for it."""


@dataclass(frozen=True)
class Membership:
    """How well a model's losses tell training patients from held-out ones.

    Attributes:
      study: The id of the study.
      trained: Patients who trained.
      held_out: Patients who did not.
      auroc: The chance that of one of each the model errs less on the one who trained; 0.5 is none.
      chance: How likely an AUROC as large is by chance alone (Mann and Whitney 1947).
      sought: Patients who trained in classes with enough held-out patients for a threshold.
      found: How many of these are found, at a false positive rate of 5 % in each class.
    """

    study: str
    trained: int
    held_out: int
    auroc: float
    chance: float
    sought: int
    found: int


def attack_membership(site: Site, name: str) -> Membership:
    """Attack the released model of a study, by name or id, on this site's own patients.

    Raises:
      SiteError: no such model was kept here.
      DataError: no patients trained, or none were held out; or the model's losses are no numbers.
    """
    session, released = open_released(site, name)
    prepared = session.prepared
    looked_at = {"train": list_first_images(prepared.owners), **prepared.drawn}
    told = [
        compute_losses(prepared, released.tensors, part, some) for part, some in looked_at.items()
    ]
    trained, held_out = len(told[0][0]), sum(len(losses) for losses, _ in told[1:])
    if not trained or not held_out:
        got = f"{trained} and {held_out}"
        raise DataError(site.source, expected="patients who trained and who did not", got=got)
    losses, labels = (np.concatenate(each) for each in zip(*told, strict=True))
    if not np.isfinite(losses).all():
        where = f"the released model of {prepared.study.id}"
        raise DataError(where, expected="finite losses on every patient", got="some that are not")
    scores, members = score_losses(losses, labels), np.arange(len(losses)) < trained
    sought, found = find_members(scores, labels, members)
    test = mannwhitneyu(scores[members], scores[~members], alternative="greater")
    return Membership(
        study=prepared.study.id,
        trained=trained,
        held_out=held_out,
        auroc=float(test.statistic) / (trained * held_out),
        chance=float(test.pvalue),
        sought=sought,
        found=found,
    )


def find_members(scores: Floats, labels: Ints, members: NDArray[np.bool_]) -> tuple[int, int]:
    """How many trained, and how many of them are found, in classes with enough who did not.

    Args:
      scores: [n], higher for who is likelier to have trained.
      labels: [n], the class of each; it has a threshold of its own.
      members: [n], who trained.
    """
    sought = found = 0
    for label in np.unique(labels):
        inside = scores[(labels == label) & members]
        outside = np.sort(scores[(labels == label) & ~members])
        if len(outside) >= _ENOUGH:
            threshold = outside[-1 - int(_FALSE * len(outside))]
            sought, found = sought + len(inside), found + int((inside > threshold).sum())
    return sought, found


def list_first_images(owners: Patients) -> Tensor:
    """The first image of each patient, by position; int64 [patients]."""
    return owners.images[owners.counts.cumsum(0) - owners.counts]


def compute_losses(
    prepared: PreparedSite, model: Tensors, part: str, some: Tensor
) -> tuple[Floats, Ints]:
    """The cross-entropy of a model on some images of a part, in nats, and their labels.

    Args:
      prepared: The site.
      model: The tensors that travel.
      part: Of its patients.
      some: Positions, int64 [n].
    """
    suffix, classes = prepared.network.split.suffix, len(prepared.study.classes)
    prepared.network.load(model)
    with fix_numerics(prepared.site.threads):
        logits, labels = trainer.compute_logits(suffix, prepared.examples[part], classes, some)
    losses = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    return losses.numpy(), labels.numpy()


def score_losses(losses: Floats, labels: Ints) -> Floats:
    """How much smaller each loss is than the median of its class; [n]."""
    scores = np.zeros_like(losses)
    for label in np.unique(labels):
        own = labels == label
        scores[own] = np.median(losses[own]) - losses[own]
    return scores
