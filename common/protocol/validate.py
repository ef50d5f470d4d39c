"""The question how one model validates, and by which read-out its probabilities are truest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import ContractError
from common.heads.read_out import ReadOut
from common.metrics.counts import Counts
from common.protocol.counts import read_counts
from common.protocol.fields import (
    ARRAYS,
    CONFIG,
    STUDY,
    VALIDATION,
    check_parts,
    get_part,
    get_value,
)
from common.protocol.join import JoinReply

VALIDATE = "query.validate"
"""The type of the message that asks how a model does on validation patients."""

TEMPERATURES, PRIORS, LOSSES = "temperatures", "log-priors", "losses"
MOST_READ_OUTS = 64


@dataclass(frozen=True, kw_only=True)
class ValidateRequest:
    """Tell how this model does on your validation patients, and its loss under each read-out."""

    study: str
    arrays: ArrayRecord
    read_outs: Sequence[ReadOut]

    def record(self) -> RecordDict:
        """As Flower sends it."""
        config = ConfigRecord({STUDY: self.study, **write_read_outs(self.read_outs)})
        return RecordDict({ARRAYS: self.arrays, CONFIG: config})

    @classmethod
    def read(cls, record: RecordDict) -> "ValidateRequest":
        """Back from Flower; arrays and read-outs are still unchecked. Raises `ContractError`."""
        check_parts(record, ARRAYS, CONFIG)
        return cls(
            study=get_value(record, CONFIG, STUDY, str),
            arrays=get_part(record.array_records, ARRAYS),
            read_outs=read_read_outs(record),
        )


def write_read_outs(read_outs: Sequence[ReadOut]) -> dict[str, list[float]]:
    """As they stand in a message: temperatures, and the priors of all in one list."""
    return {
        TEMPERATURES: [read_out.temperature for read_out in read_outs],
        PRIORS: [p for read_out in read_outs for p in read_out.log_prior],
    }


def read_read_outs(record: RecordDict, most: int = MOST_READ_OUTS) -> list[ReadOut]:
    """Those of a message, still unchecked; raises `ContractError` unless they are some."""
    temperatures, priors = (get_value(record, CONFIG, k, list) for k in (TEMPERATURES, PRIORS))
    number = len(temperatures)
    if not 1 <= number <= most or len(priors) % number:
        raise ContractError(f"expected 1 to {most} read-outs")
    if any(type(x) is not float for x in (*temperatures, *priors)):
        raise ContractError("read-outs that are no numbers")
    each = len(priors) // number
    rows = [tuple(priors[i * each : (i + 1) * each]) for i in range(number)]
    return [ReadOut(t, prior) for t, prior in zip(temperatures, rows, strict=True)]


def check_read_outs(read_outs: Sequence[ReadOut], classes: int) -> None:
    """Raise `ContractError` unless all are of so many classes, and within range."""
    if not all(read_out.good(classes) for read_out in read_outs):
        raise ContractError("read-outs of other classes, or out of range")


@dataclass(frozen=True, kw_only=True)
class ValidateReply:
    """What a model does on a site's validation images, as its logits are; and under each read-out.

    Attributes:
      counts: Of the logits themselves.
      losses: Cross-entropy in nats, summed over images, in the order asked.
    """

    counts: Counts
    losses: Sequence[float]

    def record(self) -> RecordDict:
        """As Flower sends it."""
        losses = MetricRecord({LOSSES: list(self.losses)})
        return RecordDict({VALIDATION: MetricRecord(self.counts.sparse()), LOSSES: losses})

    @classmethod
    def read(cls, record: RecordDict, number: int, joined: JoinReply) -> "ValidateReply":
        """Back from Flower; raises `ContractError` unless it is exactly as told at join."""
        check_parts(record, VALIDATION, LOSSES)
        images = joined.images.validation
        counts = read_counts(record, VALIDATION, images, len(images or ()), joined.disclosure)
        losses = get_part(record.metric_records, LOSSES).get(LOSSES)
        if not isinstance(losses, list) or len(losses) != number:
            raise ContractError("losses of other read-outs than were asked about")
        if not all(type(x) is float and math.isfinite(x) and x >= 0 for x in losses):
            raise ContractError("losses that are not finite, or below 0")
        return cls(counts=counts, losses=[float(x) for x in losses])
