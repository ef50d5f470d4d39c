"""Every message between server and site, as typed values to and from Flower records.

The only file that spells a record key. Both sides treat what they read as hostile: anything that is
not exactly what the protocol says raises `ContractError`.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import Field, StrictInt, ValidationError, model_validator
from torch import Tensor

from common.config.study import Name
from common.config.yaml import Section
from common.errors import ContractError
from common.metrics.metrics import MOST, Counts
from common.model.contract import Contract, Versions
from common.model.weights import LARGEST
from common.protocol.disclosure import Disclosure

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
WEIGHT = "weight"
_VALIDATION, _TEST, _LEDGER = "validation", "test", "ledger"
_JSON, _STUDY, _ROUND, _PROXIMAL = "json", "study", "server-round", "proximal-mu"
_LOSS, _COUNT, _HASH = "train-loss", "count", "hash"
_LACKS, _SIZE, _OFFSET, _DATA = "lacks", "size", "offset", "data"
_LARGEST_BACKBONE = 4 * 10**9
_LONGEST_JSON = 1_000_000
_WORST_LOSS = 1e12
_MOST_PROXIMAL = 1e6

Count = Annotated[int, Field(ge=0, le=MOST)]
Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, Tensor]


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

LEDGER = "query.ledger"
"""The type of the message that asks for a line of a site's ledger; Flower's name for it."""

BACKBONE = "query.backbone"
"""The type of a message with a piece of the backbone, for a site that has no copy."""

T = TypeVar("T")


class Parts(Section, Generic[T]):
    """Something of each part of a site's patients."""

    train: T
    validation: T
    test: T

    @property
    def all(self) -> tuple[T, T, T]:
        """Of training, validation and test patients."""
        return self.train, self.validation, self.test


class LedgerHead(Section):
    """How far a site's ledger of releases goes."""

    count: Annotated[StrictInt, Field(ge=1)]
    """Its number of lines."""
    hash: Sha256
    """Of the last of them, which covers all before it."""


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """What the server proposes, once, before the first round."""

    proposal: str
    """The study as canonical JSON."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({CONFIG: ConfigRecord({_JSON: self.proposal})})

    @classmethod
    def read(cls, record: RecordDict) -> "JoinRequest":
        """Back from Flower; raises `ContractError`."""
        _exactly(record, CONFIG)
        return cls(proposal=_value(record, CONFIG, _JSON, str))


class JoinReply(Section):
    """What a site agrees to, and what it says about itself."""

    name: Name
    role: Literal["train", "evaluate"]
    contract: Contract
    disclosure: Disclosure
    """What the site tells, here and later."""
    patients: Parts[Count | None]
    """How many, in each part; None where the site does not tell."""
    images: Parts[tuple[Count, ...] | None]
    """How many of each class, in each part; None where the site does not tell."""
    enrolled: Annotated[StrictInt, Field(ge=1, le=10**9)] | None
    """Under privacy, about how many patients train: a constant of the site's; None if untold."""
    ledger: LedgerHead
    versions: Versions

    @model_validator(mode="after")
    def _tells_what_it_says(self) -> Self:
        disclosure, silent = self.disclosure, self.disclosure.counts == "none"
        told = list(zip(self.patients.all, self.images.all, strict=True))
        if any((patients is None) != (images is None) for patients, images in told):
            raise ValueError("expected both patients and images of a part, or neither")
        # Under privacy training patients are not told, whatever else is.
        if any((patients is None) != silent for patients, _ in (told if silent else told[1:])):
            raise ValueError("expected the parts that it says it tells")
        numbers = [n for patients, images in told for n in (patients or 0, *(images or ()))]
        if any(n % disclosure.base for n in numbers):
            raise ValueError("expected numbers as coarse as it says")
        if disclosure != disclosure.resolved(private=False):
            raise ValueError("expected no metrics without counts")
        return self

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({CONFIG: ConfigRecord({_JSON: self.model_dump_json()})})

    @classmethod
    def read(cls, record: RecordDict) -> "JoinReply":
        """Back from Flower; raises `ContractError`."""
        _exactly(record, CONFIG)
        try:
            return cls.model_validate_json(_value(record, CONFIG, _JSON, str))
        except ValidationError as ex:
            raise ContractError(f"a join reply with {ex.error_count()} misfits") from None


def lacking() -> RecordDict:
    """What a site answers to a proposal if it has no copy of the backbone."""
    return RecordDict({CONFIG: ConfigRecord({_LACKS: "backbone"})})


def read_join(record: RecordDict) -> JoinReply | None:
    """The answer to a proposal; None if the site lacks the backbone. Raises `ContractError`."""
    if dict(record.config_records.get(CONFIG, {})) == {_LACKS: "backbone"}:
        _exactly(record, CONFIG)
        return None
    return JoinReply.read(record)


@dataclass(frozen=True, kw_only=True)
class BackbonePart:
    """A piece of the backbone: a safetensors file, of no use unless it is whole."""

    study: str
    sha256: str
    """Of the whole file."""
    size: int
    """Of the whole file, in bytes."""
    offset: int
    """Where this piece begins."""
    data: bytes

    def record(self) -> RecordDict:
        """As Flower sends it."""
        config = ConfigRecord({_STUDY: self.study, _HASH: self.sha256, _DATA: self.data})
        config[_SIZE], config[_OFFSET] = self.size, self.offset
        return RecordDict({CONFIG: config})

    @classmethod
    def read(cls, record: RecordDict) -> "BackbonePart":
        """Back from Flower; raises `ContractError`."""
        _exactly(record, CONFIG)
        part = cls(
            study=_value(record, CONFIG, _STUDY, str),
            sha256=_value(record, CONFIG, _HASH, str),
            size=_value(record, CONFIG, _SIZE, int),
            offset=_value(record, CONFIG, _OFFSET, int),
            data=_value(record, CONFIG, _DATA, bytes),
        )
        fits = 0 <= part.offset <= part.offset + len(part.data) <= part.size <= _LARGEST_BACKBONE
        if not fits or not re.fullmatch(r"[0-9a-f]{64}", part.sha256):
            raise ContractError("a piece of a backbone that cannot be")
        return part


@dataclass(frozen=True)
class BackboneHeld:
    """How much of the backbone a site has by now, from its beginning."""

    bytes: int

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({CONFIG: ConfigRecord({_OFFSET: self.bytes})})

    @classmethod
    def read(cls, record: RecordDict) -> "BackboneHeld":
        """Back from Flower; raises `ContractError`."""
        _exactly(record, CONFIG)
        held = _value(record, CONFIG, _OFFSET, int)
        if not 0 <= held <= _LARGEST_BACKBONE:
            raise ContractError("an impossible part of a backbone")
        return cls(held)


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """Evaluate these tensors on your validation patients, then train them and send them back.

    The server's half is made by the Flower strategy from `round_config`.
    """

    study: str
    round: int
    proximal_mu: float
    arrays: ArrayRecord

    @classmethod
    def read(cls, record: RecordDict) -> "RoundRequest":
        """From Flower; the arrays are still unchecked. Raises `ContractError`."""
        _exactly(record, ARRAYS, CONFIG)
        config = _only(record.config_records, CONFIG)
        mu = config.get(_PROXIMAL, 0.0)
        if type(mu) not in (float, int) or not 0 <= mu <= _MOST_PROXIMAL:
            raise ContractError(f"a proximal term that is not in [0, {_MOST_PROXIMAL:g}]")
        number = _value(record, CONFIG, _ROUND, int)
        if number < 1:
            raise ContractError("a round before the first")
        study = _value(record, CONFIG, _STUDY, str)
        arrays = _only(record.array_records, ARRAYS)
        return cls(study=study, round=number, proximal_mu=float(mu), arrays=arrays)


def round_config(study: str) -> ConfigRecord:
    """The part of a round's request that Flower's strategies do not write themselves."""
    return ConfigRecord({_STUDY: study})


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a site tells about a round beside its tensors."""

    train_loss: float | None
    """Mean over the images seen; None where losses are withheld."""
    counts: Counts
    """Of the tensors received, on the site's validation patients."""


@dataclass(frozen=True, kw_only=True)
class RoundReply:
    """What a site sends after a round."""

    arrays: ArrayRecord
    """The trained tensors; as read, checked and in the order agreed."""
    figures: Figures | None
    """If the site tells them every round."""
    ledger: LedgerHead
    """How far the site's ledger went before this left."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        head = ConfigRecord({_COUNT: self.ledger.count, _HASH: self.ledger.hash})
        record = RecordDict({ARRAYS: self.arrays, _LEDGER: head})
        if self.figures and self.figures.train_loss is not None:
            record[METRICS] = MetricRecord({_LOSS: self.figures.train_loss})
        if self.figures:
            record[_VALIDATION] = MetricRecord(self.figures.counts.sparse())
        return record

    @classmethod
    def read(cls, record: RecordDict, shapes: Shapes, joined: JoinReply) -> "RoundReply":
        """Back from Flower; raises `ContractError` unless it is exactly as agreed.

        Args:
          record: What the site sent.
          shapes: Of the tensors that travel.
          joined: What the site told at join.
        """
        tells = joined.disclosure.metrics == "every_round"
        scored = tells and joined.disclosure.tells_scores
        expected = {ARRAYS: True, _LEDGER: True, METRICS: scored, _VALIDATION: tells}
        _exactly(record, *(name for name, there in expected.items() if there))
        arrays = _only(record.array_records, ARRAYS)
        from_arrays(arrays, shapes)
        ordered = ArrayRecord({name: arrays[name] for name in shapes})
        figures = _figures(record, joined) if tells else None
        return cls(arrays=ordered, figures=figures, ledger=_ledger(record))


def _figures(record: RecordDict, joined: JoinReply) -> Figures:
    counts = _counts(record, _VALIDATION, joined.images.validation, joined.disclosure)
    if not joined.disclosure.tells_scores:
        return Figures(train_loss=None, counts=counts)
    metrics = _only(record.metric_records, METRICS)
    if set(metrics) != {_LOSS}:
        raise ContractError("metrics other than the agreed ones")
    loss = metrics[_LOSS]
    if not isinstance(loss, float) or not 0 <= loss <= _WORST_LOSS:
        raise ContractError("a loss that is no loss")
    return Figures(train_loss=loss, counts=counts)


def _ledger(record: RecordDict) -> LedgerHead:
    told = _only(record.config_records, _LEDGER)
    try:
        return LedgerHead.model_validate(dict(told))
    except ValidationError:
        raise ContractError("a ledger that is none") from None


def strategy_record(arrays: ArrayRecord, weight: float) -> RecordDict:
    """A checked reply in the one form that every Flower strategy accepts."""
    return RecordDict({ARRAYS: arrays, METRICS: MetricRecord({WEIGHT: float(weight)})})


@dataclass(frozen=True, kw_only=True)
class FinalRequest:
    """Evaluate the released model on your validation and test patients."""

    study: str
    arrays: ArrayRecord

    def record(self) -> RecordDict:
        """As Flower sends it."""
        config = ConfigRecord({_STUDY: self.study})
        return RecordDict({ARRAYS: self.arrays, CONFIG: config})

    @classmethod
    def read(cls, record: RecordDict) -> "FinalRequest":
        """Back from Flower; the arrays are still unchecked. Raises `ContractError`."""
        _exactly(record, ARRAYS, CONFIG)
        arrays = _only(record.array_records, ARRAYS)
        return cls(study=_value(record, CONFIG, _STUDY, str), arrays=arrays)


@dataclass(frozen=True, kw_only=True)
class FinalCounts:
    """Of the released model."""

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
        parts = {_VALIDATION: self.counts.validation, _TEST: self.counts.test}
        return RecordDict({part: MetricRecord(told.sparse()) for part, told in parts.items()})

    @classmethod
    def read(cls, record: RecordDict, joined: JoinReply) -> "FinalReply":
        """Back from Flower; raises `ContractError` unless it is exactly as told at join."""
        if joined.disclosure.metrics == "none":
            _exactly(record)
            return cls(counts=None)
        _exactly(record, _VALIDATION, _TEST)
        told, disclosure = joined.images, joined.disclosure
        validation = _counts(record, _VALIDATION, told.validation, disclosure)
        test = _counts(record, _TEST, told.test, disclosure)
        return cls(counts=FinalCounts(validation=validation, test=test))


@dataclass(frozen=True)
class LedgerRequest:
    """Asks a site for the hash of one line of its ledger, to see that it was not rolled back."""

    count: int
    """The line, from 1."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({CONFIG: ConfigRecord({_COUNT: self.count})})

    @classmethod
    def read(cls, record: RecordDict) -> "LedgerRequest":
        """Back from Flower; raises `ContractError`."""
        _exactly(record, CONFIG)
        config = _only(record.config_records, CONFIG)
        if set(config) != {_COUNT} or (count := _value(record, CONFIG, _COUNT, int)) < 1:
            raise ContractError("a line before the first")
        return cls(count)


@dataclass(frozen=True)
class LedgerReply:
    """The hash of that line."""

    hash: str | None
    """None where the ledger does not go so far."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({CONFIG: ConfigRecord({_HASH: self.hash or ""})})

    @classmethod
    def read(cls, record: RecordDict) -> "LedgerReply":
        """Back from Flower; raises `ContractError`."""
        _exactly(record, CONFIG)
        config, told = _only(record.config_records, CONFIG), _value(record, CONFIG, _HASH, str)
        if set(config) != {_HASH} or not re.fullmatch(r"([0-9a-f]{64})?", told):
            raise ContractError("a hash that is none")
        return cls(told or None)


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Float32 tensors, by name, as Flower sends them."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return ArrayRecord({name: Array(tensor) for name, tensor in flat.items()})


def from_arrays(arrays: ArrayRecord, shapes: Shapes) -> Tensors:
    """The tensors of a message; raises `ContractError` unless names, shapes and type are as agreed.

    Every value is float32 and finite, and none is beyond ±10⁴.
    """
    if set(arrays) != set(shapes):
        raise ContractError("tensors with other names than agreed")
    return {name: _tensor(arrays[name], shape) for name, shape in shapes.items()}


def _tensor(array: Array, shape: tuple[int, ...]) -> Tensor:
    # Compared, not parsed: a float32 tensor of this shape begins with just these bytes.
    header, data = _header(shape), array.data
    fits = len(data) == len(header) + 4 * math.prod(shape) and data.startswith(header)
    if not fits or array.stype != "numpy.ndarray":
        raise ContractError("a tensor of another type, shape or size than agreed")
    values = np.frombuffer(data, np.float32, offset=len(header)).reshape(shape)
    if not (np.abs(values) <= LARGEST).all():  # nor NaN
        raise ContractError("a tensor with values that are not finite, or beyond ±10⁴")
    return torch.from_numpy(values.copy())


@lru_cache(maxsize=4096)
def _header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def _counts(
    record: RecordDict, key: str, images: Sequence[int] | None, disclosure: Disclosure
) -> Counts:
    """Counts of exactly these images of each class, no finer than the site disclosed at join."""
    told, base = _only(record.metric_records, key), disclosure.base
    counts = Counts.from_sparse(told, len(images or ()), scored=base == 1)
    if counts.confusion.sum(axis=1).tolist() != list(images or ()):
        raise ContractError("counts of other images than it told at join")
    if disclosure.coarse(counts).sparse() != counts.sparse():
        raise ContractError("counts finer than it disclosed at join")
    return counts


def payload(arrays: ArrayRecord) -> int:
    """Bytes that a record of tensors puts on the wire."""
    return sum(len(array.data) for array in arrays.values())


def _exactly(record: RecordDict, *keys: str) -> None:
    if set(record) != set(keys):
        raise ContractError("a message with other parts than agreed")


def _only(records: Mapping[str, Any], key: str) -> Any:
    if key not in records:
        raise ContractError(f"no {key!r} in the message")
    return records[key]


def _value(record: RecordDict, section: str, key: str, kind: type[Any]) -> Any:
    value = _only(record.config_records, section).get(key)
    if type(value) is not kind or (kind is str and len(value) > _LONGEST_JSON):
        raise ContractError(f"no usable {key!r} in the message")
    return value
