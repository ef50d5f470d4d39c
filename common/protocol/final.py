"""The last message: the released model, and its counts."""

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.heads.read_out import AS_IT_IS, ReadOut
from common.metrics.metrics import Counts
from common.protocol.counts import read_counts
from common.protocol.fields import (
    ARRAYS,
    CONFIG,
    STUDY,
    TEST,
    VALIDATION,
    check_parts,
    get_part,
    get_value,
)
from common.protocol.join import JoinReply
from common.protocol.validate import read_read_outs, write_read_outs


@dataclass(frozen=True, kw_only=True)
class FinalRequest:
    """Evaluate the released model on your validation and test patients."""

    study: str
    arrays: ArrayRecord
    read_out: ReadOut = AS_IT_IS
    """By which its probabilities are read."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        told = write_read_outs([self.read_out])
        config = ConfigRecord({STUDY: self.study, **told})
        return RecordDict({ARRAYS: self.arrays, CONFIG: config})

    @classmethod
    def read(cls, record: RecordDict) -> "FinalRequest":
        """Back from Flower; arrays and read-out are still unchecked. Raises `ContractError`."""
        check_parts(record, ARRAYS, CONFIG)
        (read_out,) = read_read_outs(record, most=1)
        arrays = get_part(record.array_records, ARRAYS)
        study = get_value(record, CONFIG, STUDY, str)
        return cls(study=study, arrays=arrays, read_out=read_out)


@dataclass(frozen=True, kw_only=True)
class FinalCounts:
    """Counts of the released model, on the two parts that are held out."""

    validation: Counts
    test: Counts


@dataclass(frozen=True, kw_only=True)
class FinalReply:
    """What a site sends at the end."""

    counts: FinalCounts | None
    """If the site tells them."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        if self.counts is None:
            return RecordDict()
        parts = {VALIDATION: self.counts.validation, TEST: self.counts.test}
        return RecordDict({part: MetricRecord(told.sparse()) for part, told in parts.items()})

    @classmethod
    def read(cls, record: RecordDict, classes: int, joined: JoinReply) -> "FinalReply":
        """Back from Flower; raises `ContractError` unless it is exactly as told at join."""
        if joined.disclosure.metrics == "none":
            check_parts(record)
            return cls(counts=None)
        check_parts(record, VALIDATION, TEST)
        told, disclosure = joined.images, joined.disclosure
        validation = read_counts(record, VALIDATION, told.validation, classes, disclosure)
        test = read_counts(record, TEST, told.test, classes, disclosure)
        return cls(counts=FinalCounts(validation=validation, test=test))
