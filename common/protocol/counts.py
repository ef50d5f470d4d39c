"""Counts as they travel: of the images told at join, and no finer than disclosed."""

from collections.abc import Sequence

from flwr.app import RecordDict

from common.errors import ContractError
from common.metrics.counts import Counts
from common.protocol.disclosure import Disclosure
from common.protocol.fields import get_part


def read_counts(
    record: RecordDict,
    key: str,
    images: Sequence[int] | None,
    classes: int,
    disclosure: Disclosure,
) -> Counts:
    """Counts no finer than the site disclosed at join, and of the images it told, if it did."""
    told = get_part(record.metric_records, key)
    counts = Counts.from_sparse(told, classes, scored=disclosure.tells_scores)
    if disclosure.epsilon is not None:
        return counts
    if counts.confusion.sum(axis=1).tolist() != list(images or ()) or (counts.confusion < 0).any():
        raise ContractError("counts of other images than it told at join")
    if (counts.confusion % disclosure.base).any():
        raise ContractError("counts finer than it disclosed at join")
    return counts
