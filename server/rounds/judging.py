"""How a model validates over all sites that tell, and the read-out by which it is truest."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from common.config.study import Study
from common.heads.read_out import AS_IT_IS, ReadOut, choose_read_out, list_read_outs
from common.metrics.counts import Counts
from common.protocol.tensors import Tensors, to_arrays
from common.protocol.validate import VALIDATE, ValidateReply, ValidateRequest
from server.rounds.federation import Federation
from server.runs.results import unite_counts

_MOST_LOSS = 20.0
"""Of an image, whatever a site says: a probability of one in 500 million."""


@dataclass(frozen=True)
class Judged:
    """A model on the validation images of all sites that tell.

    Attributes:
      counts: By its logits as they are; of no images where no site tells.
      read_out: By which its probabilities are truest there.
    """

    counts: Counts
    read_out: ReadOut = AS_IT_IS


def judge_model(study: Study, federation: Federation, tensors: Tensors) -> Judged:
    """Ask every site that tells its figures each round how a model does."""
    judges, classes = [m for m in federation.training if m.scores], len(study.classes)
    if not judges:
        return Judged(Counts.zero(classes))
    read_outs = list_read_outs(add_images([m.reply.images.train for m in federation.training]))
    request = ValidateRequest(study=study.id, arrays=to_arrays(tensors), read_outs=read_outs)
    record = request.record()
    told, _ = federation.ask(
        judges,
        [Message(record, member.node, VALIDATE) for member in judges],
        lambda member, found: ValidateReply.read(found, len(read_outs), member.reply),
    )
    return unite_judgements(read_outs, list(told.values()), classes)


def unite_judgements(
    read_outs: list[ReadOut], told: Sequence[ValidateReply], classes: int
) -> Judged:
    """What several sites say of one model, together."""
    bounded = [
        np.minimum(reply.losses, _MOST_LOSS * reply.counts.confusion.sum()) for reply in told
    ]
    losses = np.sum(bounded, axis=0).tolist() if told else []
    counts = unite_counts((reply.counts for reply in told), classes)
    return Judged(counts, choose_read_out(read_outs, losses))


def add_images(told: Sequence[Sequence[int] | None]) -> tuple[int, ...] | None:
    """Training images of each class over the sites that tell them; None where none does."""
    known = [images for images in told if images is not None]
    return tuple(map(sum, zip(*known, strict=True))) if known else None
