"""Counts as they travel: of the images told at join, and no finer than disclosed."""

from collections.abc import Sequence

from flwr.app import RecordDict

from common.errors import ContractError
from common.metrics.metrics import Counts
from common.protocol.disclosure import Disclosure
from common.protocol.fields import get_part


def read_counts(
    record: RecordDict, key: str, images: Sequence[int] | None, disclosure: Disclosure
) -> Counts:
    """Counts of exactly these images of each class, no finer than the site disclosed at join."""
    told, base = get_part(record.metric_records, key), disclosure.base
    counts = Counts.from_sparse(told, len(images or ()), scored=base == 1)
    if counts.confusion.sum(axis=1).tolist() != list(images or ()):
        raise ContractError("counts of other images than it told at join")
    if disclosure.coarse(counts).sparse() != counts.sparse():
        raise ContractError("counts finer than it disclosed at join")
    return counts
