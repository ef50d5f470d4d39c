"""The two questions behind a private head: sums over training patients, told with noise."""

from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict

from common.errors import ContractError
from common.heads.whitening import Noised, count_moments, count_prototypes
from common.metrics.counts import MOST
from common.protocol.fields import ARRAYS, CONFIG, TensorsRequest, check_parts, get_part, get_value
from common.protocol.tensors import FLOAT64, from_arrays, to_arrays

MOMENTS, PROTOTYPES = NOISED = ("query.moments", "query.prototypes")
"""The types of the messages that ask for outer products, and for the features of each class."""

NUMBERS, DEVIATION = "numbers", "deviation"
MOST_CLASSES = 1000


class NoisedRequest(TensorsRequest):
    """Add up a row of each of your training patients, whitened by these, and add the noise."""


@dataclass(frozen=True, kw_only=True)
class NoisedReply:
    """The sum of a site, and how much noise is in each of its numbers."""

    sums: Noised

    def record(self) -> RecordDict:
        """As Flower sends it."""
        arrays = to_arrays({NUMBERS: torch.from_numpy(self.sums.numbers)})
        config: dict[str, Any] = {DEVIATION: self.sums.deviation}
        return RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(config)})

    @classmethod
    def read(cls, record: RecordDict, size: int) -> "NoisedReply":
        """Back from Flower; raises `ContractError` unless it is so many finite numbers."""
        check_parts(record, ARRAYS, CONFIG)
        deviation = get_value(record, CONFIG, DEVIATION, float)
        if not 0 < deviation <= MOST:
            raise ContractError("noise of no deviation")
        arrays = get_part(record.array_records, ARRAYS)
        found = from_arrays(arrays, {NUMBERS: (size,)}, FLOAT64, most=MOST)
        return cls(sums=Noised(found[NUMBERS].numpy(), deviation))


def size_noised(record: RecordDict) -> list[int]:
    """The bytes of the tensor that answers a message of either type, and of its header, at most."""
    shapes = (array.shape for array in get_part(record.array_records, ARRAYS).values())
    directions = min((shape[0] for shape in shapes if shape), default=0)
    most = max(count_moments(directions), count_prototypes(MOST_CLASSES, directions))
    return [8 * most + 256]


def count_numbers(kind: str, classes: int, directions: int) -> int:
    """How many numbers a site tells in answer to a message of this type."""
    moments = kind == MOMENTS
    return count_moments(directions) if moments else count_prototypes(classes, directions)
