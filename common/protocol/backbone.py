"""The backbone, piece by piece, for a site without a copy."""

import re
from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from common.errors import ContractError
from common.protocol.fields import CONFIG, DATA, HASH, OFFSET, SIZE, STUDY, check_parts, get_value

BACKBONE = "query.backbone"
"""The type of a message with a piece of the backbone, for a site that has no copy."""
PIECE = 2 * 2**20
"""Bytes of one message; small enough for a slow line."""
_LARGEST_BACKBONE = 4 * 10**9


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
        config = ConfigRecord({STUDY: self.study, HASH: self.sha256, DATA: self.data})
        config[SIZE], config[OFFSET] = self.size, self.offset
        return RecordDict({CONFIG: config})

    @classmethod
    def read(cls, record: RecordDict) -> "BackbonePart":
        """Back from Flower; raises `ContractError`."""
        check_parts(record, CONFIG)
        part = cls(
            study=get_value(record, CONFIG, STUDY, str),
            sha256=get_value(record, CONFIG, HASH, str),
            size=get_value(record, CONFIG, SIZE, int),
            offset=get_value(record, CONFIG, OFFSET, int),
            data=get_value(record, CONFIG, DATA, bytes),
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
        return RecordDict({CONFIG: ConfigRecord({OFFSET: self.bytes})})

    @classmethod
    def read(cls, record: RecordDict) -> "BackboneHeld":
        """Back from Flower; raises `ContractError`."""
        check_parts(record, CONFIG)
        held = get_value(record, CONFIG, OFFSET, int)
        if not 0 <= held <= _LARGEST_BACKBONE:
            raise ContractError("an impossible part of a backbone")
        return cls(held)
