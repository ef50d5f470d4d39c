"""The fields that messages are made of, and the only way to read one.

The keys of records are spelled here; those of counts in `common.metrics`. Both sides treat what
they read as hostile: anything that is not exactly what the protocol says raises `ContractError`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Self, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field

from common.config.yaml import Section
from common.errors import ContractError
from common.metrics.counts import MOST

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"

VALIDATION, TEST, LEDGER_HEAD = "validation", "test", "ledger"

JSON, STUDY, ROUND, PROXIMAL = "json", "study", "server-round", "proximal-mu"

LOSS, COUNT, HASH = "train-loss", "count", "hash"

LACKS, SIZE, OFFSET, DATA = "lacks", "size", "offset", "data"

_LONGEST_JSON = 1_000_000

Count = Annotated[int, Field(ge=0, le=MOST)]

T = TypeVar("T")


class ByPart(Section, Generic[T]):
    """Something of each part of a site's patients."""

    train: T
    validation: T
    test: T

    @property
    def all(self) -> tuple[T, T, T]:
        """Of training, validation and test patients."""
        return self.train, self.validation, self.test


def check_parts(record: RecordDict, *keys: str) -> None:
    """Return if a message has exactly these parts; raise `ContractError` otherwise."""
    if set(record) != set(keys):
        raise ContractError("a message with other parts than agreed")


def get_part(records: Mapping[str, Any], key: str) -> Any:
    """A part of a message; raises `ContractError` if it is not of this kind."""
    if key not in records:
        raise ContractError(f"no {key!r} in the message")
    return records[key]


@dataclass(frozen=True, kw_only=True)
class TensorsRequest:
    """A question about a study that comes with tensors, unchecked."""

    study: str
    arrays: ArrayRecord

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({ARRAYS: self.arrays, CONFIG: ConfigRecord({STUDY: self.study})})

    @classmethod
    def read(cls, record: RecordDict) -> Self:
        """Back from Flower; the arrays are still unchecked. Raises `ContractError`."""
        check_parts(record, ARRAYS, CONFIG)
        arrays = get_part(record.array_records, ARRAYS)
        return cls(study=get_value(record, CONFIG, STUDY, str), arrays=arrays)


def get_value(record: RecordDict, section: str, key: str, kind: type[Any]) -> Any:
    """A value of exactly this type in a section; raises `ContractError` otherwise."""
    value = get_part(record.config_records, section).get(key)
    if type(value) is not kind or (kind is str and len(value) > _LONGEST_JSON):
        raise ContractError(f"no usable {key!r} in the message")
    return value
