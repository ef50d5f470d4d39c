"""The exchange behind a solved head: sums of features, and which strength validates best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import ContractError
from common.heads.registry import LinearHead
from common.heads.sums import Sums
from common.metrics.counts import MOST, Counts, Floats
from common.model.weights import LARGEST
from common.protocol.counts import read_counts
from common.protocol.fields import (
    ARRAYS,
    CONFIG,
    STUDY,
    TensorsRequest,
    check_parts,
    get_part,
    get_value,
)
from common.protocol.join import JoinReply
from common.protocol.tensors import FLOAT64, Shapes, from_arrays, to_arrays

MEANS = "query.means"
"""The type of the message that asks for the sum of all features, of which the centre is made."""
SUMS = "query.sums"
"""The type of the message that asks for sums of features."""
CANDIDATES = "query.candidates"
"""The type of the message that asks how several heads validate."""

WEIGHTS = "class-weights"
COUNTS, TOTALS, SECOND = "counts", "totals", "second"
WEIGHT, BIAS, CENTRE = "weight", "bias", "centre"
MOST_CANDIDATES = 16
MOST_IMAGES = 10**7
"""Of one site: sums over all of them stay well within what sites accept."""
_ROUNDED = 1e-9
"""How far float64 may take a spread below 0, where features have length 1."""


@dataclass(frozen=True)
class MeansRequest:
    """Add up the features of all of your training images."""

    study: str

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({CONFIG: ConfigRecord({STUDY: self.study})})

    @classmethod
    def read(cls, record: RecordDict) -> "MeansRequest":
        """Back from Flower; raises `ContractError`."""
        check_parts(record, CONFIG)
        return cls(get_value(record, CONFIG, STUDY, str))


@dataclass(frozen=True, kw_only=True)
class MeansReply:
    """How many training images a site has, and the sum of their features [d]."""

    images: int
    total: Floats

    def record(self) -> RecordDict:
        """As Flower sends it."""
        numbers = {COUNTS: np.array([self.images], np.float64), TOTALS: self.total}
        tensors = {name: torch.from_numpy(value) for name, value in numbers.items()}
        return RecordDict({ARRAYS: to_arrays(tensors)})

    @classmethod
    def read(cls, record: RecordDict, width: int) -> "MeansReply":
        """Back from Flower; raises `ContractError` unless it is the sum of some images."""
        check_parts(record, ARRAYS)
        shapes = {COUNTS: (1,), TOTALS: (width,)}
        arrays = get_part(record.array_records, ARRAYS)
        found = from_arrays(arrays, shapes, FLOAT64, most=LARGEST * MOST)
        images, total = float(found[COUNTS]), found[TOTALS].numpy()
        if not 1 <= images <= MOST_IMAGES or images != int(images):
            raise ContractError("the sum of no whole number of images")
        if (np.abs(total) > LARGEST * images).any():
            raise ContractError(f"a sum of features beyond ±{LARGEST:g}")
        return cls(images=int(images), total=total)


@dataclass(frozen=True, kw_only=True)
class SumsRequest:
    """Add up the features of your training images, less a centre, each class with this weight."""

    study: str
    centre: Floats
    """[d], float32."""
    weights: Floats
    """[K], from 0 to 1."""

    def record(self) -> RecordDict:
        """As Flower sends it."""
        config = ConfigRecord({STUDY: self.study, WEIGHTS: self.weights.tolist()})
        return RecordDict({ARRAYS: _centre_arrays(self.centre), CONFIG: config})

    @classmethod
    def read(cls, record: RecordDict, width: int) -> "SumsRequest":
        """Back from Flower; raises `ContractError`."""
        check_parts(record, ARRAYS, CONFIG)
        weights = read_weights(record)
        arrays = from_arrays(get_part(record.array_records, ARRAYS), {CENTRE: (width,)})
        return cls(
            study=get_value(record, CONFIG, STUDY, str),
            centre=arrays[CENTRE].double().numpy(),
            weights=weights,
        )


def read_weights(record: RecordDict) -> Floats:
    """The class weights [K] of a message; raises `ContractError` unless they are from 0 to 1."""
    weights = get_value(record, CONFIG, WEIGHTS, list)
    if not all(type(w) is float and 0 <= w <= 1 for w in weights):
        raise ContractError("class weights that are not from 0 to 1")
    return np.array(weights, np.float64)


def _centre_arrays(centre: Floats) -> ArrayRecord:
    return to_arrays({CENTRE: torch.tensor(centre, dtype=torch.float32)})


@dataclass(frozen=True, kw_only=True)
class SumsReply:
    """The sums of a site."""

    sums: Sums

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({ARRAYS: write_sums(self.sums)})

    @classmethod
    def read(cls, record: RecordDict, width: int, weights: Floats) -> "SumsReply":
        """Back from Flower; raises `ContractError` unless they are sums of unit features."""
        check_parts(record, ARRAYS)
        sums = read_sums(get_part(record.array_records, ARRAYS), width, weights)
        if (sums.counts != np.floor(sums.counts)).any() or sums.counts.sum() > MOST_IMAGES:
            raise ContractError("sums of no whole number of images")
        return cls(sums=sums)


def write_sums(sums: Sums) -> ArrayRecord:
    """As Flower sends them: of the symmetric second moment, the upper triangle."""
    upper = sums.second[np.triu_indices(len(sums.second))]
    numbers = {COUNTS: sums.counts, TOTALS: sums.totals, SECOND: upper}
    return to_arrays({name: torch.from_numpy(value) for name, value in numbers.items()})


def read_sums(arrays: ArrayRecord, width: int, weights: Floats) -> Sums:
    """Back from Flower; raises `ContractError` unless they are sums of unit features."""
    found = from_arrays(arrays, shape_sums(len(weights), width), FLOAT64, most=MOST)
    counts, totals = found[COUNTS].numpy(), found[TOTALS].numpy()
    if (counts < 0).any():
        raise ContractError("sums of less than no image")
    if (np.linalg.norm(totals, axis=1) > counts + 1e-3).any():
        raise ContractError("sums of features longer than 1")
    second = np.zeros((width, width))
    second[np.triu_indices(width)] = found[SECOND].numpy()
    second = second + np.triu(second, 1).T
    mass = float(weights @ counts)
    if abs(np.trace(second)) > mass + 1e-3 or (np.diagonal(second) < -1e-9).any():
        raise ContractError("second moments of features longer than 1")
    sums = Sums(counts, totals, second, weights)
    if not _has_spread(sums):
        raise ContractError("second moments of no features with these means")
    return sums


def _has_spread(sums: Sums) -> bool:
    """Whether the spread within classes is one, below 0 in no direction.

    So is then that of any total, and a head can be solved from it.
    """
    try:
        np.linalg.cholesky(sums.spread + _ROUNDED * np.eye(len(sums.second)))
    except np.linalg.LinAlgError:
        return False
    return True


def shape_sums(classes: int, width: int) -> Shapes:
    """The shapes of what a site sends."""
    return {COUNTS: (classes,), TOTALS: (classes, width), SECOND: (width * (width + 1) // 2,)}


def size_reply(record: RecordDict) -> list[int]:
    """The bytes of each tensor of the sums that a message asks for, and of its header."""
    classes = len(get_value(record, CONFIG, WEIGHTS, list))
    (width,) = get_part(record.array_records, ARRAYS)[CENTRE].shape
    return size_sums(classes, width)


def size_sums(classes: int, width: int) -> list[int]:
    """The bytes of each tensor that a site sends, and of its header."""
    return [8 * math.prod(shape) + 256 for shape in shape_sums(classes, width).values()]


class CandidatesRequest(TensorsRequest):
    """Tell how each of these heads does on your validation patients."""

    @classmethod
    def of(cls, study: str, heads: Sequence[LinearHead], centre: Floats) -> "CandidatesRequest":
        """Heads of one shape, for features less a centre."""
        tensors = {
            CENTRE: torch.tensor(centre, dtype=torch.float32),
            WEIGHT: torch.tensor(np.stack([head.weight for head in heads]), dtype=torch.float32),
            BIAS: torch.tensor(np.stack([head.bias for head in heads]), dtype=torch.float32),
        }
        return cls(study=study, arrays=to_arrays(tensors))

    def heads(
        self, classes: int, width: int
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Floats]:
        """The weight [K, d] and bias [K] of each, and the centre [d].

        Raises:
          ContractError: they are of other shapes, or too many.
        """
        number = (
            self.arrays[BIAS].shape[0] if BIAS in self.arrays and self.arrays[BIAS].shape else 0
        )
        if not 1 <= number <= MOST_CANDIDATES:
            raise ContractError(f"expected 1 to {MOST_CANDIDATES} heads, got {number}")
        shapes = {WEIGHT: (number, classes, width), BIAS: (number, classes), CENTRE: (width,)}
        found = from_arrays(self.arrays, shapes)
        heads = list(zip(found[WEIGHT], found[BIAS], strict=True))
        return heads, found[CENTRE].double().numpy()


@dataclass(frozen=True, kw_only=True)
class CandidatesReply:
    """The counts of each head on a site's validation patients, in the order asked."""

    counts: Sequence[Counts]

    def record(self) -> RecordDict:
        """As Flower sends it."""
        return RecordDict({str(n): MetricRecord(c.sparse()) for n, c in enumerate(self.counts)})

    @classmethod
    def read(cls, record: RecordDict, number: int, joined: JoinReply) -> "CandidatesReply":
        """Back from Flower; raises `ContractError` unless it is exactly as told at join."""
        check_parts(record, *map(str, range(number)))
        images = joined.images.validation
        return cls(
            counts=[
                read_counts(record, str(n), images, len(images or ()), joined.disclosure)
                for n in range(number)
            ]
        )
