"""The last message: the released model, and its counts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import ContractError
from common.flower.messages import record_to_bytes
from common.heads.read_out import AS_IT_IS, ReadOut
from common.heads.sums import Sums
from common.metrics.by_patient import Evidence
from common.metrics.counts import Counts, Floats
from common.protocol.counts import read_counts
from common.protocol.evidence import (
    EVIDENCE,
    FEDERATED,
    OWN,
    read_evidence,
    tells_evidence,
    write_evidence,
)
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
from common.protocol.sums import WEIGHTS, read_sums, read_weights, write_sums
from common.protocol.validate import read_read_outs, write_read_outs

SUMS, SHRINKAGE = "sums", "shrinkage"


@dataclass(frozen=True, kw_only=True)
class FinalRequest:
    """Evaluate the released model on your validation and test patients, and fit it to yourself.

    Attributes:
      study: Its id.
      arrays: The model.
      read_out: By which its probabilities are read.
      solved: Where the model is a solved discriminant, from what.
    """

    study: str
    arrays: ArrayRecord
    read_out: ReadOut = AS_IT_IS
    solved: "Solved | None" = None

    def record(self) -> RecordDict:
        """As Flower sends it."""
        told: dict[str, Any] = {STUDY: self.study, **write_read_outs([self.read_out])}
        parts: dict[str, Any] = {ARRAYS: self.arrays}
        if self.solved is not None:
            parts[SUMS] = self.solved.arrays
            told |= {WEIGHTS: self.solved.weights.tolist(), SHRINKAGE: self.solved.shrinkage}
        return RecordDict({**parts, CONFIG: ConfigRecord(told)})

    @classmethod
    def read(cls, record: RecordDict) -> "FinalRequest":
        """Back from Flower; arrays and read-out are still unchecked. Raises `ContractError`."""
        solved = SUMS in record.array_records
        check_parts(record, ARRAYS, CONFIG, *([SUMS] if solved else []))
        (read_out,) = read_read_outs(record, most=1)
        arrays = get_part(record.array_records, ARRAYS)
        study = get_value(record, CONFIG, STUDY, str)
        found = Solved.read(record) if solved else None
        return cls(study=study, arrays=arrays, read_out=read_out, solved=found)


@dataclass(frozen=True, eq=False)
class Solved:
    """What a discriminant was solved from: sums over all sites, and how strongly it was shrunk.

    Attributes:
      arrays: The sums, as they travel.
      weights: [K], of each class in them.
      shrinkage: Above 0, to 1.
    """

    arrays: ArrayRecord
    weights: Floats
    shrinkage: float

    @classmethod
    def of(cls, sums: Sums, shrinkage: float) -> "Solved":
        """From sums over all sites."""
        return cls(write_sums(sums), sums.weights, shrinkage)

    @classmethod
    def read(cls, record: RecordDict) -> "Solved":
        """Back from Flower; the sums are still unchecked. Raises `ContractError`."""
        shrinkage = get_value(record, CONFIG, SHRINKAGE, float)
        if not 0 < shrinkage <= 1:
            raise ContractError("a shrinkage that is not from 0 to 1")
        arrays = get_part(record.array_records, SUMS)
        return cls(arrays, read_weights(record), shrinkage)

    @property
    def digest(self) -> str:
        """SHA-256 of all of it: with other sums, the same model is fitted otherwise."""
        record = RecordDict({SUMS: self.arrays})
        numbers = [*self.weights.tolist(), self.shrinkage]
        whole = repr(numbers).encode() + record_to_bytes(record)
        return hashlib.sha256(whole).hexdigest()

    def sums(self, classes: int, width: int) -> Sums:
        """Over all sites; raises `ContractError` unless they are such sums."""
        if len(self.weights) != classes:
            raise ContractError("weights of other classes than the study has")
        return read_sums(self.arrays, width, self.weights)


@dataclass(frozen=True, kw_only=True)
class FinalCounts:
    """Counts of the released model, on the two parts that are held out.

    Attributes:
      validation: Of the released model.
      test: Of the released model.
      own: On test patients, of the site's own models: `adapted` and `local`; empty if untold.
      evidence: How these and the released one compare, by patient; None if untold.
    """

    validation: Counts
    test: Counts
    own: Mapping[str, Counts] = field(default_factory=dict)
    evidence: Evidence | None = None

    @property
    def tested(self) -> dict[str, Counts]:
        """Counts on test patients, by way of training."""
        return {FEDERATED: self.test, **self.own}


@dataclass(frozen=True, kw_only=True)
class FinalReply:
    """What a site sends at the end."""

    counts: FinalCounts | None
    """If the site tells them."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        if self.counts is None:
            return RecordDict()
        counts = self.counts
        parts = {VALIDATION: counts.validation, TEST: counts.test, **counts.own}
        record = RecordDict({part: MetricRecord(told.sparse()) for part, told in parts.items()})
        if counts.evidence is not None:
            record[EVIDENCE] = write_evidence(counts.evidence, counts.tested)
        return record

    @classmethod
    def read(cls, record: RecordDict, classes: int, select: str, joined: JoinReply) -> "FinalReply":
        """Back from Flower; raises `ContractError` unless it is exactly as told at join.

        Args:
          record: The message.
          classes: How many the study has.
          select: The study's metric.
          joined: The site's reply to the question to join.
        """
        if joined.disclosure.metrics == "none":
            check_parts(record)
            return cls(counts=None)
        told, disclosure = joined.images, joined.disclosure
        own = OWN if disclosure.adapted else ()
        compared = bool(own) and tells_evidence(disclosure, joined.patients.test)
        check_parts(record, VALIDATION, TEST, *own, *([EVIDENCE] if compared else []))
        validation = read_counts(record, VALIDATION, told.validation, classes, disclosure)
        test = read_counts(record, TEST, told.test, classes, disclosure)
        of_own = {way: read_counts(record, way, told.test, classes, disclosure) for way in own}
        counts = FinalCounts(validation=validation, test=test, own=of_own)
        if compared:
            patients = joined.patients.test or 0
            evidence = read_evidence(record, counts.tested, select, patients)
            counts = replace(counts, evidence=evidence)
        return cls(counts=counts)
