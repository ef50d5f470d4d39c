"""A head of a site's own patients alone, as the site would make it without any federation.

A discriminant on the backbone as it began; its shrinkage and its read-out are the site's own
choice.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from client.session import Session
from common.heads.adapting import OwnImages, solve_local
from common.heads.read_out import ReadOut, choose_read_out, list_read_outs
from common.heads.registry import LinearHead
from common.heads.sums import map_features
from common.metrics.counts import Counts, Floats
from common.support.seeds import derive


@dataclass(frozen=True, eq=False)
class LocalModel:
    """A head of one site's patients alone.

    Attributes:
      head: The head itself.
      centre: [d], taken off each image's features.
      read_out: By which its probabilities are truest on the site's validation images.
    """

    head: LinearHead
    centre: Floats
    read_out: ReadOut

    @property
    def digest(self) -> str:
        """SHA-256 of the head: in another study, too, the same head is the same model."""
        parts = (self.head.weight, self.head.bias, self.centre)
        return hashlib.sha256(b"".join(n.astype("<f4").tobytes() for n in parts)).hexdigest()


def solve_own_head(session: Session) -> LocalModel:
    """Solve the discriminant of the training patients of this site."""
    images, total = session.sum_all_features()
    centre = total / max(images, 1)
    classes = len(session.prepared.study.classes)
    head, _ = solve_local(collect_images(session, centre), classes, seed=draw_folds(session))
    logits, labels = _compute_logits(session, "validation", head, centre)
    read_outs = list_read_outs(session.prepared.offer.images.train)
    losses = [Counts.of(logits, labels, each.scores(logits)).loss_sum for each in read_outs]
    return LocalModel(head, centre, choose_read_out(read_outs, losses))


def compute_local_logits(session: Session, model: LocalModel, part: str) -> Tensor:
    """Logits [n, K] of the images of a part."""
    return _compute_logits(session, part, model.head, model.centre)[0]


def _compute_logits(
    session: Session, part: str, head: LinearHead, centre: Floats
) -> tuple[Tensor, Tensor]:
    features = map_features(session.compute_features(part), centre)
    logits = features @ head.weight.T + head.bias
    return torch.from_numpy(logits), session.prepared.examples[part].labels


def collect_images(session: Session, centre: Floats | None) -> OwnImages:
    """The training images of a site, their features less a centre [d]."""
    prepared = session.prepared
    views = [map_features(features, centre) for features in session.view_features("train")]
    labels = prepared.examples["train"].labels.numpy()
    return OwnImages(views, labels, prepared.owners.owner.numpy())


def draw_folds(session: Session) -> int:
    """The seed of the folds of its cross-validation."""
    return derive(session.prepared.study.seed, session.prepared.site.name, "folds")
